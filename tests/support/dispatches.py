"""The operators of PyTorch that run in a block of code, and how often they allocate much."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ONLY_METADATA = ("empty", "new_empty", "empty_like", "detach", "_unsafe_view")


class Dispatches(TorchDispatchMode):
    """operators: all that ran, views included. allocations: how many results are new memory of at least ``nbytes``."""

    def __init__(self, nbytes: int = 2**62) -> None:
        super().__init__()
        self.nbytes, self.allocations = nbytes, 0
        self.operators: list[OpOverload] = []

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.append(func)
        if self.nbytes < 2**62:
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            made = {t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)}
            self.allocations += sum(s.nbytes() >= self.nbytes and s.data_ptr() not in given for s in made)
        return out

    @property
    def names(self) -> Counter[str]:
        """How often each operator ran, by names such as aten.addmm.out."""
        return Counter(map(str, self.operators))

    @property
    def launches(self) -> list[str]:
        """The operators that compute, as opposed to views and allocations; on a GPU each launches a kernel or more."""
        names = [op.overloadpacket.__name__ for op in self.operators if not op.is_view]
        return [name for name in names if name not in _ONLY_METADATA]
