"""Makes the open_clip model that a BetaCLIP is built on."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
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

from betaclip.errors import nearest
from betaclip.model.weights import OPENAI_SIZES, check_weights

# A model that learns the rendered scenes on a CPU in minutes. It starts from lower inverse temperatures than CLIP's
# 14.3, at which other pictures under the same text teach it more (docs/training.md).
SCENES: dict[str, Any] = {
    "embed_dim": 128,
    "init_logit_scale": math.log(8),
    "vision_cfg": {"image_size": 72, "patch_size": 12, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}


EXPECTED = "scenes, a configuration in JSON, or a model of open_clip"


def create_towers(name: str, tag: str | None, quick_gelu: bool) -> Any:
    """Make an open_clip model.

    Args:
        name: an open_clip model, its configuration in JSON, or "scenes".
        tag: open_clip's name of pretrained weights; random weights if None.
        quick_gelu: use QuickGELU, whatever the configuration says.

    Raises:
        ValueError: unknown name or tag, a configuration that open_clip does not take, or weights that cannot be
            fetched; the message says which.
    """
    known = None if is_custom(name) else known_model(name, EXPECTED)
    check_tag(name, tag)
    if known is None:
        options = towers_config(name)
        options["quick_gelu"] = quick_gelu or options.get("quick_gelu", False)
        kind = CustomTextCLIP if options.pop("custom_text", False) else CLIP
        try:
            return kind(**options)
        except TypeError as error:
            raise ValueError(
                f"name: expected the configuration of an open_clip model, got {name!r}: {error}"
            ) from error
    return create_known(known, tag, force_quick_gelu=quick_gelu)


def towers_config(name: str) -> dict[str, Any]:
    """The configuration of the towers of a name, as open_clip writes them; a copy.

    Raises:
        ValueError: unknown name, or no JSON after an opening brace.
    """
    if is_custom(name):
        return deepcopy(SCENES) if name == "scenes" else _parse(name)
    return dict(open_clip.get_model_config(known_model(name, EXPECTED)))


def known_model(name: str, expected: str) -> str:
    """open_clip's own spelling of a model's name.

    Raises:
        ValueError: open_clip has no such model; the message names the nearest one.
    """
    known, models = name.replace("/", "-"), open_clip.list_models()
    if known not in models:
        raise ValueError(f"name: expected {expected}, got {name!r}; the nearest is {nearest(known, models)!r}")
    return known


def check_tag(name: str, tag: str | None) -> None:
    """Raise a ValueError for a tag of weights that a model does not have."""
    if tag is None:
        return
    tags = [] if is_custom(name) else open_clip.list_pretrained_tags_by_model(name.replace("/", "-"))
    if not tags:
        raise ValueError(f"pretrained: {tag} is not a file, and {name:.40} has no pretrained tags")
    if tag not in tags:
        raise ValueError(f"pretrained: expected a file, or one of {', '.join(tags)} for {name}; got {tag!r}; "
                         f"the nearest is {nearest(tag, tags)!r}")  # fmt: skip


def is_custom(name: str) -> bool:
    """Whether a name is a configuration of ours or of the user's, rather than a model of open_clip."""
    return name == "scenes" or name.startswith("{")


def create_known(known: str, tag: str | None, **options: Any) -> Any:
    """``open_clip.create_model``, with its failures as messages of one line.

    Raises:
        ValueError: the weights or another file of the model cannot be fetched, or do not fit.
    """
    try:
        with _without_alarm():
            return open_clip.create_model(known, pretrained=tag, **options)
    except Exception as error:  # whatever the libraries between here and the hub raise
        if tag is None:
            raise ValueError(f"name: open_clip cannot make {known}: {one_line(error)}") from error
        raise ValueError(f"pretrained: the weights {tag} of {known} cannot be fetched ({one_line(error)}); "
                         "give the path of a file that holds them") from error  # fmt: skip


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
