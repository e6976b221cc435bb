"""Makes the open_clip model that a BetaCLIP is built on."""

import difflib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import open_clip
import torch
from open_clip.model import (
    CLIP,
    CustomTextCLIP,
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
)
from open_clip.pretrained import get_pretrained_cfg
from torch import Tensor

from betaclip.model.weights import OPENAI_SIZES, check_weights

# A model that learns the rendered scenes on a CPU in minutes.
SCENES: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 72, "patch_size": 12, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}


def create_towers(name: str, tag: str | None, quick_gelu: bool) -> Any:
    """Make an open_clip model.

    Args:
        name: an open_clip model, its configuration in JSON, or "scenes".
        tag: open_clip's name of pretrained weights; random weights if None.
        quick_gelu: use QuickGELU, whatever the configuration says.

    Raises:
        ValueError: unknown name or tag, or a configuration that open_clip does not take; the message says which.
    """
    if name == "scenes" or name.startswith("{"):
        if tag is not None:
            raise ValueError(f"pretrained: {tag} is not a file, and custom models have no pretrained tags")
        options = towers_config(name)
        options["quick_gelu"] = quick_gelu or options.get("quick_gelu", False)
        kind = CustomTextCLIP if options.pop("custom_text", False) else CLIP
        try:
            return kind(**options)
        except TypeError as error:
            raise ValueError(
                f"name: expected the configuration of an open_clip model, got {name!r}: {error}"
            ) from error
    known = known_model(name, "scenes, JSON, or a model of open_clip")
    if tag is not None:
        check_tag(known, tag)
    return create_known(known, tag, force_quick_gelu=quick_gelu)


def towers_config(name: str) -> dict[str, Any]:
    """open_clip's configuration of a name that :func:`create_towers` takes; a copy.

    Raises:
        ValueError: ``name`` is JSON that cannot be read.
    """
    if name == "scenes":
        return deepcopy(SCENES)
    return _parse(name) if name.startswith("{") else open_clip.get_model_config(name.replace("/", "-"))


def known_model(name: str, expected: str) -> str:
    """open_clip's own spelling of a model's name.

    Raises:
        ValueError: open_clip has no such model; the message names the nearest ones.
    """
    known, models = name.replace("/", "-"), open_clip.list_models()
    if known not in models:
        raise ValueError(f"name: expected {expected}, got {name!r}; {_nearest(known, models)}")
    return known


def check_tag(known: str, tag: str) -> None:
    """Check that open_clip has weights of this tag for a model.

    Raises:
        ValueError: it has none; the message names the nearest ones.
    """
    tags = open_clip.list_pretrained_tags_by_model(known)
    if tag not in tags:
        found = _nearest(tag, tags) if tags else "there are none"
        raise ValueError(f"pretrained: expected a file, or a tag that open_clip has for {known}, got {tag!r}; {found}")


def create_known(known: str, tag: str | None, **options: Any) -> Any:
    """``open_clip.create_model``, with its failures as messages of one line.

    Raises:
        ValueError: the weights or another file of the model cannot be downloaded, or do not fit.
    """
    try:
        with _without_alarm():
            return open_clip.create_model(known, pretrained=tag, **options)
    except (OSError, RuntimeError, ValueError) as error:
        if tag is None:
            raise ValueError(f"name: open_clip cannot make {known}: {one_line(error)}") from error
        message = f"pretrained: open_clip cannot load {tag} for {known}; without a network, give a file"
        raise ValueError(f"{message}: {one_line(error)}") from error


def create_tokenizer(known: str) -> Any:
    """``open_clip.get_tokenizer``, with its failures as messages of one line.

    Raises:
        ValueError: a file of the tokenizer cannot be downloaded, or the package that it needs is missing.
    """
    try:
        with _without_alarm():
            return open_clip.get_tokenizer(known)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise ValueError(f"name: open_clip cannot load the tokenizer of {known}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _nearest(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, n=3, cutoff=0)
    return f"the nearest {'is' if len(found) == 1 else 'are'} {', '.join(found)}"


@contextmanager
def _without_alarm() -> Iterator[None]:
    """Drop open_clip's warning that the weights are random, which they are meant to be, or are loaded next, and what it
    and the hub's client log of failures, since the last of these is raised."""

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "initialized randomly" not in message and "Failed to download" not in message

    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    logging.getLogger().addFilter(keep)
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)
        logging.getLogger().removeFilter(keep)


def needs_quick_gelu(name: str, tag: str | None) -> bool:
    """Whether the weights of a tag were trained with QuickGELU."""
    return bool(tag and get_pretrained_cfg(name.replace("/", "-"), tag).get("quick_gelu"))


def load_towers(clip: Any, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights in open_clip's layout, its older forms included.

    Positions of another resolution or context length are interpolated, as ``open_clip.load_checkpoint`` does.

    Raises:
        ValueError: they are those of another model; the message begins with ``source``.
    """
    state = {name: value for name, value in weights.items() if name not in OPENAI_SIZES}
    expected = clip.state_dict()
    if "text.positional_embedding" in expected:
        state = convert_to_custom_text_state_dict(state)
    if "logit_bias" in expected and "logit_scale" in state:  # weights of a model without one
        state.setdefault("logit_bias", torch.zeros_like(state["logit_scale"]))
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in expected and state[name].numel() == 1:
            state[name] = state[name].reshape(expected[name].shape)
    for name, resize in (
        ("visual.positional_embedding", resize_pos_embed),
        ("positional_embedding", resize_text_pos_embed),
        ("text.positional_embedding", resize_text_pos_embed),
    ):
        if name in state and name in expected and _only_longer(state[name], expected[name], name):
            state[name] = state[name].float()
            resize(state, clip)
    check_weights(state, expected, source)
    clip.load_state_dict(state)


def _only_longer(table: Tensor, expected: Tensor, name: str) -> bool:
    """Whether two tables of positions differ in their number of rows alone, so that one can be interpolated."""
    if table.dim() != 2 or table.shape[1] != expected.shape[1] or len(table) in (0, len(expected)):
        return False
    return not name.startswith("visual.") or (len(table) > 1 and math.isqrt(len(table) - 1) ** 2 == len(table) - 1)


def _parse(name: str) -> dict[str, Any]:
    try:
        return json.loads(name)
    except json.JSONDecodeError as error:
        raise ValueError(f"name: expected JSON after an opening brace, got {name!r}: {error}") from error
