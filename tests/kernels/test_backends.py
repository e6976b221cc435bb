"""The choice of backends, and the count of those that ran."""

import pytest
import torch
from support.dispatches import Dispatches
from torch._subclasses.fake_tensor import FakeTensorMode

from betaclip import BetaCALLoss, ClipLoss, SigLipLoss, TextConditionedPool, backend_runs
from betaclip.kernels.backends import always_supported, resolve, run_operator
from betaclip.kernels.similarity import similarity_logsumexp, similarity_softplus

TABLE = {"triton": lambda *_: [], "blockwise": always_supported, "reference": always_supported}
WITHOUT_TRITON = TABLE | {"triton": lambda *_: ["float64 runs only in the interpreter"]}


@pytest.fixture
def on_gpu():
    """A tensor that says that it is on a GPU, without one."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(3, 2, device="cuda")


@pytest.fixture(autouse=True)
def _default_backends(monkeypatch):
    monkeypatch.delenv("BETACLIP_BACKEND", raising=False)


def test_strict_refuses_a_slow_path_on_a_gpu(on_gpu, monkeypatch):
    assert resolve("op", "auto", TABLE, on_gpu, strict=True) == "triton"
    assert resolve("op", "auto", WITHOUT_TRITON, on_gpu) == "blockwise"
    with pytest.raises(NotImplementedError) as refused:
        resolve("op", "auto", WITHOUT_TRITON, on_gpu, strict=True)
    assert str(refused.value).splitlines() == [
        "op: no backend can serve these tensors:",
        "  triton: float64 runs only in the interpreter",
        "  blockwise: has no fused kernel, and strict=True",
        "  reference: has no fused kernel, and strict=True",
    ]
    assert resolve("op", "blockwise", WITHOUT_TRITON, on_gpu, strict=True) == "blockwise"  # a name is a name
    monkeypatch.setenv("BETACLIP_BACKEND", "blockwise")
    with pytest.raises(NotImplementedError, match="blockwise: has no fused kernel, and strict=True"):
        resolve("op", "auto", TABLE, on_gpu, strict=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_strict_on_the_cpu(device):
    assert resolve("op", "auto", WITHOUT_TRITON, torch.empty(3, 2, device=device), strict=True) == "blockwise"


@pytest.mark.parametrize("loss", [BetaCALLoss(strict=True), BetaCALLoss("bce", strict=True)])
def test_losses_are_strict(loss, monkeypatch):
    """As if the CPU were a device that fused kernels serve."""
    embeds, asked = torch.ones(2, 2, 8), []

    def refuse(operation, requested, *_, strict):
        asked.append((operation, strict))
        raise NotImplementedError

    monkeypatch.setattr("betaclip.kernels.similarity.operators.resolve", refuse)
    pairs = [(kind(strict=True), embeds[:, 0]) for kind in (ClipLoss, SigLipLoss)]
    for strict_loss, given in ((loss, embeds), *pairs):
        with pytest.raises(NotImplementedError):
            strict_loss(given, given, 10.0)
    for operation in (similarity_logsumexp, similarity_softplus):
        with pytest.raises(NotImplementedError):
            operation(embeds[0], embeds[0], torch.tensor(1.0), strict=True)
    assert all(strict for _, strict in asked) and len(asked) == 5


@pytest.mark.parametrize("backend", ["blockwise", "reference", "triton"])
def test_counts_what_ran(backend):
    x = torch.ones(2, 2, 8, device="cuda" if torch.cuda.is_available() else "cpu", requires_grad=True)
    before = backend_runs()
    BetaCALLoss("ce", backend=backend)(x, x, 10.0).backward()
    assert backend_runs() - before == {("similarity_logsumexp", backend): 2}
    before = backend_runs()
    BetaCALLoss("bce", backend=backend)(x, x, 10.0).backward()
    # Its gradient is formed in the forward, but on the CPU "blockwise" keeps the cosines of batches so small as this.
    formed_later = backend == "blockwise" and not x.is_cuda
    assert backend_runs() - before == {("similarity_softplus", backend): 2 if formed_later else 1}
    before = backend_runs()
    BetaCALLoss("bce", backend=backend, reduction="none")(x, x, 10.0).sum().backward()
    assert backend_runs() - before == {("similarity_softplus", backend): 2}


def test_counts_within_a_graph():
    x = torch.ones(2, 8, requires_grad=True)
    compiled = torch.compile(ClipLoss(), fullgraph=True, backend="eager")
    compiled(x, x, 10.0)
    before = backend_runs()
    compiled(x, x, 10.0).backward()
    assert backend_runs() - before == {("similarity_logsumexp", "blockwise"): 2}


def test_counts_what_stands_in_for_a_kernel():
    """Nothing is launched for an empty side, whatever was named."""
    before = backend_runs()
    similarity_logsumexp(torch.ones(0, 8), torch.ones(3, 8), torch.tensor(1.0), backend="blockwise")
    assert backend_runs() - before == {("similarity_logsumexp", "reference"): 1}


@pytest.mark.parametrize("backend, runs", [("folded", 2), ("sdpa", 1), ("reference", 1)])
def test_counts_pooling(backend, runs):
    patches, texts = torch.ones(2, 5, 64), torch.ones(2, 3, 64)
    pool = TextConditionedPool(64, backend=backend)
    before = backend_runs()
    pool(patches, texts).sum().backward()
    assert backend_runs() - before == {("attention_pool", backend): runs}


def test_an_operator_runs_where_something_else_sees_it(on_gpu):
    """A mode, a subclass, a second derivative; else its function, and always for a backend that is an object."""

    def run(x: torch.Tensor, backend: object = "folded") -> str:
        return run_operator(lambda *_: "operator", lambda *_: "function", x, backend)

    x = torch.ones(2)
    assert run(x) == "operator"  # gradients are enabled
    with torch.no_grad():
        assert run(x) == "function" and run(on_gpu) == "operator" and run(on_gpu, object()) == "function"
        with Dispatches():
            assert run(x) == "operator"
