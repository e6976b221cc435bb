import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from betaclip import checkpoint as checkpoints
from betaclip.model.beta_clip import ModelConfig, create_model
from betaclip.published import save_published


def test_write_keeps_the_last(tmp_path):
    for step in (3, 20, 100, 7):
        checkpoints.write(checkpoints.checkpoint_path(tmp_path, step), {"step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_00000020.pt", "checkpoint_00000100.pt"]
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint_00000100.pt"
    assert checkpoints.read(tmp_path / "checkpoint_00000100.pt") == {"step": 100}
    assert checkpoints.latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("at", ["save", "fsync", "rename"])
def test_kill_while_writing(tmp_path, monkeypatch, at):
    """Whenever the kill comes, the last complete checkpoint is the latest; the next write removes leftovers."""

    class Kill(BaseException):
        pass

    def kill(*args: object) -> None:
        raise Kill

    def half(content: object, file) -> None:
        file.write(b"half")
        raise Kill

    checkpoints.write(checkpoints.checkpoint_path(tmp_path, 1), {"step": 1}, keep=2)
    with monkeypatch.context() as patch:
        match at:
            case "save":
                patch.setattr(torch, "save", half)
            case "fsync":
                patch.setattr(os, "fsync", kill)
            case "rename":
                patch.setattr(Path, "replace", kill)
        with pytest.raises(Kill):
            checkpoints.write(checkpoints.checkpoint_path(tmp_path, 2), {"step": 2}, keep=2)
    found = checkpoints.latest(tmp_path)
    assert found is not None and checkpoints.read(found) == {"step": 1}
    checkpoints.write(checkpoints.checkpoint_path(tmp_path, 2), {"step": 2}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_00000001.pt", "checkpoint_00000002.pt"]


def checkpoint(folder: Path, step: int, /, **changes: object) -> Path:
    """A checkpoint with all that a run needs; a change to None leaves it out."""
    content = {key: kind() for key, kind in checkpoints.RUN_KEYS.items() if kind is not torch.Tensor}
    content |= {"betaclip": checkpoints.FORMAT, "step": step, "interval": torch.zeros(1, 2), **changes}
    path = checkpoints.checkpoint_path(folder, step)
    checkpoints.write(path, {key: value for key, value in content.items() if value is not None}, keep=9)
    return path


def flip(content: bytes, position: int, bit: int = 0) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "without its digest": lambda content: content[:-48],
    "garbage": lambda content: b"garbage " * 99,
    "zeros": lambda content: bytes(len(content)),
    "a bit of the archive": lambda content: flip(content, len(content) // 2),
    "a bit of the digest": lambda content: flip(content, len(content) - 1),
    "a bit of the comment's name": lambda content: flip(content, len(content) - 40),
    "a bit of the comment's length": lambda content: flip(content, len(content) - 50),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_file(tmp_path, caplog, damage):
    """The one before it is taken, with a warning that names it; without one, an error names it."""
    path = checkpoint(tmp_path, 9)
    assert checkpoints.read_latest(tmp_path, checkpoints.RUN_KEYS)[0] == path  # type: ignore[index]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"^{path}: [^\n]*; no checkpoint before it is whole either$"):
        checkpoints.read_latest(tmp_path, checkpoints.RUN_KEYS)
    before = checkpoint(tmp_path, 7)
    found = checkpoints.read_latest(tmp_path, checkpoints.RUN_KEYS)
    assert found is not None and found[0] == before and found[1]["step"] == 7
    assert caplog.messages[-1].startswith(str(path)) and caplog.messages[-1].endswith("trying the checkpoint before it")
    checkpoints.set_aside_later(tmp_path, 7)
    assert checkpoints.kept(tmp_path) == [before] and Path(f"{path}.damaged").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer": None}, "expected 'optimizer' of type dict in a checkpoint, it is missing"),
        ({"random": 3}, "expected 'random' of type list in a checkpoint, it is of type int"),
        ({"step": -3}, "expected the step that the name says, got -3"),
        ({"step": 8}, "expected the step that the name says, got 8"),
        ({"betaclip": 0}, "expected a version of at least 1, got 0"),
        ({"betaclip": "2"}, "expected a version of at least 1, got '2'"),
        ({"betaclip": 3}, "a later version of betaclip wrote it"),
    ],
)
def test_content_that_no_run_can_have(tmp_path, changes, message):
    path = checkpoint(tmp_path, 9, **changes)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        checkpoints.read(path, checkpoints.RUN_KEYS)


def test_first_version_is_read(tmp_path):
    """It had no digest."""
    path = checkpoint(tmp_path, 9, betaclip=1)
    torch.save(checkpoints.read(path), path)
    assert checkpoints.read(path, checkpoints.RUN_KEYS)["betaclip"] == 1


def draws() -> list[float]:
    return [torch.rand(()).item(), np.random.rand(), random.random(), np.random.standard_normal()]


def test_random_states(tmp_path):
    draws()  # an odd number of normals: NumPy keeps the second of a pair
    checkpoints.write(tmp_path / "checkpoint_00000001.pt", checkpoints.random_states(), keep=1)
    truth = [draws() for _ in range(3)]
    checkpoints.set_random_states(checkpoints.read(tmp_path / "checkpoint_00000001.pt"))
    assert [draws() for _ in range(3)] == truth


def groups(model: nn.Module) -> list[dict]:
    weights, biases = ([p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False))
    return [
        {"params": weights, "part": "backbone", "weight_decay": 0.1},
        {"params": biases, "part": "pool", "weight_decay": 0.0},
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.rand(3, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_model_and_optimizer_return(tmp_path):
    """Loaded into new ones, they continue like the old ones, bit for bit."""

    def create() -> tuple[nn.Module, torch.optim.AdamW]:
        model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2))
        model[2].bias.requires_grad_(False)
        return model, torch.optim.AdamW(groups(model), lr=1e-2, fused=True)

    model, optimizer = create()
    train(model, optimizer, 3)
    path = tmp_path / "checkpoint_00000003.pt"
    checkpoints.write(
        path, {**checkpoints.model_and_optimizer(model, optimizer), "random": checkpoints.random_states()}, keep=1
    )
    content = checkpoints.read(path)
    train(model, optimizer, 3)
    other, other_optimizer = create()
    checkpoints.restore(other, other_optimizer, content)
    checkpoints.set_random_states(content["random"])
    train(other, other_optimizer, 3)
    for a, t in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, t)
    assert [g["part"] for g in other_optimizer.param_groups] == ["backbone", "pool"]
    assert [g["weight_decay"] for g in other_optimizer.param_groups] == [0.1, 0.0]


