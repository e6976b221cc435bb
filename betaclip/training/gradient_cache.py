"""Gradient caching (arXiv 2101.06983): one loss over a batch that does not fit, in the memory of one micro-batch.

A contrastive loss needs the embeddings of the whole batch, but the towers need only a micro-batch at a time: encode all
micro-batches without a graph, compute the loss and its gradients with respect to the embeddings, then encode each
micro-batch again, with a graph and the random numbers of the first time, and backpropagate its part of those gradients.
The gradients are those of the whole batch in one piece, to rounding, for one more forward of the towers.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

MicroBatch = TypeVar("MicroBatch")


def cached_backward(
    forward: Callable[[MicroBatch], Mapping[str, Tensor]],
    micro_batches: Sequence[MicroBatch],
    loss: Callable[[dict[str, Tensor]], Tensor],
    *,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """Backpropagate the loss of all micro-batches as one batch. Equivalent to:

        value = loss(forward(everything))
        value.backward()
        return value.detach()

    in the memory of one micro-batch's graph, the outputs of all, and the loss's own graph.

    Args:
        forward: returns tensors by name for one micro-batch. Their first dimension is the batch; a tensor without
            dimensions (an inverse temperature) does not depend on the micro-batch. It is called twice for each
            micro-batch, the first time without gradients.
        micro_batches: at least one, in any form that ``forward`` takes.
        loss: () from the outputs of all micro-batches, concatenated. It may span all ranks of a process group.
        no_sync: the context for all micro-batches but the last, in which gradients are not yet reduced over ranks:
            ``DistributedDataParallel.no_sync``.

    Returns:
        () the loss, detached.

    Raises:
        ValueError: no micro-batch.
    """
    if not micro_batches:
        raise ValueError("micro_batches: expected at least one, got none")
    if len(micro_batches) == 1:
        value = loss(dict(forward(micro_batches[0])))
        value.backward()
        return value.detach()
    states, outputs = [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            states.append(_random_state())
            outputs.append(forward(micro_batch))
    torch.clear_autocast_cache()  # weights cast without a graph would get no gradient in the second pass
    whole = {name: _join([out[name] for out in outputs]) for name in outputs[0]}
    rows = {name: [len(out[name]) for out in outputs] for name in whole if whole[name].dim()}
    outputs.clear()
    value = loss(whole)
    value.backward()
    gradients = {name: t.grad for name, t in whole.items() if t.grad is not None}
    parts = {name: g.split(rows[name]) if g.dim() else None for name, g in gradients.items()}
    whole.clear()
    after = _random_state()
    for i, micro_batch in enumerate(micro_batches):
        last = i + 1 == len(micro_batches)
        with nullcontext() if last else no_sync():
            _set_random_state(states[i])
            out = forward(micro_batch)
            # A tensor without dimensions counts once: in the last pass, where DistributedDataParallel reduces.
            wanted = {
                name: gradients[name] if part is None else part[i]
                for name, part in parts.items()
                if out[name].requires_grad and (last or part is not None)
            }
            torch.autograd.backward([out[name] for name in wanted], list(wanted.values()))
    _set_random_state(after)
    return value.detach()


def _join(parts: list[Tensor]) -> Tensor:
    """A leaf: the rows of all micro-batches, or the tensor that is the same in all."""
    whole = torch.cat(parts) if parts[0].dim() else parts[0].clone()
    return whole.requires_grad_(whole.is_floating_point())


# The CPU generator's, and the current GPU's if there is one in use.
_State = tuple[Tensor, Tensor | None]


def _random_state() -> _State:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_state(state: _State) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
