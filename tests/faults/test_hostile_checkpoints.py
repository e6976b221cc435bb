"""Damaged and hostile checkpoints and weights: each is refused in one line, and nothing that a file holds is run."""

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from betaclip import checkpoint as checkpoints
from betaclip.checkpoint import load_checkpoint
from betaclip.model.weights import read_weights
from betaclip.published import load_published

FLIPS, WEIGHTS = 400, 150
READERS: list[Callable[[Path], Any]] = [checkpoints.read, load_checkpoint, read_weights, load_published]


def content(step: int = 1) -> dict[str, Any]:
    weights = {f"weight {i}": torch.rand(99) for i in range(20)}
    return {"betaclip": checkpoints.FORMAT, "step": step, "model": weights}


def test_flipped_bits(tmp_path: Path, chosen: random.Random) -> None:
    path = checkpoints.checkpoint_path(tmp_path, 1)
    checkpoints.write(path, content(), keep=1)
    whole = path.read_bytes()
    ends = [*range(128), *range(len(whole) - 128, len(whole))]  # where the archive's and our own structure is dense
    for position in [*ends, *(chosen.randrange(len(whole)) for _ in range(FLIPS - len(ends)))]:
        torn = bytearray(whole)
        torn[position] ^= 1 << chosen.randrange(8)
        path.write_bytes(torn)
        with pytest.raises(ValueError, match=r"^[^\n]*checkpoint_00000001\.pt: [^\n]*$"):
            checkpoints.read(path)
    path.write_bytes(whole)
    assert checkpoints.read(path)["step"] == 1


def test_last_whole_checkpoint_is_found(tmp_path: Path, chosen: random.Random) -> None:
    """Some of many checkpoints are cut, grown, emptied or exchanged."""
    steps = range(1, 9)
    for step in steps:
        checkpoints.write(checkpoints.checkpoint_path(tmp_path, step), content(step), keep=len(steps))
    damaged = set(chosen.sample(steps, chosen.randint(1, len(steps) - 1))) | {steps[-1]}
    for step in damaged - {1}:
        path = checkpoints.checkpoint_path(tmp_path, step)
        whole = path.read_bytes()
        other = checkpoints.checkpoint_path(tmp_path, 1).read_bytes()
        path.write_bytes(chosen.choice([whole[: chosen.randrange(len(whole))], whole + b"\0", b"", other]))
    found = checkpoints.read_latest(tmp_path, checkpoints.MODEL_KEYS)
    assert found is not None and found[1]["step"] == max({*steps} - damaged | {1})


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_damaged_weights(tmp_path: Path, chosen: random.Random, name: str) -> None:
    """These files have no digest: the fault is told in one line, or all tensors that are read are finite numbers."""
    path, weights = tmp_path / name, {f"weight {i}": torch.rand(3, 1 + i) for i in range(5)}
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    whole, refused = path.read_bytes(), 0
    for trial in range(WEIGHTS):
        torn = bytearray(whole)
        for _ in range(chosen.choice([1, 8])):
            torn[chosen.randrange(len(torn))] ^= 1 << chosen.randrange(8)
        path.write_bytes(torn[: chosen.randrange(len(torn))] if trial % 3 == 0 else torn)
        try:
            found = read_weights(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1
        else:
            assert all(t.isfinite().all() and t.is_floating_point() for t in found.values())
    assert refused > WEIGHTS / 3  # at least the cut ones
    path.write_bytes(whole)
    assert all(torch.equal(t, weights[name]) for name, t in read_weights(path).items())


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: f"{reader.__module__}.{reader.__name__}")
def test_nothing_is_run(tmp_path: Path, chosen: random.Random, reader: Callable[[Path], Any]) -> None:
    """A program in the place of any value, in any of the formats that torch.save and pickle have."""
    ran, path = tmp_path / "ran", checkpoints.checkpoint_path(tmp_path, 1)
    for _ in range(10):
        hostile = content()
        place = chosen.choice([hostile, hostile["model"]])
        place[chosen.choice(["step", "config", "weight 7", "model", "random"])] = Payload(ran)
        match chosen.choice(["zip", "legacy", "pickle", "ours"]):
            case "ours":
                checkpoints.write(path, hostile, keep=1)
            case "pickle":
                path.write_bytes(pickle.dumps(hostile, protocol=2))  # the one that PyTorch reads without a warning
            case form:
                torch.save(hostile, path, _use_new_zipfile_serialization=form == "zip")
        with pytest.raises(ValueError) as refused:
            reader(path)
        assert str(path) in str(refused.value) and len(str(refused.value).splitlines()) == 1
        assert not ran.exists()
    with pytest.raises(FileExistsError):  # the payload does run where everything is unpickled
        for _ in range(2):
            pickle.loads(pickle.dumps(Payload(ran)))
