"""The losses refuse malformed inputs, and say what they expected."""

import pytest
import torch

from betaclip import BetaCALLoss, beta_cal_bce_loss, beta_cal_ce_loss

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
