"""Names and choice of backends, by one rule for every operation, and helpers that all operators share.

An operation lists its backends in a table ``{name: not_supported_reasons}``. The function
``not_supported_reasons(*tensors)`` returns the reasons why that backend cannot serve these tensors; an empty list means
that it can. It may read only metadata (device, dtype, shape), so that the choice works under ``torch.compile`` and
never synchronises. The protocols that backends implement are ``similarity.contract.SimilarityBackend`` and
``attention_pool.folded.Attention``.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from betaclip.kernels.precision import autocast_off

NotSupportedReasons = Callable[..., list[str]]

# The backends of all operations. BETACLIP_BACKEND accepts each of them, although some operations lack it.
NAMES = ("triton", "cuda", "blockwise", "folded", "sdpa", "reference")

FUSED = ("triton", "cuda")

# Why "auto" passes over a backend that could serve the tensors, so that it runs only when it is named.
NOT_AUTOMATIC_REASONS: Mapping[str, NotSupportedReasons] = {
    "triton": lambda x, *others: [] if x.is_cuda else ["its interpreter is for tests and is never chosen by 'auto'"],
    "cuda": lambda *tensors: ["never chosen by 'auto': so far it has run on two GPUs, 1 to 13 % faster than 'triton'"],
}


_runs: Counter[tuple[str, str]] = Counter()


def backend_runs() -> Counter[tuple[str, str]]:
    """How often each backend has run in this process, by (operation, backend); forward and backward count alike.

    A test that a fast path was taken compares two of these. Runs within a graph of torch.compile count too, except
    those of pooling's backends ``"sdpa"`` and ``"reference"``, which are PyTorch's own operators. Objects in place of a
    backend's name do not count.

    Example:
        >>> import torch
        >>> from betaclip import ClipLoss, backend_runs
        >>> before = backend_runs()
        >>> loss = ClipLoss()(torch.eye(4), torch.eye(4, requires_grad=True), logit_scale=10.0)
        >>> loss.backward()
        >>> dict(backend_runs() - before)
        {('similarity_logsumexp', 'blockwise'): 2}
    """
    return _runs.copy()


def count_run(operation: str, backend: str) -> None:
    _runs[operation, backend] += 1


def resolve(
    operation: str,
    requested: str,
    table: Mapping[str, NotSupportedReasons],
    *tensors: Tensor,
    strict: bool = False,
) -> str:
    """The name of the backend that runs ``operation`` on ``tensors``.

    ``"auto"`` takes the first backend of the table that can serve. The environment variable ``BETACLIP_BACKEND``
    replaces ``"auto"`` in operations that have a backend of that name. A backend requested by name is never replaced
    by another. With ``strict``, ``"auto"`` takes none but fused kernels, except for tensors on the CPU, where
    everything runs in plain PyTorch.

    Raises:
        ValueError: there is no backend of that name.
        NotImplementedError: the named backend (or, for ``"auto"``, every backend) cannot serve the
            tensors; the message lists the reasons.
    """
    source = "backend"
    strict = strict and requested == "auto" and tensors[0].device.type not in ("cpu", "meta")
    if requested == "auto":
        source, requested = "BETACLIP_BACKEND", os.environ.get("BETACLIP_BACKEND", "auto")
        if requested in NAMES and requested not in table:
            requested = "auto"
    if requested != "auto" and requested not in table:
        names = ", ".join(repr(name) for name in ("auto", *table))
        raise ValueError(f"{source}: expected one of {names} for {operation}, got {requested!r}")
    candidates = list(table) if requested == "auto" else [requested]
    refusals = {}
    for name in candidates:
        reasons = table[name](*tensors)
        if requested == "auto" and not reasons and name in NOT_AUTOMATIC_REASONS:
            reasons = NOT_AUTOMATIC_REASONS[name](*tensors)
        if strict and name not in FUSED:
            reasons = [*reasons, "has no fused kernel, and strict=True"]
        if not reasons:
            return name
        refusals[name] = reasons
    lines = "\n".join(f"  {name}: {'; '.join(reasons)}" for name, reasons in refusals.items())
    raise NotImplementedError(f"{operation}: no backend can serve these tensors:\n{lines}")


def always_supported(*tensors: Tensor) -> list[str]:
    """The ``not_supported_reasons`` of backends that need only PyTorch."""
    return []


def expect(name: str, tensor: Tensor | None, like: str = "", **expected: Any) -> None:
    """Raise a ValueError unless the attributes of ``tensor`` are the ``expected`` ones; None is accepted.

    like: a reason for the message, such as "as in x".
    """
    for attribute, value in expected.items():
        if tensor is None or (actual := getattr(tensor, attribute)) == value:
            continue
        if attribute == "shape":
            value, actual = (tuple(shape) for shape in (value, actual))
        raise ValueError(f"{name}: expected {attribute} {value}{like and ' ' + like}, got {actual}")


def without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Run an operator's implementation with autocast off, because it chooses its own precisions."""

    @functools.wraps(implementation)
    def run(x: Tensor, *args: Any) -> Any:
        with autocast_off(x.device.type):
            return implementation(x, *args)

    return run


def define_operator(name: str, function: Callable[..., Any], arguments: str, results: int) -> Any:
    """Register ``function`` as the operator ``betaclip::name``.

    Args:
        name: the operator's name.
        function: its implementation.
        arguments: the function's arguments, as in a schema of PyTorch.
        results: number of tensors that it returns.
    """
    schema = f"({arguments}) -> ({', '.join(['Tensor'] * results)})"
    return torch.library.custom_op(f"betaclip::{name}", function, mutates_args=(), schema=schema)


def runs_at_once(x: Tensor) -> bool:
    """Whether an operation on x is computed now, and nothing else sees it: no compiler, tracer, mode or subclass."""
    return (
        x.device.type != "meta"
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and torch._C._get_tracing_state() is None
        and _get_current_dispatch_mode() is None
    )


def run_operator(operator: Callable[..., Any], function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the ``operator``, or its ``function`` directly where that comes to the same: an operator of a library costs
    the host ten calls of PyTorch's own. The first argument is a tensor, the last the backend.

    A backend that is an object cannot be an operator's argument.
    """
    if isinstance(arguments[-1], str) and (torch.is_grad_enabled() or not runs_at_once(arguments[0])):
        return operator(*arguments)
    if torch.is_grad_enabled():  # only in a backward with create_graph=True; a forward runs without
        refuse_second_derivative()
    return function(*arguments)


def needed_gradients(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The result of an autograd.Function's backward, from the gradients of its first inputs.

    Gradients that are not needed become None, as do those of all further inputs.
    """
    # The lengths are made equal, because Dynamo of torch 2.9 takes strict=False for strict=True.
    needs = ctx.needs_input_grad[: len(gradients)]
    needed = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return (*needed, *[None] * (len(ctx.needs_input_grad) - len(needed)))


def refuse_second_derivative(*_: Any) -> NoReturn:
    """The autograd formula of every backward operator."""
    raise RuntimeError("betaclip's operations can be differentiated once, not twice (create_graph=True)")
