"""The losses refuse malformed inputs, and say what they expected."""

import pytest
import torch

from betaclip import BetaCALLoss, beta_cal_bce_loss, beta_cal_ce_loss
from betaclip.losses import inputs

LOSSES = {"ce": beta_cal_ce_loss, "bce": beta_cal_bce_loss}
E3, E2, INDEX = torch.ones(4, 3, 8), torch.ones(12, 8), torch.arange(12) // 3


@pytest.mark.parametrize(
    "image, text, change, message",
    [
        (E3, torch.ones(4, 3, 9), {}, r"text_embeds: expected shape \(4, 3, 8\) as image_embeds, got \(4, 3, 9\)"),
        (E3, torch.ones(4, 2, 8), {}, r"text_embeds: expected shape \(4, 3, 8\) as image_embeds, got \(4, 2, 8\)"),
        (E3, torch.ones(5, 3, 8), {}, r"text_embeds: expected shape \(4, 3, 8\) as image_embeds, got \(5, 3, 8\)"),
        (E3, E2, {}, r"text_embeds: expected \(B, K, D\), or \(N, D\) with image_index, got shape \(12, 8\)"),
        (E2, E2, {}, r"image_embeds: expected \(B, K, D\), or \(N, D\) with image_index, got shape \(12, 8\)"),
        (E3, E3, {"image_index": INDEX}, r"image_embeds: expected \(N, D\) with image_index, got shape \(4, 3, 8\)"),
        (E3.int(), E3, {}, r"image_embeds: expected float16, bfloat16, float32 or float64, got torch.int32"),
        (E3, E3.to("meta"), {}, r"text_embeds: expected device cpu as image_embeds, got meta"),
        (E3, E3, {"mask": torch.ones(4, 4).bool()}, r"mask: expected shape \(4, 3\), got \(4, 4\)"),
        (E3, E3, {"mask": torch.ones(4, 3)}, r"mask: expected dtype torch.bool \(True = valid\), got torch.float32"),
        (E2, E2, {"image_index": INDEX, "mask": torch.ones(12).bool()}, r"mask: expected None with image_index"),
        (E2, E2, {"image_index": INDEX[:5]}, r"image_index: expected shape \(12,\), got \(5,\)"),
        (E2, E2, {"image_index": INDEX.float()}, r"image_index: expected an integer dtype, got torch.float32"),
        (E2, E2, {"image_index": INDEX.flip(0)}, r"image_index: expected sorted values"),
        (E2, E2, {"image_index": INDEX - 1}, r"image_index: expected values >= 0, got -1"),
        (E3, E3, {"logit_scale": torch.ones(2)}, r"logit_scale: expected a floating-point scalar, got .* \(2,\)"),
        (E3, E3, {"logit_scale": torch.tensor(3)}, r"logit_scale: expected a floating-point scalar, got torch.int64"),
        (E3, E3, {"beta": -0.1}, r"beta: expected a finite weight >= 0, got -0.1"),
        (E3, E3, {"beta": torch.tensor(-1.0)}, r"beta: expected a finite weight >= 0, got -1.0"),
        (E3, E3, {"beta": float("nan")}, r"beta: expected a finite weight >= 0, got nan"),
        (E3, E3, {"alpha": -2.0}, r"alpha: expected a finite weight >= 0, got -2.0"),
        (
            E3,
            E3,
            {"pair_weights": torch.ones(4, 4)},
            r"pair_weights: expected shape \(3, 3\) or \(4, 3, 3\), got \(4, 4\)",
        ),
        (E2, E2, {"image_index": INDEX, "padding": "published"}, r"padding: expected 'ignore' with image_index"),
        (E3.tolist(), E3, {}, r"image_embeds: expected a tensor, got list"),
        (E3, E3, {"mask": [[True]]}, r"mask: expected a tensor, got list"),
        (E3, E3, {"logit_scale": None}, r"logit_scale: expected a number or a tensor, got NoneType"),
        (E3, E3, {"beta": float("inf")}, r"beta: expected a finite weight >= 0, got inf"),
        (E3, E3, {"beta": torch.ones(2)}, r"beta: expected a floating-point scalar, got .* \(2,\)"),
        (E3, E3, {"padding": "drop"}, r"padding: expected one of 'ignore', 'published', got 'drop'"),
        (E3, E3, {"backend": "fast"}, r"backend: expected one of .*, got 'fast'"),
    ],
)
@pytest.mark.parametrize("form", LOSSES)
def test_rejects(form, image, text, change, message):
    options = {"logit_scale": 10.0} | change
    with pytest.raises(ValueError, match=message):
        LOSSES[form](image, text, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"form": "softmax"}, r"form: expected one of 'ce', 'bce', got 'softmax'"),
        ({"padding": "none"}, r"padding: expected one of"),
        ({"backend": "gpu"}, r"backend: expected one of"),
        ({"form": "bce", "divisor": "images"}, r"divisor: expected one of 'pairs', 'rows', got 'images'"),
        ({"divisor": "rows"}, r"divisor: expected one of 'pairs', got 'rows'"),
        ({"beta": -1.0}, r"beta: expected a finite weight >= 0"),
        ({"alpha": -1.0}, r"alpha: expected a finite weight >= 0"),
    ],
)
def test_module_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        BetaCALLoss(**options)


