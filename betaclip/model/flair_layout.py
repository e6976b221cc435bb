"""The layout of released FLAIR checkpoints (arXiv 2412.03561), and conversion from and to it.

It has open_clip's names in the towers, whose projections are apart from them; one scale and one bias serve both losses.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from betaclip.model.published_layout import TowerSizes, count_layers, renamed, shape_of

_POOL = "visual_proj."
# FLAIR's names and ours; the first that fits counts.
_BEGINNINGS = {
    _POOL: "pool.",
    "image_post.proj": "clip.visual.proj",
    "text_post.proj": "clip.text_projection",
    "": "clip.",
}
# The settings of a model that FLAIR's weights are made for.
FLAIR_SETTINGS: dict[str, Any] = {
    "pool_mlp_ratio": 0.0, "pool_norm_inputs": False, "pool_norm_qkv": True, "pool_add_zero_attn": True,
    "attended_patches": True,
}  # fmt: skip


def is_flair(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors by name have FLAIR's layout."""
    return any(name.startswith((_POOL, "image_post.", "text_post.")) for name in state)


def from_flair(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert FLAIR's layout to the state dict of a BetaCLIP. The pooling block's own scale, which FLAIR's losses do
    not read, is the one scale that FLAIR has."""
    ours = {renamed(name, _BEGINNINGS): value for name, value in state.items()}
    return ours | {"pool.logit_scale": ours["clip.logit_scale"].clone()}


def to_flair(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a BetaCLIP to FLAIR's layout, without the pooling block's own scale."""
    theirs = {ours: flair for flair, ours in _BEGINNINGS.items()}
    return {renamed(name, theirs): value for name, value in state.items() if name != "pool.logit_scale"}


def flair_config(state: Mapping[str, Tensor], vision_head_width: int, text_head_width: int) -> dict[str, Any]:
    """The open_clip configuration of towers with these sizes.

    Args:
        state: tensors of FLAIR's layout.
        vision_head_width, text_head_width: of the towers' attention heads, which no tensor shows.

    Raises:
        ValueError: a tensor that shows a size is missing or has no such size, or a width is not divisible by that of
            the heads.
    """
    vision_width, _, patch, _ = shape_of(state, "visual.conv1.weight", "(width, 3, patch, patch)")
    positions, _ = shape_of(state, "visual.positional_embedding", "(1 + patches, width)")
    vocabulary, text_width = shape_of(state, "token_embedding.weight", "(vocabulary, width)")
    _, embed_dim = shape_of(state, "image_post.proj", "(width, embedding)")
    length, _ = shape_of(state, "positional_embedding", "(tokens, width)")
    blocks = "transformer.resblocks."
    vision_hidden, _ = shape_of(state, f"visual.{blocks}0.mlp.c_fc.weight", "(hidden, width)")
    text_hidden, _ = shape_of(state, f"{blocks}0.mlp.c_fc.weight", "(hidden, width)")
    sizes = TowerSizes(
        embed_dim, patch, positions, vision_width, vision_hidden, count_layers(state, f"visual.{blocks}"),
        length, vocabulary, text_width, text_hidden, count_layers(state, blocks),
    )  # fmt: skip
    bias = {"init_logit_bias": 0.0} if "logit_bias" in state else {}
    return sizes.open_clip_config(vision_head_width, text_head_width, "visual.positional_embedding") | bias
