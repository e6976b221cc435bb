"""Counts of the operators that a function runs."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_ONLY_METADATA = ("empty", "new_empty", "empty_like", "detach", "_unsafe_view")


class Launches(TorchDispatchMode):
    """Counts operators that compute, as opposed to views and allocations; on a GPU each launches a kernel or more."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _ONLY_METADATA:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches(function: Callable[[], object]) -> list[str]:
    """The names of the operators that compute."""
    with Launches() as counted:
        function()
    return counted.names
