"""The vision tower of an open_clip model, with patch embeddings from the values of its last block, as in β-CLIP."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from betaclip.layers import attention
from betaclip.model.blocks import Block, blocks_not_supported_reasons, replace_blocks, run_block


class VisionBlock(Block):
    """A block that calls fused attention directly, and whose patches can take their own values instead of attending."""

    def forward(
        self,
        q_x: Tensor,
        *args: Any,
        attending: Literal["all", "cls"] | None = None,
        cls_only: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """(B, 1 + P, W) -> (B, 1 + P, W), or with ``cls_only`` (B, 1, W) the state of the class token.

        Args:
            attending: the tokens that attend. With ``"cls"`` each patch takes its own value instead, through the output
                projection. None: compute as open_clip does, with its other arguments.
            cls_only: compute only the state of the class token, because nothing else is read from the last block.
        """
        if attending is None:
            return super().forward(q_x, *args, **kwargs)
        (weight, bias), normed = self.in_projection(), self.ln_1(q_x)
        if attending == "all" and not cls_only:
            q, k, v = F.linear(normed, weight, bias).chunk(3, dim=2)
            return self.add_attended(q_x, self._attention(q, k, v))
        width = q_x.shape[2]
        q = F.linear(normed[:, :1], weight[:width], bias[:width])
        k, v = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=2)
        cls = self._attention(q, k, v)
        if cls_only:
            return self.add_attended(q_x[:, :1], cls)
        return self.add_attended(q_x, torch.cat((cls, v[:, 1:]), dim=1))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, Q, W), (B, L, W), (B, L, W) -> (B, Q, W)"""
        heads = (t.unflatten(2, (self.attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return attention(*heads).transpose(1, 2).flatten(2)


def vision_not_supported_reasons(clip: Any) -> list[str]:
    """The reasons why the vision tower of an open_clip model cannot give β-CLIP's patches; empty if it can."""
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
        reasons.append(f"the vision tower's images are not square but {visual.image_size}")
    return [*reasons, *blocks_not_supported_reasons(visual.transformer.resblocks, "vision")]


def prepare_vision(clip: Any) -> None:
    """Replace the blocks of the vision tower, in place, by :class:`VisionBlock`."""
    replace_blocks(clip.visual.transformer.resblocks, VisionBlock)


def encode_patches(
    visual: Any,
    images: Tensor,
    checkpointing: bool,
    attending: Literal["all", "cls"] = "cls",
    *,
    cls_only: bool = False,
) -> Tensor:
    """Encode images (B, 3, H, W) into (B, 1 + P, D): CLS, then the patches row by row; projected, not normalised.

    attending: the tokens that attend in the last block; CLS alone in β-CLIP. cls_only: encode into (B, 1, D), CLS, and
    leave out what only patches need.
    """
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    cls = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    x = visual.ln_pre(torch.cat((cls, patches), dim=1) + visual.positional_embedding.to(patches.dtype))
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = run_block(block, x, checkpointing, attending="all")
    x = run_block(last, x, checkpointing, attending=attending, cls_only=cls_only)
    return visual.ln_post(x) @ visual.proj
