"""The layout of published β-CLIP checkpoints, and conversion from and to it.

It has timm's names in the vision tower; in the text tower, q, k and v apart and two tables of positions.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from open_clip.model import CLIP
from open_clip.transformer import LayerScale
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from betaclip.layers import QuickGELU
from betaclip.model.text_tower import FROZEN, STRETCH, stretched, text_modules, unstretched

POOL = "text_conditioned_patches_block."
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
TABLES = ("positional_embedding", "positional_embedding_res")
STRETCHED = "clip.parametrizations.positional_embedding."


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors by name have the published layout."""
    return "positional_embedding_res" in state or any(name.startswith(POOL) for name in state)


def has_input_norms(state: Mapping[str, Tensor]) -> bool:
    """Whether the pooling block has LayerNorms of its inputs."""
    return any(name.startswith((f"{POOL}ln_1.", f"{POOL}ln_1_kv.")) for name in state)


def not_published_reasons(clip: nn.Module, config: Any) -> list[str]:
    """Why the layout cannot express a model with these towers and these settings; empty if it can."""
    if not isinstance(clip, CLIP):
        return [f"its towers are of type {type(clip).__name__}, not CLIP"]
    reasons = []
    if not is_parametrized(clip, "positional_embedding"):
        length = clip.context_length
        reasons.append(f"its positions are not stretched: expected context_length {stretched(length)}, got {length}")
    if not all(isinstance(b.mlp.gelu, QuickGELU) for t in (clip.visual, clip) for b in t.transformer.resblocks):
        reasons.append("its activation is not QuickGELU, which the layout assumes")
    if config.pool_norm_qkv or config.pool_add_zero_attn or not config.pool_mlp_ratio:
        reasons.append("its pooling block is FLAIR's in part (pool_norm_qkv, pool_add_zero_attn, pool_mlp_ratio 0)")
    if config.attended_patches:
        reasons.append("its patches attend in the last block (attended_patches)")
    return reasons + not_plain_reasons(clip)


def not_plain_reasons(clip: Any) -> list[str]:
    """List what a BetaCLIP's open_clip model has that OpenAI's CLIP lacks; empty if there is nothing."""
    reasons = []
    if getattr(clip, "logit_bias", None) is not None:
        reasons.append("it has a bias of the logits (init_logit_bias)")
    if any(isinstance(m, LayerScale) for m in clip.modules()):
        reasons.append("it has LayerScale")
    if isinstance(clip.visual.ln_pre, nn.Identity):
        reasons.append("its vision tower has no LayerNorm before the blocks")
    if not isinstance(text_modules(clip).text_projection, nn.Parameter):
        reasons.append("its text projection is not a plain matrix")
    return reasons


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the published layout to the state dict of a BetaCLIP with stretched positions."""
    rest, ours = dict(state), {}
    for name in state:
        if found := _QUERY.fullmatch(name):
            block, kind = found.groups()
            ours[f"clip.{block}in_proj_{kind}"] = torch.cat([rest.pop(f"{block}{x}_proj.{kind}") for x in "qkv"])
    frozen, trained = (rest.pop(name) for name in TABLES)
    ours |= {
        f"{STRETCHED}original": trained[FROZEN:],
        f"{STRETCHED}0.frozen": frozen,
        f"{STRETCHED}0.unused": trained[:FROZEN],
    }
    for name, value in rest.items():
        if name.startswith(POOL):
            ours["pool." + name.removeprefix(POOL)] = value
            continue
        name = renamed(name, _BEGINNINGS)
        if found := _VISION_BLOCK.fullmatch(name):
            name = found[1] + renamed(found[2], _PARTS)
        if name in ("visual.class_embedding", "visual.positional_embedding"):
            value = value.reshape(value.shape[-2:] if name.endswith("positional_embedding") else -1)
        ours["clip." + name] = value
    return ours


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a BetaCLIP with stretched positions to the published layout."""
    rest = dict(state)
    original, frozen, unused = (rest.pop(STRETCHED + name) for name in ("original", "0.frozen", "0.unused"))
    theirs = dict(zip(TABLES, (frozen, torch.cat((unused, original))), strict=True))
    beginnings, parts = ({ours: published for published, ours in names.items()} for names in (_BEGINNINGS, _PARTS))
    for name, value in rest.items():
        if name.startswith("pool."):
            theirs[POOL + name.removeprefix("pool.")] = value
            continue
        name = name.removeprefix("clip.")
        if found := _IN_PROJ.fullmatch(name):
            block, kind = found.groups()
            theirs |= {f"{block}{x}_proj.{kind}": part for x, part in zip("qkv", value.chunk(3), strict=True)}
            continue
        if found := _VISION_BLOCK.fullmatch(name):
            name = found[1] + renamed(found[2], parts)
        if name in ("visual.class_embedding", "visual.positional_embedding"):
            value = value.reshape(1, -1, value.shape[-1])
        theirs[renamed(name, beginnings)] = value
    return {name: value.contiguous() for name, value in theirs.items()}


