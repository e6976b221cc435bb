"""How much memory the largest tensor of a computation takes, how often it allocates much, and its dispatches."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from betaclip.kernels.memory import forget


class LargestTensor(TorchDispatchMode):
    """The most elements that the storage of any operator's result has."""

    numel = 0

    def __enter__(self) -> Any:
        forget()  # what is kept from earlier calls may be larger
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


class Dispatches(TorchDispatchMode):
    """How many operators run, views included, and how many results are new memory of at least ``nbytes``."""

    def __init__(self, nbytes: int = 2**62) -> None:
        super().__init__()
        self.nbytes, self.operators, self.allocations = nbytes, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = {t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)}
        self.allocations += sum(s.nbytes() >= self.nbytes and s.data_ptr() not in given for s in made)
        return out
