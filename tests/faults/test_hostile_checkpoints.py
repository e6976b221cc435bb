"""Checkpoints with bits flipped at random: each is found, and nothing but a message comes of it."""

import random
from pathlib import Path

import pytest
import torch

from betaclip import checkpoint as checkpoints

FLIPS = 400


def test_flipped_bits(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    chosen = random.Random(seed)
    path = checkpoints.checkpoint_path(tmp_path, 1)
    content = {"betaclip": checkpoints.FORMAT, "step": 1, "model": {f"weight {i}": torch.rand(99) for i in range(20)}}
    checkpoints.write(path, content, keep=1)
    whole = path.read_bytes()
    ends = [*range(128), *range(len(whole) - 128, len(whole))]  # where the archive's and our own structure is dense
    for position in [*ends, *(chosen.randrange(len(whole)) for _ in range(FLIPS - len(ends)))]:
        torn = bytearray(whole)
        torn[position] ^= 1 << chosen.randrange(8)
        path.write_bytes(torn)
        with pytest.raises(ValueError, match=r"checkpoint_00000001\.pt: "):
            checkpoints.read(path)
    path.write_bytes(whole)
    assert checkpoints.read(path)["step"] == 1
