"""The layout of transformers' ``CLIPModel``: its configuration, and conversion from and to open_clip's layout.

Towers in open_clip's layout have the names of ``open_clip.CLIP``; those of ``CustomTextCLIP`` have "text." before the
names of the text tower.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from betaclip.layers import QuickGELU
from betaclip.model.published_layout import not_plain_reasons, renamed
from betaclip.model.text_tower import text_modules
from betaclip.model.tokenizer import EOT, SOT

# Prefixes of open_clip's names and of transformers'; the first that fits counts.
_BEGINNINGS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # transformers' spelling
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
# The same within the blocks.
_PARTS = {
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_TRANSPOSED = ("visual.proj", "text_projection")
_BLOCK = re.compile(r"((?:visual\.)?transformer\.resblocks\.)(\d+\.)(.+)")
_LAYER = re.compile(r"((?:vision|text)_model\.encoder\.layers\.)(\d+\.)(.+)")
_QUERY = re.compile(r"self_attn\.q_proj\.(weight|bias)")
_TEXT = "text."


def not_transformers_reasons(clip: Any) -> list[str]:
    """Why ``CLIPModel`` cannot hold an open_clip model that is a BetaCLIP's; empty if it can."""
    text = text_modules(clip)
    reasons = not_plain_reasons(clip)
    for tower, blocks in (("vision", clip.visual.transformer.resblocks), ("text", text.transformer.resblocks)):
        kinds = {type(block.mlp.gelu).__name__ for block in blocks if _activation(block.mlp.gelu) is None}
        if kinds:
            reasons.append(f"its {tower} tower's activation is {', '.join(sorted(kinds))}")
    words = text.token_embedding.num_embeddings
    if words != EOT + 1:
        reasons.append(f"its vocabulary has {words} tokens, where that of CLIP's tokenizer has {EOT + 1}")
    return reasons


def transformers_config(clip: Any) -> dict[str, Any]:
    """The content of ``config.json`` for a ``CLIPModel`` with the sizes of an open_clip model."""
    visual, text = clip.visual, text_modules(clip)
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": visual.output_dim,
        "logit_scale_init_value": clip.logit_scale.item(),
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.token_embedding.num_embeddings,
            "max_position_embeddings": clip.context_length,
            "bos_token_id": SOT,
            "eos_token_id": EOT,
            "pad_token_id": EOT,
            **_tower_config(text.transformer.resblocks, text.ln_final, visual.output_dim),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": visual.image_size[0],
            "patch_size": visual.patch_size[0],
            **_tower_config(visual.transformer.resblocks, visual.ln_post, visual.output_dim),
        },
    }


def to_transformers(towers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert towers in open_clip's layout to the state dict of a ``CLIPModel``."""
    theirs: dict[str, Tensor] = {}
    for name, value in towers.items():
        name = name.removeprefix(_TEXT)
        if found := _BLOCK.fullmatch(name):
            layer = renamed(found[1], _BEGINNINGS) + found[2]
            if found[3].startswith("attn.in_proj_"):
                kind = found[3].removeprefix("attn.in_proj_")
                parts = zip("qkv", value.chunk(3), strict=True)
                theirs |= {f"{layer}self_attn.{x}_proj.{kind}": part for x, part in parts}
            else:
                theirs[layer + renamed(found[3], _PARTS)] = value
        else:
            theirs[renamed(name, _BEGINNINGS)] = value.T if name in _TRANSPOSED else value
    theirs["logit_scale"] = theirs["logit_scale"].reshape(())  # (1,) with nonscalar_logit_scale
    return {name: value.contiguous() for name, value in theirs.items()}


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a ``CLIPModel`` to towers with the names of ``open_clip.CLIP``."""
    beginnings, parts = ({theirs: ours for ours, theirs in names.items()} for names in (_BEGINNINGS, _PARTS))
    towers = {}
    for name, value in state.items():
        found = _LAYER.fullmatch(name)
        if found is None:
            ours = renamed(name, beginnings)
            towers[ours] = value.T.contiguous() if ours in _TRANSPOSED else value
        elif query := _QUERY.fullmatch(found[3]):
            layer, kind = found[1] + found[2], query[1]
            parts_of_three = [state[f"{layer}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            towers[f"{renamed(found[1], beginnings)}{found[2]}attn.in_proj_{kind}"] = torch.cat(parts_of_three)
        elif not found[3].startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            towers[renamed(found[1], beginnings) + found[2] + renamed(found[3], parts)] = value
    return towers


def _tower_config(blocks: Any, last_norm: nn.LayerNorm, embed_dim: int) -> dict[str, Any]:
    first = blocks[0]
    return {
        "hidden_size": first.attn.embed_dim,
        "intermediate_size": first.mlp.c_fc.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": _activation(first.mlp.gelu),
        "layer_norm_eps": last_norm.eps,
        "projection_dim": embed_dim,
    }


def _activation(module: nn.Module) -> str | None:
    """transformers' name of an activation."""
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    return None
