"""Folders of exported models that are damaged or mixed up: the message names the file."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import TOKENIZER_MODEL

from betaclip.checkpoint import load_checkpoint
from betaclip.exported import REST, load_exported, save_open_clip, save_transformers
from betaclip.model.beta_clip import ModelConfig, create_model

SAVE = {"open_clip": save_open_clip, "transformers": save_transformers}
WEIGHTS = {"open_clip": "open_clip_model.safetensors", "transformers": "model.safetensors"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    model = create_model(ModelConfig(TOKENIZER_MODEL, context_length=248, pool_heads=2))
    for name, save in SAVE.items():
        save(model, folder / name)
    return folder


@pytest.mark.parametrize("name", SAVE)
def test_damage(tmp_path, exported, name):
    folder, weights = tmp_path / name, WEIGHTS[name]

    def rejected(message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message) as raised:
            load_checkpoint(folder)
        assert "\n" not in str(raised.value)
        shutil.rmtree(folder)

    shutil.copytree(exported / name, folder)
    (folder / weights).write_bytes((folder / weights).read_bytes()[:1000])
    rejected(rf"{weights}: cannot be read as safetensors")
    shutil.copytree(exported / name, folder)
    (folder / weights).unlink()
    rejected("No such file", FileNotFoundError)
    shutil.copytree(exported / name, folder)
    state = load_file(folder / weights)
    first = next(iter(state))
    save_file(state | {first: state[first][None].contiguous()}, folder / weights)
    rejected(rf"{weights}: {first}: expected shape")
    shutil.copytree(exported / name, folder)
    save_file(load_file(folder / REST), folder / REST)
    rejected(rf"{REST}: expected the settings of a model in its metadata: 'config'")
    shutil.copytree(exported / name, folder)
    save_file(load_file(folder / REST), folder / REST, {"config": '{"nme": "scenes"}'})
    rejected(rf"{REST}: expected the settings of a model in its metadata: unknown key 'nme'; the nearest is 'name'")
    shutil.copytree(exported / name, folder)
    (folder / REST).unlink()
    rejected(r"no checkpoint_\*.pt or model.safetensors in this folder, nor betaclip.safetensors", FileNotFoundError)


def test_trained_further_elsewhere(tmp_path, exported):
    """What another program has changed in the folder's weights counts, the first positions included."""
    shutil.copytree(exported / "open_clip", folder := tmp_path / "x")
    state = load_file(folder / "open_clip_model.safetensors")
    state["positional_embedding"] += 1
    save_file(state, folder / "open_clip_model.safetensors")
    found, before = load_exported(folder), load_exported(exported / "open_clip")
    torch.testing.assert_close(found.clip.positional_embedding, before.clip.positional_embedding + 1)
