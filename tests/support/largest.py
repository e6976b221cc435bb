"""How much memory the largest tensor of a computation takes."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
