"""Gradient caching (arXiv 2101.06983): one loss over a batch that does not fit, its gradients chunk by chunk.

A contrastive loss needs the embeddings of the whole batch, but the towers need only a chunk at a time: encode all
chunks without a graph, take the loss and its gradients by the embeddings, then encode each chunk again, with a graph
and the random numbers of the first time, and send its part of those gradients back. The gradients are those of the
whole batch in one piece, to rounding, for one more forward of the towers.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk")


def cached_backward(
    forward: Callable[[Chunk], Mapping[str, Tensor]],
    chunks: Sequence[Chunk],
    loss: Callable[[dict[str, Tensor]], Tensor],
    *,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """Backpropagate the loss of all chunks as one batch. Equivalent to:

        value = loss(forward(everything))
        value.backward()
        return value.detach()

    in the memory of one chunk's graph, the outputs of all, and the loss's own graph.

    Args:
        forward: tensors by name, of one chunk. Rows of the batch are along their first dimension; a tensor without
            dimensions (an inverse temperature) does not depend on the chunk. It is called twice for each chunk, the
            first time without gradients.
        chunks: of the batch, at least one; what they are is ``forward``'s affair.
        loss: () of the outputs of all chunks, concatenated. It may be one over all ranks of a process group.
        no_sync: the context for all chunks but the last, in which gradients are not yet reduced over ranks:
            ``DistributedDataParallel.no_sync``.

    Returns:
        () the loss, detached.

    Raises:
        ValueError: no chunk.
    """
    if not chunks:
        raise ValueError("chunks: expected at least one, got none")
    if len(chunks) == 1:
        value = loss(dict(forward(chunks[0])))
        value.backward()
        return value.detach()
    states, outputs = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state())
            outputs.append(forward(chunk))
    torch.clear_autocast_cache()  # weights that were cast without a graph are of no use to the second pass
    whole = {name: _join([out[name] for out in outputs]) for name in outputs[0]}
    rows = {name: [len(out[name]) for out in outputs] for name in whole if whole[name].dim()}
    outputs.clear()
    value = loss(whole)
    value.backward()
    gradients = {name: t.grad for name, t in whole.items() if t.grad is not None}
    parts = {name: g.split(rows[name]) if g.dim() else None for name, g in gradients.items()}
    whole.clear()
    after = _random_state()
    for i, chunk in enumerate(chunks):
        last = i + 1 == len(chunks)
        with nullcontext() if last else no_sync():
            _set_random_state(states[i])
            out = forward(chunk)
            # What does not depend on the chunk counts once: in the last, where DistributedDataParallel waits for it.
            wanted = {
                name: gradients[name] if part is None else part[i]
                for name, part in parts.items()
                if out[name].requires_grad and (last or part is not None)
            }
            torch.autograd.backward([out[name] for name in wanted], list(wanted.values()))
    _set_random_state(after)
    return value.detach()


def _join(parts: list[Tensor]) -> Tensor:
    """A leaf: the rows of all chunks, or what is the same in all."""
    whole = torch.cat(parts) if parts[0].dim() else parts[0].clone()
    return whole.requires_grad_(whole.is_floating_point())


# Of the CPU, and of the current GPU if there is one in use.
_State = tuple[Tensor, Tensor | None]


def _random_state() -> _State:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_state(state: _State) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
