"""Makes the open_clip model that a BetaCLIP is built on."""

import json
from typing import Any

import open_clip
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.pretrained import get_pretrained_cfg
from torch import nn

# A model that learns the rendered scenes on a CPU in minutes.
SCENES: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 72, "patch_size": 12, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}


def create_towers(name: str, tag: str | None, quick_gelu: bool) -> nn.Module:
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
        options = SCENES if name == "scenes" else _parse(name)
        options = options | {"quick_gelu": quick_gelu or options.get("quick_gelu", False)}
        kind = CustomTextCLIP if options.pop("custom_text", False) else CLIP
        try:
            return kind(**options)
        except TypeError as error:
            raise ValueError(
                f"name: expected the configuration of an open_clip model, got {name!r}: {error}"
            ) from error
    known = name.replace("/", "-")
    if known not in open_clip.list_models():
        raise ValueError(f"name: expected scenes, JSON, or one of {', '.join(open_clip.list_models())}; got {name!r}")
    tags = open_clip.list_pretrained_tags_by_model(known)
    if tag is not None and tag not in tags:
        raise ValueError(f"pretrained: expected a file, or one of {', '.join(tags)} for {name}; got {tag!r}")
    return open_clip.create_model(known, pretrained=tag, force_quick_gelu=quick_gelu)


def needs_quick_gelu(name: str, tag: str | None) -> bool:
    """Whether the weights of a tag were trained with QuickGELU."""
    return bool(tag and get_pretrained_cfg(name.replace("/", "-"), tag).get("quick_gelu"))


def _parse(name: str) -> dict[str, Any]:
    try:
        return json.loads(name)
    except json.JSONDecodeError as error:
        raise ValueError(f"name: expected JSON after an opening brace, got {name!r}: {error}") from error
