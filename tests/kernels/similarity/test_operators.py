"""The similarity operators as operators: gradients that are wanted, layouts, compilation, refusals."""

import pytest
import torch
from support.precision import HALF, usual, widest
from support.similarity import (
    CHECKS,
    DEVICE,
    FAST,
    dense_logsumexp,
    operands,
    require,
    small,
)
from torch.utils.checkpoint import checkpoint

from betaclip.kernels.architecture import Tile
from betaclip.kernels.similarity.blockwise import Blockwise
from betaclip.kernels.similarity.functional import similarity_logsumexp, similarity_softplus
from betaclip.kernels.similarity.operators import (
    BACKENDS,
    SoftplusSums,
    logsumexp,
    logsumexp_backward,
    softplus,
    softplus_backward,
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_subset_of_gradients(backend):
    x, y, x_group, y_group = operands(33, 50, 16, widest(backend))
    require(backend, x.dtype)
    inputs = {"x": x, "y": y} | {
        name: torch.tensor(v, dtype=torch.float64, device=DEVICE) for name, v in (("scale", 6.0), ("bias", -1.0))
    }

    def loss(x, y, scale, bias):
        lse_x, lse_y = similarity_logsumexp(x, y, scale, x_group, y_group, backend=small(backend))
        rows = similarity_softplus(x, y, scale, bias, x_group, y_group, backend=small(backend))
        parts = (lse_x[x_group >= 0] * 1.5, lse_y[y_group >= 0] * 0.5, rows * 0.1)
        return sum(part.sum() for part in parts)

    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    everything = dict(zip(leaves, torch.autograd.grad(loss(**leaves), list(leaves.values())), strict=True))
    for needed in ({"x"}, {"y"}, {"scale"}, {"x", "scale"}, {"y", "scale"}, {"bias"}):
        some = {name: value.clone().requires_grad_(name in needed) for name, value in inputs.items()}
        loss(**some).backward()
        assert {name for name, value in some.items() if value.grad is not None} == needed
        for name in needed:
            torch.testing.assert_close(some[name].grad, everything[name])


@pytest.mark.parametrize("backend", FAST)
def test_noncontiguous(backend):
    """Strided rows, transposed storage, rows expanded from one, and expanded incoming gradients."""
    scale = torch.tensor(4.0, dtype=torch.float64, device=DEVICE)
    dtype = widest(backend)
    wide = torch.randn(40, 60, device=DEVICE).to(dtype)
    views = {
        "strided": (wide[::2, 3:27], wide[1::2, 5:29]),
        "transposed": (wide[:24].T, wide[4:28].T),
        "expanded": (wide[:1, :24].expand(21, 24), wide[:30, :24]),
        "rows apart": (wide[:24, :32].repeat(1, 2)[:, :32], wide[:30, :32].contiguous()),  # kernels read both in place
    }
    require(backend, dtype)
    for name, pair in views.items():
        x, y = (t.detach().requires_grad_() for t in pair)
        truth = [t.detach().double().contiguous().requires_grad_() for t in pair]
        ours = torch.autograd.grad(
            sum(t.sum() for t in similarity_logsumexp(x, y, scale, backend=small(backend))), (x, y)
        )
        dense = torch.autograd.grad(dense_logsumexp(*truth, scale, None, None).sum(), truth)
        for a, b in zip(ours, dense, strict=True):
            tolerance = {} if dtype == b.dtype else {"rtol": 0, "atol": 2e-3 * b.abs().max().item()}
            torch.testing.assert_close(a, b.to(dtype), **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend):
    x, y, x_group, y_group = operands(75, 64, 32, usual(backend))
    require(backend, x.dtype)
    runs = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        lse_x, lse_y = similarity_logsumexp(
            *leaves, torch.tensor(30.0, device=DEVICE), x_group, y_group, backend=backend
        )
        loss = torch.where(lse_x.isfinite(), lse_x, 0).sum() + torch.where(lse_y.isfinite(), lse_y, 0).sum()
        runs.append([lse_x, lse_y, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("pitch", [2**30, 2**31])
@pytest.mark.parametrize("backend", FAST)
def test_offsets_beyond_int32(backend, pitch):
    """Rows so far apart that a row's offset, or the pitch itself, passes 2^31; only the touched pages exist."""
    rows = 3
    if DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 8 GiB of device memory for the stride alone")
    storage = torch.empty((rows - 1) * pitch + 16, dtype=torch.bfloat16, device=DEVICE)
    far = storage.as_strided((rows, 16), (pitch, 1))
    near = torch.randn(rows, 16, device=DEVICE).to(torch.bfloat16)
    far.copy_(near)
    other = torch.randn(5, 16, device=DEVICE).to(torch.bfloat16)
    scale = torch.tensor(2.0, device=DEVICE)
    for pair, expected in (((far, other), (near, other)), ((other, far), (other, near))):
        ours = similarity_logsumexp(*pair, scale, backend=small(backend))
        truth = similarity_logsumexp(*expected, scale, backend=small(backend))
        torch.testing.assert_close(ours, truth)


def opcheck(operator, *arguments):
    """Check an operator without autograd, which belongs to the functions around it."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments, test_utils=tests)


def opcheck_all(x, y, scale, bias, ids, images, texts_per_image, dtype, backend, dims=()):
    """The four operators, the backward ones with either gradient needed and not."""
    options = (images, texts_per_image, dims, dtype, backend)
    pairs = x.shape[0] * y.shape[0]
    for elements in (0, pairs, 2 * pairs):  # of which the operator makes an output no larger than the matrix
        opcheck(logsumexp, x, y, scale, *ids, elements * scale.itemsize, *options)
    served = images and not dims and x.device.type == "cpu"  # where cosines of whole embeddings are kept
    for elements in (0, pairs) if served else (0,):
        opcheck(softplus, x, y, scale, None, *ids, None, False, False, False, elements * scale.itemsize, *options)
    lse_x, lse_y, cosines, kept = logsumexp(x, y, scale, *ids, pairs * scale.itemsize, *options)
    assert kept.shape == (pairs if backend == "blockwise" else 0,)
    incoming = torch.ones_like(lse_x), torch.ones_like(lse_y)
    for need in ((True, False), (False, True)):
        opcheck(logsumexp_backward, x, y, scale, *ids, lse_x, lse_y, kept, *incoming, cosines, *need, *options)
        forward = (x, y, scale, bias, *ids, incoming[0], True, *need, 0, *options)
        opcheck(softplus, *forward)
        rows, _, *formed, kept_cosines = softplus(*forward)
        for early, dsums in (([], rows), (formed, torch.ones_like(scale))):
            if images or not early:
                backward = (x, y, scale, bias, *ids, early, kept_cosines, dsums, cosines, *need, *options)
                opcheck(softplus_backward, *backward)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_opcheck(backend):
    x, y, x_group, y_group = operands(13, 17, 8)
    scale, bias = (torch.tensor(v, dtype=x.dtype, device=DEVICE) for v in (3.0, -1.0))
    ids = {
        "reference": (x_group.int(), y_group.int(), x_group.int() % 4, y_group.int(), None),
        "blockwise": (None,) * 5,
    }[backend]
    opcheck_all(x, y, scale, bias, ids, 0, 0, x.dtype, backend)


def test_opcheck_in_half_precision(cuda):
    x, y, x_group, y_group = operands(13, 17, 8, torch.float16)
    scale, bias = (torch.tensor(v, device=DEVICE) for v in (3.0, -1.0))
    opcheck_all(x, y, scale, bias, (x_group.int(), y_group.int(), None, None, None), 0, 0, x.dtype, "cuda")


@pytest.mark.parametrize("dtype, ragged, dims", [(torch.float32, False, ()), (torch.bfloat16, True, (8, 13, 24))])
def test_opcheck_with_images(dtype, ragged, dims):
    x, y = (torch.randn(30, 24, device=DEVICE).to(dtype) for _ in range(2))
    scale, bias = (torch.tensor(v, device=DEVICE) for v in (9.0, 1.0))
    image_id = (torch.arange(30, device=DEVICE) // 5).int()
    slots = torch.arange(30, device=DEVICE).view(6, 5) if ragged else None
    opcheck_all(x, y, scale, bias, (image_id, image_id, None, None, slots), 6, 5, dtype, "blockwise", dims)


def test_six_operators():
    """The losses and the public operations run the same ones."""
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("betaclip::")}
    backward = {f"betaclip::{name}_backward" for name in ("similarity_logsumexp", "similarity_softplus")}
    assert {name for name in names if "similarity" in name} == backward | {
        "betaclip::similarity_logsumexp",
        "betaclip::similarity_softplus",
    }
    assert len(names) <= 6


@pytest.mark.parametrize("backend, compiler", [("blockwise", "aot_eager"), ("reference", "eager"), ("cuda", "eager")])
def test_compile(backend, compiler):
    """One graph, and no wrong reuse of it at a second shape. The operators are the same for all backends, so that their
    gradients are traced for one."""

    def loss(x, y, scale, x_group, y_group):
        lse_x, lse_y = similarity_logsumexp(x, y, scale, x_group, y_group, backend=backend)
        rows = similarity_softplus(x, y, scale, None, x_group, y_group, backend=backend)
        return lse_x.clamp_min(-9).sum() + lse_y.clamp_min(-9).sum() + rows.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for n, m in ((12, 20), (18, 31)):
        x, y, x_group, y_group = operands(n, m, 8, widest(backend))
        scale = torch.tensor(3.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
        leaves = [x.requires_grad_(), y.requires_grad_(), scale]
        eager, graph = (f(x, y, scale, x_group, y_group) for f in (loss, compiled))
        torch.testing.assert_close(graph, eager)
        # Gradients in half precision are rounded once more or once less.
        tolerance = {"rtol": 4e-3, "atol": 1e-3} if x.dtype in HALF else {}
        for a, b in zip(torch.autograd.grad(graph, leaves), torch.autograd.grad(eager, leaves), strict=True):
            torch.testing.assert_close(a, b, **tolerance)


def test_compile_takes_the_same_tensor_twice():
    """All pairs of one set of rows, of which each image has several."""
    x, _, image, _ = operands(12, 1, 8)
    scale = torch.tensor(3.0, dtype=x.dtype, device=DEVICE)
    for ids in ((image, image), (image.int(), image.int()), (image.int(),) * 2, (None, None)):
        compiled = torch.compile(similarity_logsumexp, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, x, scale, *ids), similarity_logsumexp(x, x, scale, *ids))


def test_autocast_leaves_precision_alone():
    x, y, x_group, y_group = operands(33, 50, 64, torch.float32)
    scale = torch.tensor(50.0, device=DEVICE)
    plain = similarity_logsumexp(x, y, scale, x_group, y_group)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = similarity_logsumexp(x, y, scale, x_group, y_group)
    assert torch.equal(plain[0], cast[0]) and torch.equal(plain[1], cast[1])


def test_double_backward_raises():
    x, y, _, _ = operands(6, 7, 4, groups=False)
    x.requires_grad_()
    scale = torch.tensor(2.0, dtype=x.dtype, device=DEVICE)
    (dx,) = torch.autograd.grad(similarity_logsumexp(x, y, scale)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        dx.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 3, 4)}, r"x: expected \(rows, D\), got shape \(2, 3, 4\)"),
        (
            {"x": torch.ones(2, 4, dtype=torch.int64)},
            r"x: expected float16, bfloat16, float32 or float64, got torch.int64",
        ),
        ({"y": torch.ones(3, 5)}, r"y: expected D = 4 as in x, got shape \(3, 5\)"),
        ({"y": torch.ones(3, 4, dtype=torch.float64)}, r"y: expected dtype torch.float32 as in x, got torch.float64"),
        ({"y": torch.ones(3, 4, device="meta")}, r"y: expected device cpu as for x, got meta"),
        ({"scale": torch.ones(2)}, r"scale: expected a 0-d floating-point tensor, got torch.float32 \(2,\)"),
        ({"x_group": torch.zeros(3, dtype=torch.int32)}, r"x_group: expected shape \(2,\), got \(3,\)"),
        ({"y_group": torch.zeros(3)}, r"y_group: expected an integer dtype, got torch.float32"),
        ({"backend": "cuda-ng"}, r"backend: expected one of 'auto', .* got 'cuda-ng'"),
    ],
)
@pytest.mark.parametrize("operation", [similarity_logsumexp, similarity_softplus])
def test_rejects(operation, change, message):
    arguments = {"x": torch.ones(2, 4), "y": torch.ones(3, 4), "scale": torch.tensor(1.0)} | change
    with pytest.raises(ValueError, match=message):
        operation(**arguments)


@pytest.mark.parametrize("keep", [-1, True, 1.5, "all"])
def test_rejects_keep(keep):
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=f"keep: expected 'auto' or a number of bytes of at least 0, got {keep!r}"):
        similarity_logsumexp(x, x, torch.tensor(1.0), keep=keep)


def saved_bytes(x: torch.Tensor, y: torch.Tensor, **options) -> int:
    """What autograd keeps between forward and backward, beside the operands."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        similarity_logsumexp(x, y, torch.tensor(2.0, device=DEVICE), **options)
    return sum(t.nbytes for t in saved.values() if t.shape not in (x.shape, y.shape))


def test_keeps_what_is_allowed_and_only_for_a_backward():
    n, m = 300, 200
    x, y = (torch.randn(rows, 8, device=DEVICE) for rows in (n, m))
    assert saved_bytes(x, y, backend="blockwise") == 0
    x.requires_grad_()
    few, everything = 4 * (n + m + 1), 4 * n * m
    for keep, most in ((0, few), (5000, few + 5000), (10**9, few + everything)):
        assert most - few <= saved_bytes(x, y, backend="blockwise", keep=keep) <= most
    assert saved_bytes(x, y, backend="reference", keep=10**9) <= few
    by_default = saved_bytes(x, y, backend="blockwise")
    assert by_default >= everything if DEVICE == "cpu" else by_default <= few
    with torch.no_grad():
        assert saved_bytes(x, y, backend="blockwise") == 0


def test_kept_exponentials_serve_a_backward_again():
    """The backward reads them and writes elsewhere; a checkpoint forms them in its second forward."""
    x, y, x_group, y_group = operands(75, 64, 8, torch.float32)
    x.requires_grad_()

    def loss(x, keep):
        lse_x, lse_y = similarity_logsumexp(
            x, y, torch.tensor(9.0, device=DEVICE), x_group, y_group, backend=small("blockwise"), keep=keep
        )
        return lse_x.clamp_min(-9).sum() + lse_y.clamp_min(-9).square().sum()

    (expected,) = torch.autograd.grad(loss(x, 0), x)
    kept = loss(x, 10**6)
    for retain_graph in (True, False):
        assert torch.equal(torch.autograd.grad(kept, x, retain_graph=retain_graph)[0], expected)
    checkpointed = checkpoint(loss, x, 10**6, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(checkpointed, x)[0], expected)


@pytest.mark.parametrize("images", [0, 5])
def test_early_gradients_are_written_over_when_the_graph_is_freed(images):
    """A backward that may be repeated leaves them as they are; all give the same gradients."""
    x, y, *_ = operands(15, 15, 8, torch.float64)
    x, y = x.requires_grad_(), y.requires_grad_()
    image_id = torch.arange(15, device=DEVICE, dtype=torch.int32) // 3
    scale, bias = (torch.tensor(v, dtype=torch.float64, device=DEVICE, requires_grad=True) for v in (6.0, -1.0))
    saved = []

    def loss():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            total, cosines = SoftplusSums.apply(
                x, y, scale, bias, image_id, None, None, None, None, None, True, True,
                images, 3 * (images > 0), (), torch.float64, Blockwise(4, 6, max_matrix=0),
            )  # fmt: skip
            return 3 * total + cosines.square().sum()

    leaves, value = (x, y, scale, bias), loss()
    first, again = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
    places = {t.data_ptr() for t in saved}
    last = torch.autograd.grad(value, leaves)
    for a, b, c in zip(first, again, last, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
    assert not {t.data_ptr() for t in (*first[:2], *again[:2])} & places
    assert {t.data_ptr() for t in last[:2]} <= places


def test_named_backend_that_cannot_serve_says_why(interpreter_as_it_is):
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"similarity_logsumexp: .*\n  triton: .*"):
        similarity_logsumexp(x, x, torch.tensor(1.0), backend="triton")


def test_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("BETACLIP_BACKEND", "nonsense")
    x = torch.ones(2, 8, device=DEVICE)
    with pytest.raises(ValueError, match="'nonsense'"):
        similarity_logsumexp(x, x, torch.tensor(1.0, device=DEVICE))
    similarity_logsumexp(x, x, torch.tensor(1.0, device=DEVICE), backend="reference")  # a name is a name


@CHECKS
def test_chunks_of_whole_tiles(check):
    """Chunks of 40 rows would end within a tile, whose other rows and columns must count once."""
    require("triton", torch.bfloat16)
    from betaclip.kernels.similarity.triton_kernels import Triton

    check(Triton(chunk_rows=40), torch.bfloat16, 20.0, 101, 75, 32, True)


@pytest.mark.skipif(DEVICE == "cuda", reason="exercises the descriptor path in Triton's interpreter")
@CHECKS
def test_tensor_descriptors(check, monkeypatch):
    """The loads of sm_90's tiles, at a depth and sizes that end within a block."""
    tensor_descriptor = pytest.importorskip("triton.tools.tensor_descriptor")
    from betaclip.kernels.similarity.triton_kernels import Triton

    made = []
    make = tensor_descriptor.TensorDescriptor
    monkeypatch.setattr(tensor_descriptor, "TensorDescriptor", lambda *args: made.append(args) or make(*args))
    require("triton", torch.bfloat16)
    check(Triton(Tile(32, 16, 32, 4, 1, tma=True)), torch.bfloat16, 20.0, 101, 75, 40, True)
    assert made
