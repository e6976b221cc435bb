"""The ranks that evaluate together: each takes its part, and every sample is counted once."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sharding:
    """One of ``count`` ranks of the default process group; by default alone, whatever group there is.

    What is not alone is collective: all ranks must call the same in the same order, on tensors of the device that the
    group's backend serves.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_group(cls) -> "Sharding":
        """All ranks of the default process group; alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def part(self, total: int) -> range:
        """This rank's of ``total`` samples: neighbours, in the order of the ranks, sizes at most one apart."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def gather(self, rows: Tensor) -> Tensor:
        """(sum of n, ...) the rows of all ranks, in their order, from (n, ...) here; n may differ, or be 0."""
        if self.count == 1:
            return rows
        sizes = torch.zeros(self.count, dtype=torch.int64, device=rows.device)
        sizes[self.rank] = len(rows)
        dist.all_reduce(sizes)
        sent, numbers = rows, sizes.tolist()
        if rows.dtype == torch.bool:
            sent = rows.to(torch.uint8)
        most = max(numbers)
        filled = sent.new_zeros(most, *sent.shape[1:])
        filled[: len(sent)] = sent
        everything = sent.new_empty(self.count * most, *sent.shape[1:])
        dist.all_gather_into_tensor(everything, filled)
        shards = everything.unflatten(0, (self.count, most))
        return torch.cat([shard[:n] for shard, n in zip(shards, numbers, strict=True)]).to(rows.dtype)

    def sum(self, t: Tensor) -> Tensor:
        """Over all ranks."""
        return self._reduce(t, dist.ReduceOp.SUM)

    def maximum(self, t: Tensor) -> Tensor:
        """Over all ranks; without NaN, of which backends differ."""
        return self._reduce(t, dist.ReduceOp.MAX)

    def _reduce(self, t: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.count == 1:
            return t
        total = t.clone()
        dist.all_reduce(total, operation)
        return total


ALONE = Sharding()
