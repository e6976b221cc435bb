"""Files of weights as training code writes them; code in them does not run unless that is allowed."""

import argparse
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.published import rename_global
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
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module._orig_mod."),
        {"model": prefixed("module.model._orig_mod.")},
        {"a._orig_mod.weight": STATE["a.weight"], "b": STATE["b"]},
        {"a.module._checkpoint_wrapped_module.weight": STATE["a.weight"], "_fsdp_wrapped_module.b": STATE["b"]},
        prefixed("module.") | {"n_averaged": torch.tensor(3)},
        prefixed("module.model.") | {"n_averaged": torch.tensor(3)},
    ],
    ids=lambda content: "/".join(content),
)
def test_wrappings(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    assert same(read_weights(tmp_path / "x.pt"))


def test_safetensors(tmp_path):
    save_file(prefixed("module."), tmp_path / "x.safetensors")
    assert same(read_weights(str(tmp_path / "x.safetensors")))


@pytest.fixture
def safe_globals() -> Iterator[None]:
    """PyTorch's list, which is the process's, is afterwards what it was."""
    before = set(torch.serialization.get_safe_globals())
    yield
    assert set(torch.serialization.get_safe_globals()) == before


class Bomb:
    def __reduce__(self):
        return (_explode, ())


def _explode():
    raise AssertionError("code of the file was run")


@pytest.mark.parametrize(
    "extra",
    [Bomb(), argparse.Namespace(lr=Bomb()), {"lr": [np.float64(1), Bomb()]}, re.compile("x"), Path.home, os.getcwd],
    ids=["code", "namespace", "list", "object", "method", "function"],
)
def test_no_pickles_unasked(tmp_path, safe_globals, extra):
    torch.save({"model": STATE, "args": extra}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="allow_pickle=True: that runs whatever code it holds"):
        read_weights(tmp_path / "x.pt")


BESIDE = {
    "args": argparse.Namespace(lr=1.0, path=Path("/a/b"), pure=PurePosixPath("c"), dtype=np.dtype("f4"), none=None),
    "lr": [np.float64(1e-5), np.float32(1), np.float16(1), np.int64(3), np.bool_(True), np.str_("x")],
    "random": np.random.RandomState(0).get_state(),
}


@pytest.mark.parametrize(
    "old, new",
    [
        ("argparse", "argparse"),
        ("pathlib", "pathlib._local"),
        (np.float64(1).__reduce__()[0].__module__, "numpy.core.multiarray"),
        (np.float64(1).__reduce__()[0].__module__, "numpy._core.multiarray"),
    ],
    ids=["as it is", "Python 3.13", "NumPy 1", "NumPy 2"],
)
def test_what_training_code_leaves_beside_the_weights(tmp_path, safe_globals, old, new):
    torch.save({"state_dict": prefixed("module."), **BESIDE}, tmp_path / "x.pt")
    rename_global(tmp_path / "x.pt", old, new)
    assert same(read_weights(tmp_path / "x.pt"))


def test_stand_ins_run_nothing(tmp_path):
    """The replaced names are not called with what a file says: here with a state that an ndarray would refuse."""

    class Call:
        def __init__(self, function: Any, *arguments: Any) -> None:
            self.call = function, arguments, {"x": 1}

        def __reduce__(self):
            return self.call

    reconstruct, scalar = np.arange(3).__reduce__()[0], np.float64(1).__reduce__()[0]
    calls = [Call(reconstruct, np.ndarray, (10**12,), b"O"), Call(scalar, np.dtype("f8"), b""), Call(Path, 3)]
    torch.save({"model": STATE, "calls": calls}, tmp_path / "x.pt")
    assert same(read_weights(tmp_path / "x.pt"))


def test_threads_read_at_once(tmp_path, safe_globals):
    """PyTorch's list of safe globals belongs to the process; a reader that ends must not take it from the others."""
    torch.save({"state_dict": STATE, **BESIDE}, tmp_path / "x.pt")
    with ThreadPoolExecutor(4) as pool:
        assert all(map(same, pool.map(read_weights, [tmp_path / "x.pt"] * 40)))


def test_pickles_if_asked(tmp_path):
    torch.save({"model": STATE, "args": re.compile("x")}, tmp_path / "x.pt")
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
        ({"a": STATE["b"], "b": [1.0]}, "got the keys a, b; b is no name of a tensor$"),
        ({"a": STATE["b"], 3: STATE["b"]}, "got the keys a, 3; 3 is no name of a tensor$"),
        ({"module.a": STATE["b"], "a": STATE["b"]}, "a: is there twice, the second time as a"),
        (
            {"a": torch.tensor([1.0, torch.nan, torch.inf])},
            "a: expected finite numbers, got 2 that are not",
        ),
        ({"a": torch.ones(2, dtype=torch.int8)}, "a: expected numbers of floating point, got int8"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "a: expected numbers of floating point, got complex64"),
        ({"a": torch.eye(2).to_sparse()}, "a: expected a dense tensor with its values, got torch.sparse_coo on cpu"),
        ({"a": torch.empty(2, device="meta")}, "a: expected a dense tensor with its values, got .* on meta"),
        ({"a": torch.ones(1).expand(10**9)}, r"a: expected all values of shape \(1000000000,\), got fewer"),
        ({"a\nb": torch.ones(2).bool()}, r"'a\\nb': expected numbers of floating point, got bool"),
    ],
)
def test_no_weights(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"^.*x\.pt: (expected tensors by name, .*)?{message}") as raised:
        read_weights(tmp_path / "x.pt")
    assert "\n" not in str(raised.value)


def test_a_dictionary_that_holds_itself(tmp_path):
    content: dict = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="got the keys epoch, model"):
        read_weights(tmp_path / "x.pt")


def advised(message: str) -> str:
    """The program that a message advises to run."""
    found = re.search(r"python -c '(.+)'", message)
    assert found is not None and "\n" not in message, message
    return found[1]


def test_foreign_formats_say_how_to_convert(tmp_path, monkeypatch):
    """The advice is followed as it stands."""
    module = nn.Module()
    module.a = nn.Module()
    module.a.weight, module.b = (nn.Parameter(STATE[name]) for name in STATE)
    torch.jit.script(module).save(str(tmp_path / "archive.pt"))
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(STATE))
    torch.save({"model": STATE, "args": re.compile("x")}, tmp_path / "objects.pt")
    for name, reason in (
        ("archive.pt", "is a TorchScript archive, which is a program"),
        ("pickle.pt", "is a pickle that torch.save did not write"),
        ("objects.pt", "tensors and plain values, got one that also holds re._compile"),
    ):
        with pytest.raises(ValueError, match=reason) as raised:
            read_weights(tmp_path / name)
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            exec(advised(str(raised.value)), {})
        assert same(read_weights(tmp_path / "weights.pt"))
        (tmp_path / "weights.pt").unlink()


def test_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="expected a file, got a folder"):
        read_weights(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pt")
        with pytest.raises(ValueError, match="expected a file, got a pipe or device"):
            read_weights(tmp_path / "pipe.pt")


def test_safetensors_by_content(tmp_path):
    save_file(STATE, tmp_path / "x.bin")
    assert same(read_weights(tmp_path / "x.bin"))


def test_torch_saves_older_format(tmp_path):
    torch.save(STATE, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert same(read_weights(tmp_path / "x.pt"))


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