def test_named_backend_that_cannot_serve_says_why(interpreter_as_it_is):
    with pytest.raises(NotImplementedError, match="triton: "):
        beta_cal_ce_loss(E3.bfloat16(), E3.bfloat16(), 10.0, backend="triton")


DISTINCT = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(3))
ONE = DISTINCT[:, :1]
MASK = torch.tensor([[True, True, False]]).expand(4, 3)
NO_EFFECT = "beta: has no effect in the softmax form if all texts of an image have the same image embedding"


@pytest.fixture
def not_warned_yet():
    inputs._warn_that_beta_cancels.cache_clear()
    yield
    inputs._warn_that_beta_cancels.cache_clear()


@pytest.mark.usefixtures("not_warned_yet")
@pytest.mark.parametrize("call", [beta_cal_ce_loss, BetaCALLoss("ce"), BetaCALLoss("ce", beta=torch.tensor(0.3))])
@pytest.mark.parametrize(
    "image, options",
    [
        (ONE.expand(4, 3, 8), {}),
        (ONE.repeat(1, 3, 1), {}),
        (ONE.repeat(1, 3, 1).flatten(0, 1), {"image_index": INDEX}),
        (torch.cat((ONE, ONE, DISTINCT[:, 2:]), 1), {"mask": MASK}),  # a padded slot holds anything
        (ONE.repeat(1, 3, 1)[[0] * 60], {}),
    ],
    ids=["expanded", "copied", "ragged", "masked", "many"],
)
def test_warns_once_that_beta_has_no_effect(call, image, options):
    text = torch.randn_like(image)
    with pytest.warns(UserWarning, match=NO_EFFECT) as caught:
        for _ in range(3):
            call(image, text, 10.0, **options)
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.usefixtures("not_warned_yet")
@pytest.mark.parametrize(
    "call, image, options",
    [
        (beta_cal_ce_loss, DISTINCT, {}),
        (beta_cal_ce_loss, DISTINCT.flatten(0, 1), {"image_index": INDEX}),
        (beta_cal_ce_loss, torch.cat((ONE.repeat(1, 3, 1)[[0] * 60], DISTINCT)), {}),  # only the first are alike
        (beta_cal_ce_loss, ONE.expand(4, 3, 8), {"beta": 0.0}),
        (beta_cal_ce_loss, ONE.expand(4, 3, 8), {"pair_weights": torch.rand(3, 3)}),
        (beta_cal_ce_loss, ONE, {}),
        (beta_cal_ce_loss, E3, {"mask": torch.zeros(4, 3, dtype=torch.bool)}),
        (beta_cal_bce_loss, ONE.expand(4, 3, 8), {}),
        (beta_cal_ce_loss, DISTINCT.to("meta"), {}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_does_not_warn_otherwise(call, image, options):
    call(image, torch.randn_like(image), 10.0, **options)


@pytest.mark.filterwarnings("ignore:beta")
def test_beta_has_no_effect_there():
    """The same gradients at every beta, as the warning says."""
    image, text = ONE.double().requires_grad_(), torch.randn(4, 3, 8, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(beta_cal_ce_loss(image.expand(4, 3, 8), text, 10.0, beta=beta), image)[0]
        for beta in (0.0, 0.7)
    ]
    torch.testing.assert_close(*gradients)
