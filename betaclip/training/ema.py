"""An exponential moving average (EMA) of the weights in training, kept beside them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from betaclip.training.parallel import by_kind


class WeightAverage:
    """The average of the parameters that require a gradient; a frozen one is its own average.

    PyTorch's ``AveragedModel`` would keep a second model, which a model sharded by ``fully_shard`` cannot have. Here
    each tensor of the average lies beside its parameter, sharded alike, and takes its place where the model is to
    compute with the average.

    Args:
        model: as it is trained: on its device, and sharded.
        decay: what remains of the average in each update; the rest comes from the weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._weights.items()}
        self._average_into = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Take the weights after one more update into the average."""
        # PyTorch does not mix sharded tensors and others in one list.
        for average, weights in zip(by_kind(self._average.values()), by_kind(self._weights.values()), strict=True):
            self._average_into(average, weights, None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the averages for weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name, unsharded and on the CPU. All ranks must call; the first rank has all."""
        with self.applied():
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state: dict[str, Any] = get_model_state_dict(self._model, options=options)
            return {name: state[name].clone() for name in self._weights if name in state}

    def restore(self, state: dict[str, Any]) -> None:
        """Load the averages from a state of the whole model. All ranks must call with the same."""
        with self.applied():
            set_model_state_dict(self._model, state, options=StateDictOptions(full_state_dict=True))

    @torch.no_grad()
    def _swap(self) -> None:
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # copies of the weights that a forward without a backward has left
        for name, weight in self._weights.items():
            before = weight.clone()
            weight.copy_(self._average[name])
            self._average[name].copy_(before)
