"""What the model of the global batch is fitted from: a rank's own work and single messages, timed beside the losses."""

import math
import os
from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from batches import Batch
from comparison import phase_run
from dense import unit
from global_batch_cost import Link, Machine, Work
from global_losses import beta_cal
from harness import Run, percentiles

from betaclip.kernels.backends import resolve
from betaclip.kernels.similarity.contract import Operand
from betaclip.kernels.similarity.operators import BACKENDS, local_backend
from betaclip.losses.across_ranks import TRANSPORTS


class Rates:
    """Runs that all ranks make at once, and the machine that their times describe.

    own: this rank's images of the ``whole`` batch.
    """

    def __init__(self, work: Work, whole: Batch, own: slice) -> None:
        self.work, (images, texts, _) = work, whole.image.shape
        self.batch = Batch(whole.image[own], whole.text[own], whole.scale).to_leaves()
        x, y = (unit(t.detach()).flatten(0, 1) for t in (whole.image, whole.text))
        group = torch.arange(images, dtype=torch.int32, device=y.device).repeat_interleave(texts)
        rows = slice(own.start * texts, own.stop * texts)
        self.scale = whole.scale.detach().float()
        self.x = Operand(x[rows].clone(), group[rows], None, x.dtype)
        parts = {"all_gather": [(y, group)], "ring": zip(y.split(work.rows), group.split(work.rows), strict=True)}
        self.columns = {way: [Operand(t, g, None, t.dtype) for t, g in parts[way]] for way in TRANSPORTS}
        operation = "similarity_softplus" if work.form == "bce" else "similarity_logsumexp"
        self.module = local_backend(resolve(operation, "auto", BACKENDS, x[:0], y[:0]), self.x, self.columns["ring"][0])

    def runs(self, phase: str) -> dict[str, Run]:
        """The kernel on all columns as each way brings them, the loss of this rank alone, a message of its texts, a sum
        over ranks."""
        runs: dict[str, Run] = {f"kernel, {way}": partial(self._kernel, way, phase) for way in TRANSPORTS}
        alone = beta_cal(self.work.form, False)
        runs["alone"] = phase_run(lambda: alone(self.batch), self.batch.leaves, torch.ones_like(self.scale), phase)
        return {**runs, "message": self._message, "sum": self._sum} if self.work.ranks > 1 else runs

    def machine(self, way: str, phase: str, times: Mapping[str, list[float] | str]) -> Machine:
        """From ``times`` in ms."""
        work = self.work
        seconds = {name: percentiles(t)[1] / 1e3 for name, t in times.items() if not isinstance(t, str)}
        # The loss alone is one step of the ring and what belongs to no other rank.
        element_s = max(seconds["alone"] - seconds["kernel, ring"] / work.ranks, 0.0) / (work.rows * work.dim)
        link = Link(math.inf, 0.0)
        if work.ranks > 1:
            latency_s = seconds["sum"] / (2 * math.ceil(math.log2(work.ranks)))
            link = Link(self.x.rows.nbytes / max(seconds["message"] - latency_s, 1e-9), latency_s)
        cpu = self.x.rows.device.type == "cpu"
        # On the CPU cores move the bytes: what they do not compute meanwhile is not saved.
        overlap = not cpu or work.ranks < (os.cpu_count() or 1)
        reduction = 2 if dist.get_backend() == "gloo" else 1
        rate = work.flop(phase) / seconds[f"kernel, {way}"]
        return Machine(rate, link, link, work.ranks, 1, 0.0, element_s, overlap, reduction)

    def _kernel(self, way: str, phase: str) -> None:
        x, need = self.x, phase != "forward"
        for y in self.columns[way]:
            if self.work.form == "bce" and need:
                ones = self.scale.new_ones(x.rows.shape[0])
                self.module.similarity_softplus_fwd_bwd(x, y, self.scale, None, ones, True, True)
            elif self.work.form == "bce":
                self.module.similarity_softplus_fwd(x, y, self.scale, None)
            else:
                statistics = self.module.similarity_logsumexp_fwd(x, y, self.scale)
                if need:
                    weights = map(torch.ones_like, statistics)
                    self.module.similarity_logsumexp_bwd(x, y, self.scale, *statistics, *weights, True, True)

    def _message(self) -> None:
        rank, arriving = dist.get_rank(), torch.empty_like(self.x.rows)
        ends = (rank - 1) % self.work.ranks, (rank + 1) % self.work.ranks
        operations = [dist.P2POp(dist.isend, self.x.rows, ends[0]), dist.P2POp(dist.irecv, arriving, ends[1])]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def _sum(self) -> None:
        dist.all_reduce(torch.zeros(1, device=self.x.rows.device))
