import warnings
from contextlib import nullcontext

import pytest
from support.ranks import needs_gloo, processes
from support.tiny import tiny_batch, tiny_model

from betaclip.errors import ConfigError
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup
from betaclip.training import parallel


def fully_sharded_gradients_wait() -> None:
    """Within no_sync no gradient is reduced; nor does FSDP2 warn of outputs that are views."""
    warnings.filterwarnings("error", "FSDP2-wrapped")
    batch, model = tiny_batch(3), tiny_model()
    wrapped = parallel.wrap(model, "fsdp", ProcessGroup.of())
    for waits in (True, False):
        with parallel.no_sync(wrapped) if waits else nullcontext():
            wrapped(batch.images, batch.texts)["pooled_embeds"].sum().backward()
        gradients = [p.grad for p in model.pool.parameters() if p.dim()]
        assert all((gradient is None) is waits for gradient in gradients)


@needs_gloo
def test_fully_sharded_gradients_wait(tmp_path):
    processes(2, fully_sharded_gradients_wait, tmp_path)


def test_fsdp_needs_torchrun():
    with pytest.raises(ConfigError, match=r"run.parallel: fsdp needs a process group"):
        parallel.wrap(tiny_model(), "fsdp", SINGLE_PROCESS)
