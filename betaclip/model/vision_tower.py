"""The vision tower of an open_clip model, with patch embeddings as β-CLIP takes them from its last block."""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from betaclip.model.blocks import adopt, run, why_not_blocks


class VisionBlock(ResidualAttentionBlock):  # type: ignore[misc]
    """A block without the detours of ``nn.MultiheadAttention``."""

    def forward(self, q_x: Tensor, *_: Any, **__: Any) -> Tensor:
        """(B, L, W) -> (B, L, W)"""
        attn = self.attn
        qkv = F.linear(self.ln_1(q_x), attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = q_x + self.ls_1(attn.out_proj(out))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class LastVisionBlock(ResidualAttentionBlock):  # type: ignore[misc]
    """The last block: CLS attends as usual, each patch takes its own value, unmixed."""

    def forward(self, q_x: Tensor, *_: Any, **__: Any) -> Tensor:
        """(B, 1 + P, W) -> (B, 1 + P, W)"""
        attn, width = self.attn, q_x.shape[2]
        normed = self.ln_1(q_x)
        weight, bias = attn.in_proj_weight, attn.in_proj_bias
        query = F.linear(normed[:, :1], weight[:width], bias[:width])
        key, value = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=2)
        q, k, v = (t.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        cls = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = q_x + self.ls_1(attn.out_proj(torch.cat((cls, value[:, 1:]), dim=1)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


def why_not_vision(clip: Any) -> list[str]:
    """Why the vision tower of an open_clip model cannot give β-CLIP's patches."""
    visual = clip.visual
    if not isinstance(visual, VisionTransformer):
        kind = type(visual).__name__
        return [f"the vision tower is a {kind}, not open_clip's own VisionTransformer with its class token"]
    reasons = []
    if visual.attn_pool is not None:
        reasons.append("the vision tower pools by attention (attentional_pool)")
    elif visual.pool_type != "tok":
        reasons.append(f"the vision tower's pool_type is {visual.pool_type!r}, not the class token's 'tok'")
    if not isinstance(visual.patch_dropout, nn.Identity):
        reasons.append("the vision tower drops patches (patch_dropout)")
    if visual.image_size[0] != visual.image_size[1]:
        reasons.append(f"images are not square but {visual.image_size}")
    return [*reasons, *why_not_blocks(visual.transformer.resblocks, "vision")]


def prepare_vision(clip: Any) -> None:
    adopt(clip.visual.transformer.resblocks, VisionBlock, LastVisionBlock)


def encode_patches(visual: Any, images: Tensor, checkpointing: bool) -> Tensor:
    """(B, 1 + P, D) of CLS and of the patches, row by row: projected, not normalised."""
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    cls = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    x = visual.ln_pre(torch.cat((cls, patches), dim=1) + visual.positional_embedding.to(patches.dtype))
    for block in visual.transformer.resblocks:
        x = run(block, x, checkpointing)
    return visual.ln_post(x) @ visual.proj
