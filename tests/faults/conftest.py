"""The seed of the faults: ``FAULT_SEED``, or 0, so that plain ``pytest`` makes the same ones every time."""

import os
import random

import pytest
import torch


@pytest.fixture
def chosen(request: pytest.FixtureRequest) -> random.Random:
    """A test's random choices, which depend on its name; PyTorch's follow from them."""
    seed = os.environ.get("FAULT_SEED", "0")
    print(f"FAULT_SEED={seed}")
    rng = random.Random(f"{seed} {request.node.name}")
    torch.manual_seed(rng.randrange(2**32))
    return rng
