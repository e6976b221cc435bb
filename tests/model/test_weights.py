"""Files of weights as training code writes them; code in them does not run unless that is allowed."""

import argparse
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from betaclip.model.weights import read_weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.0)}


def same(state: dict[str, torch.Tensor]) -> bool:
    return state.keys() == STATE.keys() and all(torch.equal(state[name], STATE[name]) for name in STATE)


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        OrderedDict(STATE),
        {"model": STATE},
        {"state_dict": prefixed("module."), "epoch": 3, "name": "run"},
        {"epoch": 7, "model_state_dict": prefixed("_orig_mod.module."), "optimizer": {"state": {}, "param_groups": []}},
        {"state_dict": prefixed("model."), "loss": torch.tensor(1.0)},
        {"module": {"model": OrderedDict(STATE)}, "lr": [0.1]},
    ],
    ids=lambda content: "/".join(content),
)
def test_wrappings(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    assert same(read_weights(tmp_path / "x.pt"))


def test_safetensors(tmp_path):
    save_file(prefixed("module."), tmp_path / "x.safetensors")
    assert same(read_weights(str(tmp_path / "x.safetensors")))


class Bomb:
    def __reduce__(self):
        return (_explode, ())


def _explode():
    raise AssertionError("code of the file was run")


@pytest.mark.parametrize("extra", [Bomb(), argparse.Namespace(lr=1)], ids=["code", "namespace"])
def test_no_pickles_unasked(tmp_path, extra):
    torch.save({"model": STATE, "args": extra}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="allow_pickle=True: that runs whatever code it holds"):
        read_weights(tmp_path / "x.pt")


def test_pickles_if_asked(tmp_path):
    torch.save({"model": STATE, "args": argparse.Namespace(lr=1)}, tmp_path / "x.pt")
    assert same(read_weights(tmp_path / "x.pt", allow_pickle=True))
    torch.save({"model": STATE, "args": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(AssertionError, match="was run"):
        read_weights(tmp_path / "bomb.pt", allow_pickle=True)


def test_whole_modules_if_asked(tmp_path):
    module = nn.Linear(3, 2)
    torch.save(module, tmp_path / "x.pt")
    assert torch.equal(read_weights(tmp_path / "x.pt", allow_pickle=True)["weight"], module.weight)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"epoch": 3, "optimizer": {"state": {}}}, "expected tensors by name, .* got the keys epoch, optimizer"),
        ({}, r"got the keys \(none\)"),
        ([STATE["b"]], "expected a dictionary, got list"),
    ],
)
def test_no_weights(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_broken_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=name):
        read_weights(path)
    save_file(STATE, path) if path.suffix == ".safetensors" else torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=name):
        read_weights(path)
