"""Norms of any size; and no call touches the process's or the thread's settings: precisions, autocast, warnings."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from betaclip import BetaCALLoss, TextConditionedPool
from betaclip.kernels.attention_pool.folded import Eager
from betaclip.kernels.precision import inverse_norms, inverse_row_norms, row_norms, unit_rows
from betaclip.kernels.similarity.blockwise import Blockwise

SETTINGS = ("none", "ieee", "bf16")


def loss(form: str, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward. Backends that are objects run where a dispatch mode can see them."""
    image, text = (torch.randn(6, 3, 16).to(dtype).requires_grad_() for _ in range(2))
    module = BetaCALLoss(form, backend=Blockwise(5, 7))
    return lambda: module(image, text, 20.0).backward()


def pool(dtype: torch.dtype) -> Callable[[], None]:
    module = TextConditionedPool(16, 2).to(dtype)
    module.backend = Eager()
    patches, texts = torch.randn(2, 5, 16).to(dtype), torch.randn(2, 3, 16).to(dtype)
    return lambda: module(patches, texts).sum().backward()


def calls() -> list[Callable[[], None]]:
    return [
        call
        for dtype in (torch.float32, torch.bfloat16)
        for call in (loss("ce", dtype), loss("bce", dtype), pool(dtype))
    ]


def process_state() -> tuple[Any, ...]:
    return (
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cuda.matmul.allow_tf32,
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        tuple(warnings.filters),
    )


@pytest.fixture(params=SETTINGS)
def setting(request):
    """A precision of the user's own for float32 products on the CPU."""
    torch.backends.mkldnn.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.mkldnn.matmul.fp32_precision = "none"


class StateInside(TorchDispatchMode):
    """Collects the state of the process as every operator finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.states: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.states.add(process_state()[:3])
        return func(*args, **(kwargs or {}))


def test_nothing_changes_during_a_call(setting):
    """The legacy TF32 switch can be read inside, which raises where precisions were set apart from it."""
    before = process_state()[:3]
    for call in calls():
        with StateInside() as mode:
            call()
        assert mode.states == {before}
    if setting == "none":
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("threads", [4, 8])
def test_threads_leave_the_process_as_it_was(setting, threads):
    before, failures, ready = process_state(), [], threading.Barrier(threads)

    def work() -> None:
        try:
            own = calls()
            ready.wait()
            for call in own * 2:
                call()
        except Exception as error:
            failures.append(error)
            raise

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    assert process_state() == before


class Fails(RuntimeError):
    pass


class FailsInside(TorchDispatchMode):
    """Fails at the operator number ``at``."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise Fails
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "make", [lambda: loss("ce", torch.bfloat16), lambda: pool(torch.bfloat16)], ids=["loss", "pool"]
)
def test_a_call_that_fails_leaves_nothing_behind(make, setting):
    """Nor does it keep the scratch, which the next call needs."""
    before = process_state()
    mode = FailsInside(0)
    with mode:
        make()()
    for at in range(1, mode.count, 23):
        with pytest.raises(Fails), FailsInside(at):
            make()()
        assert process_state() == before
        make()()


@pytest.mark.parametrize("precision, dtype", [("highest", torch.float32), ("medium", torch.float64)])
def test_products_within_images_follow_no_setting(precision, dtype):
    """They are float64, which nothing rounds, where float32 ones would be; those between images may be."""
    before, dtypes = torch.get_float32_matmul_precision(), set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm_):
                dtypes.update(a.dtype for a in args if isinstance(a, torch.Tensor))
            return func(*args, **(kwargs or {}))

    torch.set_float32_matmul_precision(precision)
    try:
        with Products():
            loss("ce", torch.float32)()
    finally:
        torch.set_float32_matmul_precision(before)
    assert dtypes == {dtype}


@pytest.mark.parametrize(
    "dtype, value",
    [
        (torch.float32, 3e38),
        (torch.float32, 1e20),
        (torch.bfloat16, 1e38),
        (torch.float64, 1e300),
        (torch.float16, 6e4),
    ],
)
def test_norms_whose_squares_overflow(dtype, value):
    """Beside rows that are usual, zero, or not finite."""
    x = torch.tensor([[value, 0, -value, value], [3, 4, 0, 0], [0] * 4, [torch.inf, 1, 1, 1]], dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    norms = row_norms(x, wide)
    truth = torch.tensor([float(x[0, 0].double()) * 3**0.5, 5, 0, torch.inf], dtype=torch.float64)
    torch.testing.assert_close(norms.double(), truth.to(wide).double())
    inverse, _ = inverse_row_norms(x, wide)
    torch.testing.assert_close(inverse[0].double(), 1 / truth[0], rtol=1e-4, atol=0)  # float32's may be subnormal
    assert inverse[1].item() == pytest.approx(0.2) and inverse[2].isinf() and inverse[3].isnan()
    out = torch.empty(4, dtype=wide)
    inverse_norms(x, 1e-12, out)
    torch.testing.assert_close(out, norms.reciprocal().masked_fill(norms == 0, 0))
    leaf = x[:3].clone().requires_grad_()
    unit = unit_rows(leaf)
    third = 3**-0.5
    expected = torch.tensor([[third, 0, -third, third], [0.6, 0.8, 0, 0], [0] * 4], dtype=dtype)
    torch.testing.assert_close(unit, expected)
    (gradient,) = torch.autograd.grad(unit[1, 0], leaf)
    torch.testing.assert_close(gradient[1], torch.tensor([0.128, -0.096, 0, 0], dtype=dtype), atol=1e-2, rtol=1e-2)
    assert not gradient[::2].any()
