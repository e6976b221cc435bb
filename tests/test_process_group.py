"""One process without torch.distributed, and three ranks on gloo."""

import pytest
import torch
import torch.distributed as dist
from support import forkserver
from support.ranks import needs_gloo, processes

from betaclip.errors import ConfigError
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup, initialized


@pytest.mark.parametrize("total", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shards_are_everything_once(total, size):
    shards = [ProcessGroup(rank, size).shard_range(total) for rank in range(size)]
    assert [i for shard in shards for i in shard] == list(range(total))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_single_process_needs_no_group():
    group = ProcessGroup.of()
    assert group == SINGLE_PROCESS == ProcessGroup(0, 1) and group.is_first
    t = torch.tensor([1.0, -2.0], requires_grad=True)
    for same in (group.sum(t), group.max(t), group.gather_rows(t), group.mean_(t.detach())):
        assert torch.equal(same, t)
    assert group.any(True) and not group.any(False)
    assert group.gather_objects("x") == ["x"]
    group.barrier()


def collectives(group: ProcessGroup) -> None:
    assert group.sum(torch.tensor([group.rank, 1])).tolist() == [sum(range(group.size)), group.size]
    assert group.max(torch.tensor([float(group.rank), -torch.inf])).tolist() == [group.size - 1, -torch.inf]
    assert group.mean_(torch.tensor([1.0, 2.0]) * group.rank).tolist() == [(group.size - 1) / 2, group.size - 1]
    assert group.any(group.rank == 1) and not group.any(False)
    assert group.gather_objects(f"rank {group.rank}") == [f"rank {rank}" for rank in range(group.size)]
    own = torch.tensor([1.0], requires_grad=True)
    assert not group.sum(own).requires_grad and own.item() == 1
    group.barrier()


def gathers_rows(group: ProcessGroup) -> None:
    for dtype in (torch.float32, torch.float64, torch.int64, torch.bool):
        for sizes in ((2, 0, 5), (0, 0, 0), (1, 4, 1)):
            whole = torch.randint(0, 2, (sum(sizes), 3)).to(dtype)
            before = sum(sizes[: group.rank])
            found = group.gather_rows(whole[before : before + sizes[group.rank]])
            assert found.dtype == dtype and torch.equal(found, whole)


def three_ranks() -> None:
    group = ProcessGroup.of()
    assert (group.rank, group.size, group.is_first) == (dist.get_rank(), 3, dist.get_rank() == 0)
    collectives(group)
    gathers_rows(group)
    with initialized("cpu") as (found, device):
        assert (found, device) == (group, torch.device("cpu"))
    assert dist.is_initialized()  # the group was not started there


def subgroups() -> None:
    """Ranks 0 and 2 as a group, and each dimension of a mesh."""
    pair, rank = dist.new_group([0, 2]), dist.get_rank()
    if rank == 1:
        with pytest.raises(ValueError, match="process_group: expected one that this rank is in"):
            ProcessGroup.of(pair)
    else:
        group = ProcessGroup.of(pair)
        assert (group.rank, group.size) == (rank // 2, 2)
        assert group.gather_objects(rank) == [0, 2]
        assert group.sum(torch.tensor(rank)).item() == 2 and group.gather_rows(torch.tensor([rank])).tolist() == [0, 2]
    mesh = dist.device_mesh.init_device_mesh("cpu", (3, 1), mesh_dim_names=("data", "model"))
    collectives(ProcessGroup.of(mesh["data"]))
    assert ProcessGroup.of(mesh["model"]).size == 1
    with pytest.raises(ValueError, match="process_group: expected a DeviceMesh of one dimension, got 2"):
        ProcessGroup.of(mesh)


@needs_gloo
@pytest.mark.parametrize("checks", [three_ranks, subgroups])
def test_three_ranks(tmp_path, checks):
    processes(3, checks, tmp_path)


@needs_gloo
def test_torchrun(tmp_path):
    """The group exists inside the context only."""
    done = forkserver.run(tmp_path, launch)
    assert done.code == 0, done.stderr


def launch() -> None:
    """What torchrun does; but its ranks fork from a process with its imports done."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test"}
    elastic_launch(LaunchConfig(1, 1, 2, **rendezvous, max_restarts=0, start_method="fork"), rank_of_torchrun)()


def rank_of_torchrun() -> None:
    with initialized("auto") as (group, _):
        assert group.size == 2 and group.gather_objects(group.rank) == [0, 1]
    assert not dist.is_initialized()


def test_devices():
    for name, message in (("gpu", "device: "), ("meta", "device: expected auto, cpu or cuda, got 'meta'")):
        with pytest.raises(ConfigError, match=message), initialized(name):
            pass
    with initialized("cpu") as (group, device):
        assert group == SINGLE_PROCESS and device == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu():
    with (
        pytest.raises(ConfigError, match="expected auto or cpu, as no CUDA device is available"),
        initialized("cuda:0"),
    ):
        pass
