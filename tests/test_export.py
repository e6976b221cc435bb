"""``betaclip export``: what it writes, loads as the same model, and what it refuses is one line."""

import json
from pathlib import Path

import pytest
import torch

from betaclip import checkpoint
from betaclip.cli import main
from betaclip.model.beta_clip import BetaCLIP, ModelConfig, create_model
from betaclip.published import load_published
from betaclip.settings import to_dict

TOWERS = json.dumps(
    {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    }
)
PUBLISHED = ModelConfig(name=TOWERS, context_length=248, pool_heads=3, quick_gelu=True)


def saved(path: Path, config: ModelConfig) -> BetaCLIP:
    model = create_model(config)
    content = {"betaclip": checkpoint.FORMAT, "step": 0, "config": {"model": to_dict(config)}}
    checkpoint.write(path, content | {"model": model.state_dict()}, keep=1)
    return model


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["export", *map(str, arguments), "--to", "published"])
    assert stopped.value.code == code
    error = capsys.readouterr().err
    assert error.startswith("betaclip export: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("folder", [True, False], ids=["run", "checkpoint"])
def test_written(tmp_path, capsys, folder):
    file, out = checkpoint.checkpoint_path(tmp_path, 0), tmp_path / "new" / "model.safetensors"
    model = saved(file, PUBLISHED)
    main(["export", str(tmp_path if folder else file), str(out), "--to", "published"])
    assert capsys.readouterr().out == f"{out}: written; betaclip reads it with --head-width 8 --pool-heads 3\n"
    again = load_published(out, head_width=8, pool_heads=3).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_refused(tmp_path, capsys):
    file, out = checkpoint.checkpoint_path(tmp_path, 0), tmp_path / "model.safetensors"
    saved(file, ModelConfig(name=TOWERS))
    message = fails(capsys, file, out)
    assert "expected context_length 248, got 77" in message and "not QuickGELU" in message and str(file) in message
    assert f"{tmp_path / 'no'}: no such file" in fails(capsys, tmp_path / "no", out)
    message = fails(capsys, file, tmp_path / "model.pt")
    assert f"output: expected a name that ends in .safetensors, got {tmp_path / 'model.pt'}" in message
    assert not out.exists()
    saved(file, PUBLISHED)
    assert "cannot be written" in fails(capsys, file, file / "model.safetensors", code=1)
