"""How the text tower computes a batch's texts: each shared prefix once, and attention without padding to speak of.

The tower is causal, so texts that begin alike share the states of what they share. The distinct prefixes of all texts
are the nodes of a tree; everything but attention is computed once per node. Attention needs whole texts: its rows are
gathered from the nodes, and each node takes back the result of one of its rows.
All of it is planned here on the CPU, in NumPy, from the tokens alone.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# At most so many calls of attention per layer; one more costs about as much as so many rows of padding.
MAX_BUCKETS = 8
BUCKET_ROWS = 64


@dataclass(frozen=True)
class Rows:
    """The R rows of attention, gathered from M nodes. R' of them are tokens, the others padding.

    node: (R,) node of each row; of padding, any.
    users: (R',) rows that are tokens, node after node. starts: (M,) where each node's begin among them.
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
    """M nodes, and U distinct texts, in order of length.

    tokens, positions: (M,) of each node.
    path: (T,) node of each token of the distinct texts, text after text.
    lengths: (U,) tokens of each.
    ends: (U,) node of each one's last token.
    text: (N,) which of them each text of the batch is.
    """

    tokens: Tensor
    positions: Tensor
    path: Tensor
    lengths: Tensor
    ends: Tensor
    text: Tensor

    @cached_property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """Texts in each bucket, in order, and the length to which they are padded at the end."""
        return choose_buckets(self.lengths.numpy())

    @cached_property
    def padded_rows(self) -> Rows:
        """Those of the buckets, bucket after bucket, text after text."""
        path, lengths, pieces, text, token = self.path.numpy(), self.lengths.numpy(), [], 0, 0
        for texts, longest in self.buckets:
            exists = np.arange(longest) < lengths[text : text + texts, None]
            piece = np.full(exists.shape, -1)
            piece[exists] = path[token : token + int(exists.sum())]
            pieces.append(piece.ravel())
            text, token = text + texts, token + int(exists.sum())
        return _rows(np.concatenate(pieces) if pieces else path, len(self.tokens))

    @cached_property
    def flat_rows(self) -> Rows:
        """The tokens themselves."""
        return _rows(self.path.numpy(), len(self.tokens))


def pack(tokens: Tensor, lengths: Tensor) -> Packing:
    """The plan for texts of ``lengths`` (N,) whose ``tokens`` (T,) follow one another; int64 on the CPU."""
    length, longest = lengths.numpy(), int(lengths.max()) if len(lengths) else 0
    padded = np.full((len(length), longest), -1, np.int64)
    padded[np.arange(longest) < length[:, None]] = tokens.numpy()
    padded, text = _distinct(padded)
    node, new = _tree(padded)
    owner, position = np.nonzero(new)
    length = (padded >= 0).sum(1)
    order = np.argsort(length, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    path = node[order][padded[order] >= 0]
    length = length[order]
    planned = (padded[owner, position], position, path, length, path[length.cumsum() - 1], place[text])
    return Packing(*map(torch.from_numpy, planned))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """There, without the host waiting."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def choose_buckets(lengths: Ints) -> tuple[tuple[int, int], ...]:
    """How many texts of ascending ``lengths`` go into each bucket, and its longest: for the fewest rows, by a small
    dynamic programme over the lengths at which buckets end."""
    if not len(lengths):
        return ()
    sizes, counts = np.unique(lengths, return_counts=True)
    before = np.concatenate(([0], counts.cumsum()))
    # cost[i, j] of a bucket of sizes i to j; best[j] of all buckets up to size j.
    texts = before[None, 1:] - before[:-1, None]
    cost = np.where(texts > 0, texts * sizes + float(BUCKET_ROWS), np.inf)
    best, begins = cost[0], [np.zeros(len(sizes), np.int64)]
    for _ in range(MAX_BUCKETS - 1):
        total = np.concatenate(([0.0], best[:-1]))[:, None] + cost
        begins.append(total.argmin(0))
        best = total.min(0)
    ends = [len(sizes)]
    while ends[-1] > 0:
        ends.append(int(begins.pop()[ends[-1] - 1]))
    ends.reverse()
    return tuple((int(before[j] - before[i]), int(sizes[j - 1])) for i, j in pairwise(ends))


def _distinct(padded: Ints) -> tuple[Ints, Ints]:
    """The distinct rows in lexicographic order, shorter first, and which of them each row is."""
    # Bytes that compare as the tokens do, -1 the lowest; sorting them takes an eighth of the time of np.lexsort.
    keys = np.ascontiguousarray((padded + 1).astype(">u4"))
    order = np.argsort(keys.view(np.dtype((np.void, keys.shape[1] * 4)))[:, 0]) if padded.size else np.arange(0)
    padded = padded[order]
    first = np.ones(len(order), np.bool_)
    first[1:] = (padded[1:] != padded[:-1]).any(1)
    text = np.empty_like(order)
    text[order] = first.cumsum() - 1
    return padded[first], text


def _tree(padded: Ints) -> tuple[Ints, Bools]:
    """(U, L) node of each token of distinct texts in lexicographic order, and whether no text before has that node."""
    # What a text shares with any text before it, it shares with the one just before it.
    new = padded >= 0
    new[1:] &= ~np.logical_and.accumulate(padded[1:] == padded[:-1], axis=1)
    number = np.where(new, new.cumsum().reshape(new.shape) - 1, 0)
    return np.maximum.accumulate(number, axis=0), new


def _rows(node: Ints, nodes: int) -> Rows:
    """Of the node of each row, -1 for padding."""
    users = np.argsort(node, kind="stable")[(node < 0).sum() :]
    starts = np.searchsorted(node[users], np.arange(nodes))
    planned: Any = (node.clip(0), users, starts, users[starts])
    return Rows(*map(torch.from_numpy, planned))
