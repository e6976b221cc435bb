"""Calls of torch.distributed are counted, and their bytes are those of NCCL's rings."""

import pytest
import torch
import torch.distributed as dist
from common.traffic import Traffic
from support.ranks import processes
from support.tiny import START

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")


def known_calls():
    ranks, size = dist.get_world_size(), 4 * 20000
    own, whole = torch.ones(20000), torch.ones(ranks * 20000)
    ends = (dist.get_rank() - 1) % ranks, (dist.get_rank() + 1) % ranks
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def send():
        operations = dist.P2POp(dist.isend, own, ends[0]), dist.P2POp(dist.irecv, torch.empty_like(own), ends[1])
        for work in dist.batch_isend_irecv(list(operations)):
            work.wait()

    others = (ranks - 1) * size
    for name, call, expected in (
        ("allgather", lambda: gather(torch.empty_like(whole), own), others),
        ("reduce_scatter", lambda: reduce(torch.empty_like(own), whole.clone()), others),
        ("alltoall", lambda: dist.all_to_all_single(torch.empty_like(whole), whole), others),
        ("allreduce", lambda: dist.all_reduce(whole.clone()), 2 * others),
        ("send", send, size),
    ):
        call()  # connections are made at the first
        with Traffic() as seen:
            call()
        assert seen.calls[name] == 1, (name, seen.calls)
        assert seen.sent_bytes == pytest.approx(expected), name


def test_known_calls(tmp_path):
    processes(3, known_calls, tmp_path, start_method=START)
