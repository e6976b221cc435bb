"""Models in folders that open_clip and transformers load.

Beside the files of those libraries lies ``betaclip.safetensors``, which they pass over: the pooling block, the settings
of the model, and what makes its text positions stretched. With it, :func:`load_exported` reads the whole model again.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from open_clip.constants import HF_SAFE_WEIGHTS_NAME, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import convert_to_custom_text_state_dict
from safetensors.torch import save
from torch import Tensor

from betaclip.files import write_atomically, write_folder_atomically
from betaclip.model.beta_clip import BetaCLIP, ModelConfig, create_model
from betaclip.model.open_clip_towers import towers_config
from betaclip.model.text_tower import plain_positions, text_modules, with_stretched_positions
from betaclip.model.tokenizer import byte_pair_encoding
from betaclip.model.transformers_layout import (
    from_transformers,
    not_transformers_reasons,
    to_transformers,
    transformers_config,
)
from betaclip.model.weights import check_weights, read_metadata, read_weights
from betaclip.settings import from_dict, to_dict

REST = "betaclip.safetensors"
_TRANSFORMERS_WEIGHTS = "model.safetensors"
_BICUBIC = 3  # Pillow's number


def save_open_clip(model: BetaCLIP, folder: Path | str) -> None:
    """Write a folder that ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` and
    ``open_clip.get_tokenizer("local-dir:FOLDER")`` load.

    Args:
        model: any model.
        folder: a folder that does not exist yet, or is empty.

    Raises:
        ConfigError: the folder exists and is not empty.
        OutputError: it cannot be written.
    """
    towers, rest = _apart(model)
    config = towers_config(model.config.name)
    config["quick_gelu"] = model.config.quick_gelu or config.get("quick_gelu", False)
    config["text_cfg"]["context_length"] = model.context_length
    # The preprocessing of betaclip.data.transforms in open_clip's terms.
    preprocess = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "size": model.image_size,
                  "interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB"}  # fmt: skip
    with write_folder_atomically(folder) as partial:
        _write_json(partial / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
        _write_tensors(partial / HF_SAFE_WEIGHTS_NAME, towers)
        _write_rest(partial, model, rest)


def save_transformers(model: BetaCLIP, folder: Path | str) -> None:
    """Write a folder that transformers' ``CLIPModel.from_pretrained`` and ``CLIPProcessor.from_pretrained`` load.

    Args:
        model: a model whose towers differ from those of OpenAI's CLIP only in their sizes.
        folder: a folder that does not exist yet, or is empty.

    Raises:
        NotImplementedError: ``CLIPModel`` cannot hold the towers; the message lists every reason.
        ConfigError: the folder exists and is not empty.
        OutputError: it cannot be written.
    """
    reasons = not_transformers_reasons(model.clip)
    if reasons:
        raise NotImplementedError(f"transformers' CLIPModel cannot hold this model: {'; '.join(reasons)}")
    towers, rest = _apart(model)
    size = model.image_size
    vocabulary, merges = byte_pair_encoding("<|startoftext|>", "<|endoftext|>")
    with write_folder_atomically(folder) as partial:
        _write_json(partial / "config.json", transformers_config(model.clip) | {"dtype": "float32"})
        _write_tensors(partial / _TRANSFORMERS_WEIGHTS, to_transformers(towers))
        _write_json(
            partial / "preprocessor_config.json",
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_convert_rgb": True,
                "do_resize": True, "size": {"shortest_edge": size}, "resample": _BICUBIC,
                "do_center_crop": True, "crop_size": {"height": size, "width": size},
                "do_rescale": True, "rescale_factor": 1 / 255,
                "do_normalize": True, "image_mean": OPENAI_DATASET_MEAN, "image_std": OPENAI_DATASET_STD,
            },
        )  # fmt: skip
        end = {f"{name}_token": "<|endoftext|>" for name in ("eos", "pad", "unk")}
        _write_json(
            partial / "tokenizer_config.json",
            {"tokenizer_class": "CLIPTokenizer", "processor_class": "CLIPProcessor", "do_lower_case": True,
             "model_max_length": model.context_length, "bos_token": "<|startoftext|>", **end},
        )  # fmt: skip
        _write_json(partial / "vocab.json", vocabulary)
        with write_atomically(partial / "merges.txt") as file:
            file.write("\n".join(["#version: 0.2", *merges, ""]).encode())
        _write_rest(partial, model, rest)


def is_exported(folder: Path) -> bool:
    """Whether :func:`load_exported` reads the folder."""
    return (folder / REST).is_file()


def load_exported(folder: Path | str) -> BetaCLIP:
    """Read the model that :func:`save_open_clip` or :func:`save_transformers` wrote, pooling block included.

    Returns:
        The model, in float32 on the CPU.

    Raises:
        OSError: a file is missing or may not be read.
        ValueError: a file is damaged, or is of another model; the message is one line that names it.
    """
    folder = Path(folder)
    path = folder / REST
    rest, metadata = read_weights(path), read_metadata(path)
    try:
        config = from_dict(ModelConfig(), json.loads(metadata["config"]))
        model = create_model(config)
    except (KeyError, TypeError, AttributeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: expected the settings of a model in its metadata: {error}") from error
    expected, expected_rest = _apart(model)
    check_weights(rest, expected_rest, path)
    if (folder / HF_SAFE_WEIGHTS_NAME).is_file():
        towers = read_weights(folder / HF_SAFE_WEIGHTS_NAME)
        check_weights(towers, expected, folder / HF_SAFE_WEIGHTS_NAME)
    else:
        file = folder / _TRANSFORMERS_WEIGHTS
        theirs = read_weights(file)
        check_weights(theirs, to_transformers(expected), file)
        towers = from_transformers(theirs)
        if text_modules(model.clip) is not model.clip:
            towers = convert_to_custom_text_state_dict(towers)
        towers = {name: towers[name].reshape(value.shape) for name, value in expected.items()}
    model.load_state_dict(_together(towers, rest))
    return model


def _apart(model: BetaCLIP) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The towers in open_clip's layout, and the rest of the state dict under its own names."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    towers = {name.removeprefix("clip."): value for name, value in state.items() if name.startswith("clip.")}
    towers, positions = plain_positions(model.clip, towers)
    rest = {f"clip.{name}": value for name, value in positions.items()}
    return towers, rest | {name: value for name, value in state.items() if not name.startswith("clip.")}


def _together(towers: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that :func:`_apart` took apart."""
    return with_stretched_positions({f"clip.{name}": value for name, value in towers.items()}, rest)


def _write_rest(folder: Path, model: BetaCLIP, rest: dict[str, Tensor]) -> None:
    config = to_dict(replace(model.config, pretrained=None))
    _write_tensors(folder / REST, rest, {"config": json.dumps(config)})


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    with write_atomically(path) as file:
        file.write(save(tensors, {"format": "pt", **(metadata or {})}))  # without a format, transformers refuses it


def _write_json(path: Path, content: Any) -> None:
    with write_atomically(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