def open_clip_config(state: Mapping[str, Tensor], vision_head_width: int, text_head_width: int) -> dict[str, Any]:
    """The open_clip configuration of towers with these sizes.

    Args:
        state: tensors of the published layout.
        vision_head_width, text_head_width: of the towers' attention heads, which no tensor shows.

    Raises:
        ValueError: a tensor that shows a size is missing or has no such size, or a width is not divisible by that of
            the heads.
    """
    vision_width, _, patch, _ = shape_of(state, "visual.patch_embed.proj.weight", "(width, 3, patch, patch)")
    _, positions, _ = shape_of(state, "visual.pos_embed", "(1, 1 + patches, width)")
    vocabulary, text_width = shape_of(state, "token_embedding.weight", "(vocabulary, width)")
    _, embed_dim = shape_of(state, "image_projection", "(width, embedding)")
    length, _ = shape_of(state, "positional_embedding", "(tokens, width)")
    vision_hidden, _ = shape_of(state, "visual.blocks.0.mlp.fc1.weight", "(hidden, width)")
    text_hidden, _ = shape_of(state, "transformer.resblocks.0.mlp.c_fc.weight", "(hidden, width)")
    if length <= FROZEN or stretched(unstretched(length)) != length:
        raise ValueError(f"positional_embedding: expected {FROZEN} rows and a multiple of {STRETCH}, got {length}")
    return TowerSizes(
        embed_dim, patch, positions, vision_width, vision_hidden, count_layers(state, "visual.blocks."),
        unstretched(length), vocabulary, text_width, text_hidden, count_layers(state, "transformer.resblocks."),
    ).open_clip_config(vision_head_width, text_head_width, "visual.pos_embed")  # fmt: skip


class TowerSizes(NamedTuple):
    """The sizes of a model's towers. positions: those of CLS and the patches."""

    embed_dim: int
    patch: int
    positions: int
    vision_width: int
    vision_hidden: int
    vision_layers: int
    context_length: int
    vocabulary: int
    text_width: int
    text_hidden: int
    text_layers: int

    def open_clip_config(self, vision_head_width: int, text_head_width: int, positions: str) -> dict[str, Any]:
        """The open_clip configuration; ``positions`` is the name of the tensor that shows the number of patches.

        Raises:
            ValueError: the patches are no square, or a width is not divisible by that of the heads.
        """
        grid = math.isqrt(self.positions - 1)
        if grid < 1 or grid**2 != self.positions - 1:
            raise ValueError(f"{positions}: expected 1 + the square of a number of rows, got {self.positions}")
        for tower, width, head_width in (
            ("vision", self.vision_width, vision_head_width),
            ("text", self.text_width, text_head_width),
        ):
            if head_width < 1 or width % head_width:
                raise ValueError(
                    f"head_width: expected a divisor of the {tower} tower's width {width}, got {head_width}"
                )
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": {
                "image_size": grid * self.patch,
                "patch_size": self.patch,
                "width": self.vision_width,
                "layers": self.vision_layers,
                "head_width": vision_head_width,
                "mlp_ratio": self.vision_hidden / self.vision_width,
            },
            "text_cfg": {
                "context_length": self.context_length,
                "vocab_size": self.vocabulary,
                "width": self.text_width,
                "heads": self.text_width // text_head_width,
                "layers": self.text_layers,
                "mlp_ratio": self.text_hidden / self.text_width,
            },
        }


def shape_of(state: Mapping[str, Tensor], name: str, form: str) -> tuple[int, ...]:
    """The shape of a tensor, which is checked to have as many dimensions as ``form`` and no empty one."""
    if name not in state:
        raise ValueError(f"{name}: expected {form}, but it is missing")
    shape = tuple(state[name].shape)
    if len(shape) != form.count(",") + 1 or 0 in shape:
        raise ValueError(f"{name}: expected {form}, got shape {shape}")
    return shape


def count_layers(state: Mapping[str, Tensor], blocks: str) -> int:
    """The number of blocks whose tensors begin with ``blocks`` and a number."""
    return len({name.removeprefix(blocks).split(".")[0] for name in state if name.startswith(blocks)})


def renamed(name: str, beginnings: Mapping[str, str]) -> str:
    """The name with another beginning, by the first of ``beginnings`` that it has."""
    for begin, other in beginnings.items():
        if name.startswith(begin):
            return other + name.removeprefix(begin)
    return name
