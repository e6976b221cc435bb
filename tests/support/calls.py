"""Calls of PyTorch's operators, counted by name."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class CountedCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))