def test_average_that_is_missing(tmp_path):
    model = create_model(ModelConfig())
    path = checkpoint(tmp_path, 3, config={"model": {}}, model=model.state_dict())
    with pytest.raises(ValueError, match=r"3\.pt: expected averaged weights, which a run with optimizer.ema_decay has"):
        checkpoints.load_checkpoint(path, weights="ema")
    assert (
        not checkpoints.load_checkpoint(path).averaged and not checkpoints.load_checkpoint(path, weights="raw").averaged
    )


def test_published_layout(tmp_path):
    towers = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 50, "width": 64, "heads": 1, "layers": 1},
    }
    model = create_model(ModelConfig(json.dumps(towers), context_length=248))
    save_published(model, tmp_path / "x.safetensors")
    save_file(load_file(tmp_path / "x.safetensors"), tmp_path / "silent.safetensors")  # says nothing of heads
    halves = checkpoints.load_checkpoint(tmp_path / "silent.safetensors", head_width=32, pool_heads=2)
    assert halves.clip.transformer.resblocks[0].attn.num_heads == 2 and halves.pool.attn.num_heads == 2
    state = checkpoints.load_checkpoint(tmp_path / "x.safetensors").state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


def test_rejects(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt"):
        checkpoints.load_checkpoint(tmp_path / "other.pt")
    torch.save({"betaclip": 1, "code": Path}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match=r"pickle\.pt"):
        checkpoints.load_checkpoint(tmp_path / "pickle.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        checkpoints.load_checkpoint(tmp_path / "broken.safetensors")
    torch.save({"betaclip": 1, "model": {}}, tmp_path / "half.pt")
    with pytest.raises(
        ValueError, match=r"half\.pt: config.model: expected the configuration of a model, got NoneType"
    ):
        checkpoints.load_checkpoint(tmp_path / "half.pt")
    with pytest.raises(ValueError, match=r"other\.pt: expected averaged weights"):
        checkpoints.load_checkpoint(tmp_path / "other.pt", weights="ema")
    (tmp_path / "run").mkdir()
    model = {"config": {"model": {}}, "model": create_model(ModelConfig()).state_dict()}
    adapter = {"x.base_layer.weight": torch.ones(2, 3), "x.lora_A.default.weight": torch.ones(1, 3)}
    for changes, message in (
        (model | {"ema": [3]}, "ema: expected tensors by name, got list"),
        (model | {"ema": {"x": 3}}, "expected tensors by name"),
        (model | {"model": adapter}, "expected config.lora.alpha beside the weights of adapters, got None"),
        ({"config": {"model": {}, "lora": {"alpha": 2}}, "model": adapter}, "x: expected an adapter for a weight"),
        ({}, "config.model: expected the configuration of a model, got NoneType"),
        ({"config": {"model": {"pool_heads": "x"}}}, "config.model: pool_heads: expected int, got 'x'"),
        ({"config": {"model": {"odd": 1}}}, "config.model: unknown key 'odd'"),
        ({"model": None}, "expected 'model' of type dict"),
    ):
        path = checkpoint(tmp_path / "run", 3, **changes)
        for place in (path, tmp_path / "run"):
            with pytest.raises(ValueError, match=f"^{path}: {message}"):
                checkpoints.load_checkpoint(place)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt: no such file"):
        checkpoints.load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint_\*\.pt or model\.safetensors in this folder, nor "):
        checkpoints.load_checkpoint(tmp_path)


def test_weights_alone(tmp_path):
    """The file makes the model again, also as the weights that a run starts from; damage is one line."""
    file = tmp_path / "model.safetensors"
    model = create_model(ModelConfig(pool_heads=4, pool_norm_inputs=True, quick_gelu=True))
    checkpoints.save_weights(model, file)
    assert file.stat().st_size < 1.1 * sum(4 * p.numel() for p in model.parameters())
    assert checkpoints.model_config(file) == model.config
    given = create_model(ModelConfig(pretrained=str(file), pool_heads=4, pool_norm_inputs=True))
    for again in (checkpoints.load_checkpoint(file), checkpoints.load_checkpoint(tmp_path), given):
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    model.averaged = True
    checkpoints.save_weights(model, file)
    for weights in ("auto", "ema"):
        again = checkpoints.load_checkpoint(file, weights=weights)
        assert again.averaged
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="expected the weights after the last update, got their average alone"):
        checkpoints.load_checkpoint(file, weights="raw")
    tensors = {"clip.visual.proj": torch.zeros(2, 2)}
    for metadata, message in (
        ({"betaclip": "99", "config": "{}"}, "a later version of betaclip wrote it"),
        ({"betaclip": "2", "config": "{"}, "config: "),
        ({"betaclip": "2", "config": "{}"}, "config.model: expected the configuration of a model"),
        ({"betaclip": "2", "config": '{"model": {}}'}, "it lacks"),
    ):
        safetensors.torch.save_file(tensors, file, metadata)
        with pytest.raises(ValueError, match=f"^{file}: {message}[^\n]*$"):
            checkpoints.load_checkpoint(file)
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(ValueError, match=f"^{file}: cannot be read as safetensors"):
        checkpoints.load_checkpoint(file)
