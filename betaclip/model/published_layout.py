"""The layout of published β-CLIP checkpoints, and conversion from and to it.

It has timm's names in the vision tower; in the text tower, q, k and v apart and two tables of positions.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from betaclip.model.text_tower import FROZEN, unstretched

_POOL = "text_conditioned_patches_block."
# Prefixes of published names and of open_clip's; the first that fits counts.
_BEGINNINGS = {
    "visual.cls_token": "visual.class_embedding",
    "visual.pos_embed": "visual.positional_embedding",
    "visual.patch_embed.proj": "visual.conv1",
    "visual.norm_pre": "visual.ln_pre",
    "visual.norm": "visual.ln_post",
    "visual.blocks": "visual.transformer.resblocks",
    "image_projection": "visual.proj",
}
# The same within the vision tower's blocks.
_PARTS = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_VISION_BLOCK = re.compile(r"(visual\.transformer\.resblocks\.\d+\.)(.+)")
_QUERY = re.compile(r"(transformer\.resblocks\.\d+\.attn\.)q_proj\.(weight|bias)")
_IN_PROJ = re.compile(r"(transformer\.resblocks\.\d+\.attn\.)in_proj_(weight|bias)")
# The frozen table, whose first rows are used, and the trained one, whose other rows are.
_TABLES = ("positional_embedding", "positional_embedding_res")
_STRETCHED = "clip.parametrizations.positional_embedding."


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors by name have the published layout."""
    return "positional_embedding_res" in state and f"{_POOL}logit_scale" in state


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the published layout to the state dict of a BetaCLIP with stretched positions."""
    rest, ours = dict(state), {}
    for name in state:
        if found := _QUERY.fullmatch(name):
            block, kind = found.groups()
            ours[f"clip.{block}in_proj_{kind}"] = torch.cat([rest.pop(f"{block}{x}_proj.{kind}") for x in "qkv"])
    frozen, trained = (rest.pop(name) for name in _TABLES)
    ours |= {
        f"{_STRETCHED}original": trained[FROZEN:],
        f"{_STRETCHED}0.frozen": frozen,
        f"{_STRETCHED}0.unused": trained[:FROZEN],
    }
    for name, value in rest.items():
        if name.startswith(_POOL):
            ours["pool." + name.removeprefix(_POOL)] = value
            continue
        name = _renamed(name, _BEGINNINGS)
        if found := _VISION_BLOCK.fullmatch(name):
            name = found[1] + _renamed(found[2], _PARTS)
        if name in ("visual.class_embedding", "visual.positional_embedding"):
            value = value.reshape(value.shape[-2:] if name.endswith("positional_embedding") else -1)
        ours["clip." + name] = value
    return ours


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a BetaCLIP with stretched positions to the published layout."""
    rest = dict(state)
    original, frozen, unused = (rest.pop(_STRETCHED + name) for name in ("original", "0.frozen", "0.unused"))
    theirs = dict(zip(_TABLES, (frozen, torch.cat((unused, original))), strict=True))
    beginnings, parts = ({ours: published for published, ours in names.items()} for names in (_BEGINNINGS, _PARTS))
    for name, value in rest.items():
        if name.startswith("pool."):
            theirs[_POOL + name.removeprefix("pool.")] = value
            continue
        name = name.removeprefix("clip.")
        if found := _IN_PROJ.fullmatch(name):
            block, kind = found.groups()
            theirs |= {f"{block}{x}_proj.{kind}": part for x, part in zip("qkv", value.chunk(3), strict=True)}
            continue
        if found := _VISION_BLOCK.fullmatch(name):
            name = found[1] + _renamed(found[2], parts)
        if name in ("visual.class_embedding", "visual.positional_embedding"):
            value = value.reshape(1, -1, value.shape[-1])
        theirs[_renamed(name, beginnings)] = value
    return {name: value.contiguous() for name, value in theirs.items()}


def open_clip_config(state: Mapping[str, Tensor], head_width: int) -> dict[str, Any]:
    """The open_clip configuration of towers with these sizes.

    Args:
        state: tensors of the published layout.
        head_width: of the towers' attention heads, which no tensor shows.

    Raises:
        ValueError: a width is not divisible by ``head_width``.
    """
    vision_width, _, patch, _ = state["visual.patch_embed.proj.weight"].shape
    grid = round((state["visual.pos_embed"].shape[1] - 1) ** 0.5)
    vocabulary, text_width = state["token_embedding.weight"].shape
    for tower, width in (("vision", vision_width), ("text", text_width)):
        if width % head_width:
            raise ValueError(f"head_width: expected a divisor of the {tower} tower's width {width}, got {head_width}")
    return {
        "embed_dim": state["image_projection"].shape[1],
        "vision_cfg": {
            "image_size": grid * patch,
            "patch_size": patch,
            "width": vision_width,
            "layers": _layers(state, "visual.blocks."),
            "head_width": head_width,
            "mlp_ratio": state["visual.blocks.0.mlp.fc1.weight"].shape[0] / vision_width,
        },
        "text_cfg": {
            "context_length": unstretched(len(state["positional_embedding"])),
            "vocab_size": vocabulary,
            "width": text_width,
            "heads": text_width // head_width,
            "layers": _layers(state, "transformer.resblocks."),
            "mlp_ratio": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / text_width,
        },
    }


def _layers(state: Mapping[str, Tensor], blocks: str) -> int:
    return len({name.removeprefix(blocks).split(".")[0] for name in state if name.startswith(blocks)})


def _renamed(name: str, beginnings: Mapping[str, str]) -> str:
    for begin, other in beginnings.items():
        if name.startswith(begin):
            return other + name.removeprefix(begin)
    return name
