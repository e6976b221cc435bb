"""The plan by which the text tower encodes a batch: each shared prefix once, and attention with little padding.

The tower is causal, so the states of a prefix are the same in all texts that begin with it. The distinct prefixes of
all texts are the nodes of a tree, and everything but attention is computed once per node. Attention needs whole texts:
its rows are gathered from the nodes, and each node takes its result from one of its rows. The plan is made on the CPU,
in NumPy, from the tokens alone.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MAX_BUCKETS = 8  # calls of attention per layer
CALL_ROWS = 64  # the number of rows that cost about as much as one more call of attention


class Bucket(NamedTuple):
    """``num_texts`` consecutive texts, each padded at its end to ``length`` tokens."""

    num_texts: int
    length: int


@dataclass(frozen=True)
class Rows:
    """The R rows of attention, gathered from M nodes; R' of them are tokens, the others are padding.

    node: (R,) node of each row; any node for padding.
    users: (R',) rows that are tokens, grouped by node.
    starts: (M,) index into ``users`` where each node's rows begin.
    row: (M,) the row whose result each node takes.
    """

    node: Tensor
    users: Tensor
    starts: Tensor
    row: Tensor

    def to(self, device: torch.device) -> "Rows":
        return Rows(*(to_device(tensor, device) for tensor in (self.node, self.users, self.starts, self.row)))


@dataclass(frozen=True)
class Packing:
    """M nodes, and U distinct texts in order of length.

    tokens, positions: (M,) token and position of each node.
    path: (T,) node of each token of the distinct texts, text after text.
    lengths: (U,) tokens of each distinct text.
    ends: (U,) node of each distinct text's last token.
    distinct: (N,) index of each text of the batch among the distinct ones.
    """

    tokens: Tensor
    positions: Tensor
    path: Tensor
    lengths: Tensor
    ends: Tensor
    distinct: Tensor

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets of the distinct texts, in order."""
        return choose_buckets(self.lengths.numpy())

    @cached_property
    def padded_rows(self) -> Rows:
        """The rows of the buckets, bucket after bucket and text after text."""
        path, lengths, pieces, text, token = self.path.numpy(), self.lengths.numpy(), [], 0, 0
        for count, longest in self.buckets:
            exists = np.arange(longest) < lengths[text : text + count, None]
            piece = np.full(exists.shape, -1)
            piece[exists] = path[token : token + int(exists.sum())]
            pieces.append(piece.ravel())
            text, token = text + count, token + int(exists.sum())
        return _rows(np.concatenate(pieces) if pieces else path, len(self.tokens))

    @cached_property
    def flat_rows(self) -> Rows:
        """The rows without padding: the tokens, text after text."""
        return _rows(self.path.numpy(), len(self.tokens))


def pack(tokens: Tensor, lengths: Tensor) -> Packing:
    """Plan N texts of ``lengths`` (N,), whose ``tokens`` (T,) are concatenated; both are int64 on the CPU."""
    length, longest = lengths.numpy(), int(lengths.max()) if len(lengths) else 0
    padded = np.full((len(length), longest), -1, np.int64)
    padded[np.arange(longest) < length[:, None]] = tokens.numpy()
    padded, distinct = _distinct(padded)
    node, new = _tree(padded)
    owner, position = np.nonzero(new)
    length = (padded >= 0).sum(1)
    order = np.argsort(length, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    path = node[order][padded[order] >= 0]
    length = length[order]
    planned = (padded[owner, position], position, path, length, path[length.cumsum() - 1], place[distinct])
    return Packing(*map(torch.from_numpy, planned))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without making the host wait.

    A plan may have been made, cached or unpickled under ``inference_mode``; autograd could not save such a tensor.
    """
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        tensor = tensor.clone()
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def choose_buckets(lengths: Ints, max_buckets: int = MAX_BUCKETS, call_rows: int = CALL_ROWS) -> tuple[Bucket, ...]:
    """Divide texts of ascending ``lengths`` into at most ``max_buckets`` buckets with the fewest rows.

    Each bucket costs ``call_rows`` rows more. Dynamic programming over the lengths at which buckets end finds the
    optimum.
    """
    if not len(lengths):
        return ()
    sizes, counts = np.unique(lengths, return_counts=True)
    before = np.concatenate(([0], counts.cumsum()))
    # cost[i, j] is that of one bucket of sizes i to j, best[j] that of all buckets up to size j.
    num_texts = before[None, 1:] - before[:-1, None]
    cost = np.where(num_texts > 0, num_texts * sizes + float(call_rows), np.inf)
    best, begins = cost[0], [np.zeros(len(sizes), np.int64)]
    for _ in range(max_buckets - 1):
        total = np.concatenate(([0.0], best[:-1]))[:, None] + cost
        begins.append(total.argmin(0))
        best = total.min(0)
    ends = [len(sizes)]
    while ends[-1] > 0:
        ends.append(int(begins.pop()[ends[-1] - 1]))
    ends.reverse()
    return tuple(Bucket(int(before[j] - before[i]), int(sizes[j - 1])) for i, j in pairwise(ends))


def _distinct(padded: Ints) -> tuple[Ints, Ints]:
    """The distinct rows in lexicographic order, prefixes first, and the index of each row among them."""
    # Big-endian bytes sort like the tokens, with -1 first; sorting them takes an eighth of the time of np.lexsort.
    keys = np.ascontiguousarray((padded + 1).astype(">u4"))
    order = np.argsort(keys.view(np.dtype((np.void, keys.shape[1] * 4)))[:, 0]) if padded.size else np.arange(0)
    padded = padded[order]
    first = np.ones(len(order), np.bool_)
    first[1:] = (padded[1:] != padded[:-1]).any(1)
    distinct = np.empty_like(order)
    distinct[order] = first.cumsum() - 1
    return padded[first], distinct


def _tree(padded: Ints) -> tuple[Ints, Bools]:
    """(U, L) node of each token of distinct texts in lexicographic order, and whether this text is the node's first."""
    # In lexicographic order, a prefix shared with any earlier text is shared with the one just before.
    new = padded >= 0
    new[1:] &= ~np.logical_and.accumulate(padded[1:] == padded[:-1], axis=1)
    number = np.where(new, new.cumsum().reshape(new.shape) - 1, 0)
    return np.maximum.accumulate(number, axis=0), new


def _rows(node: Ints, nodes: int) -> Rows:
    """The rows whose nodes are ``node`` (R,), -1 for padding."""
    users = np.argsort(node, kind="stable")[(node < 0).sum() :]
    starts = np.searchsorted(node[users], np.arange(nodes))
    planned: Any = (node.clip(0), users, starts, users[starts])
    return Rows(*map(torch.from_numpy, planned))
