"""β-CAL: values and gradients against the dense formula, ragged and masked batches, compilation."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from support.beta_cal_batches import DEVICE, FORMS, LOSSES, Recorder, batch, dense, gradients, require
from support.dispatches import Dispatches
from support.paths import GOLDEN
from support.precision import HALF, assert_exact, usual, widest
from torch import Tensor, nn

from betaclip import BetaCALLoss, beta_cal_bce_loss, beta_cal_ce_loss
from betaclip.kernels.memory import forget
from betaclip.kernels.similarity.blockwise import Blockwise
from betaclip.kernels.similarity.operators import BACKENDS

CASES = json.loads((GOLDEN / "beta_cal.json").read_text())


def full_precision(backend: str) -> torch.dtype:
    dtype = widest(backend)
    if dtype in HALF:
        pytest.skip(f"{backend}: half precision has tests of its own")
    return dtype


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "case", CASES["cases"], ids=lambda c: f"{c['form']}-{c['beta']}-{c['mask_name']}-{c['logit_scale']:.0f}"
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_published_values(backend, case, dtype, tolerance):
    require(backend, dtype)
    image, text, scale = (
        torch.tensor(value, dtype=dtype, device=DEVICE, requires_grad=True)
        for value in (CASES["image"], CASES["text"], case["logit_scale"])
    )
    mask = torch.tensor(CASES["masks"][case["mask_name"]], device=DEVICE).bool()
    loss = BetaCALLoss(case["form"], beta=case["beta"], alpha=case["alpha"], padding="published", backend=backend)
    ours = gradients(loss(image, text, scale, mask=mask), image, text, scale)
    for value, name in zip(ours, ("loss", "d_image", "d_text", "d_logit_scale"), strict=True):
        expected = torch.tensor(case[name], dtype=torch.float64, device=DEVICE)
        assert (value.double() - expected).abs().max() <= tolerance * max(1, expected.abs().max())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"beta": 1.0}, {"alpha": 0.3, "beta": 0.7}])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_dense_formula(backend, form, options, masked):
    b = batch(dtype=full_precision(backend))
    leaves = [t.requires_grad_() for t in (b.image, b.text, b.scale)]
    mask = b.mask if masked else None
    ours = LOSSES[form](*leaves, mask=mask, backend=backend, **options)
    theirs = dense(form, *leaves, mask=mask, **options)
    for a, t in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
        assert_exact(a, t)


@pytest.mark.parametrize("form", FORMS)
def test_logit_bias_and_learned_beta(form):
    """A tensor beta receives a gradient; a bias moves the sigmoid form and cannot move the softmax form."""
    b = batch()
    beta, bias = (torch.tensor(v, dtype=torch.float64, device=DEVICE, requires_grad=True) for v in (0.4, -3.0))
    loss = BetaCALLoss(form, beta=beta)(b.image, b.text, b.scale, mask=b.mask, logit_bias=bias)
    truth = dense(form, b.image, b.text, b.scale, bias=bias, beta=beta, mask=b.mask)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(*(torch.autograd.grad(v, beta, retain_graph=True)[0] for v in (loss, truth)))
    if form == "bce":
        torch.testing.assert_close(*(torch.autograd.grad(v, bias)[0] for v in (loss, truth)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_pair_weights(form, per_image, masked):
    """Any weights within an image, not symmetric, with a gradient of their own."""
    b = batch()
    weights = torch.rand(*(6,) * per_image, 5, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    mask = b.mask if masked else None
    loss = BetaCALLoss(form)(b.image, b.text, b.scale, mask=mask, pair_weights=weights)
    truth = dense(form, b.image, b.text, b.scale, weights=weights, mask=mask)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(*(torch.autograd.grad(v, weights)[0] for v in (loss, truth)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_ragged_equals_masked(form, backend):
    """(N, D) rows with image_index, the empty image left out, are the same batch as (B, K, D) with its mask."""
    b = batch(dtype=full_precision(backend))
    leaves = [t.requires_grad_() for t in (b.image, b.text, b.scale)]
    masked = gradients(LOSSES[form](*leaves, mask=b.mask, backend=backend), *leaves)
    rows = [b.image[b.mask], b.text[b.mask]]
    index = torch.arange(6, device=DEVICE)[:, None].expand_as(b.mask)[b.mask]
    ragged = gradients(LOSSES[form](*rows, b.scale, image_index=index, backend=backend), *leaves)
    for a, t in zip(ragged, masked, strict=True):
        assert_exact(a, t)


def test_one_text_per_image_is_siglip():
    """SigLIP divides the sum over all pairs by N, as ``divisor="rows"`` does; the released β-CAL by N²."""
    image, text = (torch.randn(9, 16, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2))
    scale, bias = (torch.tensor(v, dtype=torch.float64, device=DEVICE, requires_grad=True) for v in (11.0, -10.0))
    leaves = [image, text, scale, bias]
    s = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T + bias
    siglip = -F.logsigmoid((2 * torch.eye(9, dtype=s.dtype, device=DEVICE) - 1) * s).sum() / 9
    expected = gradients(siglip, *leaves)
    for divisor, factor in (("pairs", 9), ("rows", 1)):
        ours = beta_cal_bce_loss(image[:, None], text[:, None], scale, logit_bias=bias, divisor=divisor)
        for a, t in zip(gradients(factor * ours, *leaves), expected, strict=True):
            torch.testing.assert_close(a, t, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("padding", ["ignore", "published"])
def test_divisor_counts_rows_as_padding_says(padding):
    b = batch()
    pairs, rows = (
        BetaCALLoss("bce", padding=padding, divisor=divisor)(b.image, b.text, b.scale, mask=b.mask)
        for divisor in ("pairs", "rows")
    )
    count = b.mask.numel() if padding == "published" else int(b.mask.sum())
    torch.testing.assert_close(rows, pairs * count)


@pytest.mark.parametrize("padding", ["ignore", "published"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_valid_text(backend, form, padding):
    b = batch(dtype=usual(backend))
    leaves = [t.requires_grad_() for t in (b.image, b.text, b.scale)]
    loss = BetaCALLoss(form, padding=padding, backend=backend)(*leaves, mask=torch.zeros_like(b.mask))
    for value in gradients(loss, *leaves):
        assert (value == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, form):
    rows = torch.zeros(0, 8, dtype=usual(backend), device=DEVICE, requires_grad=True)
    index = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    loss = BetaCALLoss(form, backend=backend)(rows, rows, 5.0, image_index=index)
    loss.backward()
    assert loss == 0 and rows.grad.shape == (0, 8)


@pytest.mark.parametrize("images, texts", [(1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_image_or_one_text(backend, form, images, texts):
    b = batch(images, texts, dtype=full_precision(backend))
    leaves = [t.requires_grad_() for t in (b.image, b.text, b.scale)]
    ours, theirs = LOSSES[form](*leaves, backend=backend), dense(form, *leaves)
    for a, t in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
        assert_exact(a, t)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_anything_may_stand_in_padded_slots(backend, form):
    b = batch(dtype=usual(backend))
    clean = LOSSES[form](b.image, b.text, b.scale, mask=b.mask, backend=backend)
    b.image[~b.mask], b.text[~b.mask] = torch.nan, torch.inf
    leaves = [t.requires_grad_() for t in (b.image, b.text, b.scale)]
    loss = LOSSES[form](*leaves, mask=b.mask, backend=backend)
    torch.testing.assert_close(loss, clean)
    for gradient in torch.autograd.grad(loss, leaves):
        assert gradient.isfinite().all()
        if gradient.dim() == 3:
            assert (gradient[~b.mask] == 0).all()


def test_rows_without_target_do_not_count():
    b = batch()
    weights = torch.eye(5, dtype=torch.float64, device=DEVICE)
    weights[1] = 0
    v, t = (F.normalize(e, dim=-1).flatten(0, 1) for e in (b.image, b.text))
    s, kept = b.scale * v @ t.T, torch.arange(30, device=DEVICE) % 5 != 1
    expected = sum((s.logsumexp(dim) - s.diagonal())[kept].mean() for dim in (0, 1)) / 2
    for mask in (None, torch.ones_like(b.mask)):
        torch.testing.assert_close(
            beta_cal_ce_loss(b.image, b.text, b.scale, pair_weights=weights, mask=mask), expected
        )


@pytest.mark.parametrize("form", FORMS)
def test_expanded_and_strided_embeddings(form):
    """One image embedding for all its texts, and a strided view of the texts."""
    image = torch.randn(6, 1, 16, dtype=torch.float64, device=DEVICE, requires_grad=True)
    wide = torch.randn(5, 6, 32, dtype=torch.float64, device=DEVICE, requires_grad=True)
    ours = LOSSES[form](image.expand(6, 5, 16), wide[:, :, ::2].transpose(0, 1), 8.0)
    truth = dense(form, image.expand(6, 5, 16).contiguous(), wide[:, :, ::2].transpose(0, 1).contiguous(), 8.0)
    for a, t in zip(gradients(ours, image, wide), gradients(truth, image, wide), strict=True):
        torch.testing.assert_close(a, t)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
@pytest.mark.parametrize("form", FORMS)
def test_any_subset_of_gradients(form, needed):
    b = batch()
    inputs = [b.image, b.text, b.scale]
    everything = gradients(dense(form, *(t.requires_grad_() for t in inputs)), *inputs)[1:]
    leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
    LOSSES[form](*leaves).backward()
    for leaf, need, truth in zip(leaves, needed, everything, strict=True):
        if need:
            torch.testing.assert_close(leaf.grad, truth)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("form", FORMS)
def test_no_grad_forms_no_gradient(form):
    b = batch()
    b.image.requires_grad_()
    backend = Recorder()
    expected = dense(form, b.image, b.text, b.scale)
    with torch.no_grad():
        loss = LOSSES[form](b.image, b.text, b.scale, backend=backend)
    torch.testing.assert_close(loss, expected.detach())
    assert len(backend.calls) == 1 and backend.calls[0][0].endswith("_fwd") and not loss.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(LOSSES[form](b.image, b.text, b.scale), expected.detach())


@pytest.mark.parametrize("form", FORMS)
def test_training_after_inference_mode(form):
    """Scratch kept between calls may be made in inference mode and must then serve training."""
    b = batch()
    forget()
    with torch.inference_mode():
        expected = LOSSES[form](b.image, b.text, b.scale, backend="blockwise")
    b.image.requires_grad_()
    loss = LOSSES[form](b.image, b.text, b.scale, backend="blockwise")
    (gradient,) = torch.autograd.grad(loss, b.image)
    assert gradient.isfinite().all()
    torch.testing.assert_close(loss.detach(), expected.clone())


@pytest.mark.parametrize("form", FORMS)
def test_retained_graph_gives_the_same_gradient_again(form):
    b = batch()
    b.image.requires_grad_()
    loss = LOSSES[form](b.image, b.text, b.scale)
    first = torch.autograd.grad(loss, b.image, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(2 * loss, b.image)[0], 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, b.image)


@pytest.mark.parametrize("by", ["image", "scale", "bias"])
@pytest.mark.parametrize("form", FORMS)
def test_double_backward_raises(form, by):
    b = batch()
    bias = torch.tensor(-1.0, dtype=torch.float64, device=DEVICE)
    leaves = {"image": b.image, "scale": b.scale, "bias": bias}
    for leaf in leaves.values():
        leaf.requires_grad_()
    loss = BetaCALLoss(form)(b.image, b.text, b.scale, logit_bias=bias)
    if form == "ce" and by == "bias":
        pytest.skip("a softmax does not see the bias")
    (gradient,) = torch.autograd.grad(loss, leaves[by], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        torch.autograd.grad(gradient.sum(), b.image)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    image, text = (torch.randn(3, 2, 4, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2))
    scale, beta = (torch.tensor(v, dtype=torch.float64, device=DEVICE, requires_grad=True) for v in (3.0, 0.4))
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]], device=DEVICE).bool()
    assert torch.autograd.gradcheck(
        lambda image, text, scale, beta: LOSSES[form](image, text, scale, beta=beta, mask=mask),
        (image, text, scale, beta),
    )


@pytest.mark.parametrize("form, compiler", [("ce", "aot_eager"), ("bce", "eager")])
def test_compile(form, compiler):
    """One graph, in the softmax form with that of its gradient, at two shapes; a Python float beta must not become
    float64."""
    loss = BetaCALLoss(form)
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for images in (4, 7):
        b = batch(images, dtype=torch.float32)
        leaves = [t.requires_grad_() for t in (b.image, b.text, b.scale)]
        graph, eager = compiled(*leaves, mask=b.mask), loss(*leaves, mask=b.mask)
        assert graph.dtype == torch.float32
        for a, t in zip(gradients(graph, *leaves), gradients(eager, *leaves), strict=True):
            torch.testing.assert_close(a, t)


class Loss(nn.Module):
    def __init__(self, form: str, backend: str) -> None:
        super().__init__()
        self.loss = BetaCALLoss(form, backend=backend)

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
        return self.loss(image, text, scale, mask=mask)


@pytest.mark.parametrize("form, backend", [("ce", "auto"), ("bce", "blockwise")])
def test_export(form, backend):
    """Exported once, for any number of images and of texts."""
    small, large = (batch(images, texts, dtype=torch.float32) for images, texts in ((3, 2), (6, 5)))
    size = {0: torch.export.Dim("B", min=2, max=1024), 1: torch.export.Dim("K", min=2, max=64)}
    loss, sizes = Loss(form, backend), {"image": size, "text": size, "scale": None, "mask": size}
    exported = torch.export.export(loss, (small.image, small.text, small.scale, small.mask), dynamic_shapes=sizes)
    arguments = large.image, large.text, large.scale, large.mask
    torch.testing.assert_close(exported.module()(*arguments), loss(*arguments))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
@pytest.mark.parametrize("form", FORMS)
def test_function_transforms_raise(form, transform):
    """As the docs say; torch.func.functional_call is no transform."""
    b, loss = batch(), BetaCALLoss(form, beta=nn.Parameter(torch.tensor(0.5, dtype=torch.float64, device=DEVICE)))
    image = b.image[None] if transform is torch.func.vmap else b.image
    with pytest.raises(RuntimeError, match="setup_context"):
        transform(lambda image: loss(image, b.text, b.scale))(image)
    beta = torch.tensor(0.1, dtype=torch.float64, device=DEVICE)
    called = torch.func.functional_call(loss, {"beta": beta}, (b.image, b.text, b.scale))
    torch.testing.assert_close(called, BetaCALLoss(form, beta=0.1)(b.image, b.text, b.scale))


@pytest.mark.parametrize("backend", ["auto", "blockwise", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_meta_device(form, backend):
    """Shapes and dtypes without values, as for estimates of memory."""
    b = batch()
    leaves = [t.to("meta").requires_grad_() for t in (b.image, b.text, b.scale)]
    loss = BetaCALLoss(form, backend=backend)(*leaves, mask=b.mask.to("meta"))
    assert loss.is_meta and loss.shape == () and loss.dtype == torch.float64
    for gradient, leaf in zip(torch.autograd.grad(loss, leaves), leaves, strict=True):
        assert gradient.is_meta and (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize("form, budget", [("ce", 0), ("ce", 10_000), ("bce", 0)])
def test_saved_for_backward_is_linear(form, budget):
    """Autograd keeps between forward and backward: the inputs themselves, gradients in the sigmoid form
    (formed early), a few (B, K, K) blocks, and the exponentials that it may; nothing else quadratic in the batch."""
    images, texts, dim = 128, 6, 32  # more than rows whose matrix of cosines is kept
    image, text = (torch.randn(images, texts, dim, device=DEVICE, requires_grad=True) for _ in range(2))
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        BetaCALLoss(form, keep=budget)(image, text, 10.0)
    inputs, block = 2 * image.nbytes, images * texts**2 * 4
    assert 0 <= sum(kept.values()) - (budget if DEVICE == "cpu" else 0) <= 2 * inputs + 10 * block
    assert (images * texts) ** 2 * 4 > 2 * inputs + 10 * block  # the matrix would not have passed


@pytest.mark.parametrize("images, texts", [(4, 36), (96, 1)])
@pytest.mark.parametrize(
    "form, backend, most",
    [
        ("ce", Blockwise(), 190),
        ("bce", Blockwise(), 135),
        ("ce", Blockwise(max_matrix=0), 295),
        ("bce", Blockwise(max_matrix=0), 210),
    ],
)
def test_few_operators_in_a_small_batch(form, backend, most, images, texts):
    """At a hundred texts the number of operators is the time: 118 and 98 in the plain dense forms."""
    image, text = (torch.randn(images, texts, 32, requires_grad=True) for _ in range(2))
    scale = torch.tensor(10.0, requires_grad=True)
    with Dispatches() as count:
        gradients(BetaCALLoss(form, backend=backend)(image, text, scale), image, text, scale)
    assert len(count.operators) <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_allocates_little_but_gradients(form, dtype):
    """Scratch is reused, so that new memory of the inputs' size is the gradients, those of small 16-bit inputs in
    float32 too, and the exponentials that are kept."""
    image, text = (torch.randn(64, 4, 128, requires_grad=True, dtype=dtype) for _ in range(2))
    loss = BetaCALLoss(form, backend=Blockwise(64, 64))
    gradients(loss(image, text, 10.0), image, text)
    with Dispatches(image.nbytes // 2) as count:
        gradients(loss(image, text, 10.0), image, text)
    assert count.allocations == {"ce": 3, "bce": 2}[form] + (2 if dtype == torch.bfloat16 else 0)


def test_module_copies_and_learns_beta():
    loss = BetaCALLoss("bce", beta=nn.Parameter(torch.tensor(0.5)))
    assert [name for name, _ in loss.named_parameters()] == ["beta"]
    assert "beta" in BetaCALLoss(beta=torch.tensor(0.5)).state_dict()
    copied = copy.deepcopy(loss).to(DEVICE)
    b = batch(dtype=torch.float32)
    copied(b.image, b.text, b.scale).backward()
    assert copied.beta.grad is not None and loss.beta.grad is None
    assert "form='bce'" in repr(loss)


def test_scalars_in_a_box():
    """Scale and bias may be one-element tensors, as in SigLIP's models."""
    b = batch()
    box = torch.full((1,), 9.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    loss = beta_cal_bce_loss(b.image, b.text, box, logit_bias=-box)
    torch.testing.assert_close(loss, beta_cal_bce_loss(b.image, b.text, 9.0, logit_bias=-9.0))
    assert torch.autograd.grad(loss, box)[0].shape == (1,)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_graph_captures_forward_and_backward(form):
    """A CUDA graph of a whole call writes the same gradients, to the last bit."""
    image, text = (torch.randn(64, 36, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    scale = torch.tensor(10.0, device=DEVICE, requires_grad=True)
    leaves, loss = (image, text, scale), BetaCALLoss(form, gather=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss(*leaves).backward()
    for leaf in leaves:
        leaf.grad.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(leaf.grad, truth) for leaf, truth in zip(leaves, expected, strict=True))
