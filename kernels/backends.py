"""Which backend serves which tensors: one rule for every operation.

An operation lists its backends as a table ``{name: why_not}``, where ``why_not(*tensors)`` returns the
reasons for which that backend cannot serve these tensors (an empty list: it can). Only metadata may be
read (device, dtype, shape), so that resolving works under ``torch.compile`` and never synchronises.
"""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

WhyNot = Callable[..., list[str]]

# Of all operations: BETACLIP_BACKEND may name one that an operation does not have.
NAMES = ("triton", "cuda", "blockwise", "folded", "sdpa", "reference")

# What keeps "auto" from choosing a backend that could serve: it is for those who ask for it by name.
ONLY_BY_NAME: Mapping[str, WhyNot] = {
    "triton": lambda x, *others: [] if x.is_cuda else ["its interpreter is for tests and is never chosen by 'auto'"],
    "cuda": lambda *tensors: ["never chosen by 'auto' until a recorded run on a GPU shows it correct and faster"],
}


def resolve(operation: str, requested: str, table: Mapping[str, WhyNot], *tensors: Tensor) -> str:
    """The name of the backend that runs ``operation`` on ``tensors``.

    ``"auto"`` takes the first of the table that can serve; the environment variable ``BETACLIP_BACKEND``
    stands in for ``"auto"``, in operations that have a backend of its name. A backend asked for by name is never
    replaced by another.

    Raises:
        ValueError: no backend of that name.
        NotImplementedError: the named backend (or, for ``"auto"``, every backend) cannot serve the
            tensors; the message lists the reasons.
    """
    source = "backend"
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
        if requested == "auto" and not reasons and name in ONLY_BY_NAME:
            reasons = ONLY_BY_NAME[name](*tensors)
        if not reasons:
            return name
        refusals[name] = reasons
    lines = "\n".join(f"  {name}: {'; '.join(reasons)}" for name, reasons in refusals.items())
    raise NotImplementedError(f"{operation}: no backend can serve these tensors:\n{lines}")


def without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's implementation, run as if autocast were off: it chooses its own precisions."""

    @functools.wraps(implementation)
    def run(x: Tensor, *args: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return implementation(x, *args)

    return run
