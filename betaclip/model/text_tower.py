"""The text tower of an open_clip model on packed texts, and its stretched positions."""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from betaclip.model.blocks import adopt, run, why_not_blocks
from betaclip.model.packed_attention import PackedAttention, packed_attention
from betaclip.model.packing import Packing, to_device

# Stretching keeps so many positions, and makes so many of each later one.
FROZEN, STRETCH = 20, 4


class PackedBlock(ResidualAttentionBlock):  # type: ignore[misc]
    """A block that also takes packed texts."""

    def forward(self, q_x: Tensor, *args: Any, texts: PackedAttention | None = None, **kwargs: Any) -> Tensor:
        """(M, W) -> (M, W) of the nodes of ``texts``; without, as open_clip's."""
        if texts is None:
            return super().forward(q_x, *args, **kwargs)
        attn = self.attn
        qkv = F.linear(self.ln_1(q_x), attn.in_proj_weight, attn.in_proj_bias)
        x = q_x + self.ls_1(attn.out_proj(texts.causal(qkv, attn.num_heads)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class LastPackedBlock(ResidualAttentionBlock):  # type: ignore[misc]
    """The last block, of which packed texts want their last tokens only."""

    def forward(self, q_x: Tensor, *args: Any, texts: PackedAttention | None = None, **kwargs: Any) -> Tensor:
        """(M, W) -> (U, W) of the last tokens of ``texts``; without, as open_clip's."""
        if texts is None:
            return super().forward(q_x, *args, **kwargs)
        attn, width = self.attn, q_x.shape[1]
        normed = self.ln_1(q_x)
        weight, bias = attn.in_proj_weight, attn.in_proj_bias
        q = F.linear(texts.of_ends(normed), weight[:width], bias[:width])
        kv = F.linear(normed, weight[width:], bias[width:])
        x = texts.of_ends(q_x) + self.ls_1(attn.out_proj(texts.last(q, kv, attn.num_heads)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class FrozenStart(nn.Module):
    """Positions of which the first are frozen: a parametrization of the whole table by its later rows.

    frozen: (L, W) the table as it was stretched; its first rows are used.
    unused: (FROZEN, W) rows that the published layout has in the trained table, and nothing reads.
    """

    frozen: Tensor
    unused: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("frozen", table.clone())
        self.register_buffer("unused", table[:FROZEN].clone())

    def forward(self, trained: Tensor) -> Tensor:
        return torch.cat((self.frozen[:FROZEN].to(trained.dtype), trained))

    def right_inverse(self, table: Tensor) -> Tensor:
        return table[FROZEN:].clone()


def stretched(length: int) -> int:
    """Positions after stretching: 248 for 77."""
    return FROZEN + STRETCH * (length - FROZEN)


def unstretched(length: int) -> int:
    return FROZEN + (length - FROZEN) // STRETCH


def stretch_positions(clip: Any) -> None:
    """Stretch the text positions of a model in place, and freeze the first.

    Those are kept; each later one is followed by three between it and the next, on the straight line, and the last one
    by three beyond it.
    """
    text = text_modules(clip)
    table = text.positional_embedding.detach()
    later = table[FROZEN:]
    step = later.diff(dim=0)
    step = torch.cat((step, step[-1:])) / STRETCH
    between = torch.arange(STRETCH, dtype=table.dtype, device=table.device)[:, None]
    table = torch.cat((table[:FROZEN], (later[:, None] + between * step[:, None]).flatten(0, 1)))
    text.positional_embedding = nn.Parameter(table)
    register_parametrization(text, "positional_embedding", FrozenStart(table))
    text.attn_mask = torch.full((len(table), len(table)), -torch.inf, device=table.device).triu_(1)
    text.context_length = clip.context_length = len(table)


def text_modules(clip: Any) -> Any:
    """What holds the modules of the text tower: the model itself, or its ``text``."""
    return getattr(clip, "text", clip)


def why_not_text(clip: Any) -> list[str]:
    """Why the text tower of an open_clip model cannot be packed."""
    text = text_modules(clip)
    if not (text is clip or isinstance(text, TextTransformer)):
        return [f"the text tower is a {type(text).__name__}, not open_clip's own"]
    reasons = []
    pool = text.text_pool_type if text is clip else text.pool_type
    if pool not in ("argmax", "eos"):
        reasons.append(f"the text tower's pool_type is {pool!r}, not 'argmax' or 'eos', which take the end token")
    if text.attn_mask is None:
        reasons.append("the text tower is not causal (no_causal_mask)")
    if getattr(text, "cls_emb", None) is not None:
        reasons.append("the text tower has a class token (embed_cls)")
    return [*reasons, *why_not_blocks(text.transformer.resblocks, "text")]


def prepare_text(clip: Any) -> None:
    adopt(text_modules(clip).transformer.resblocks, PackedBlock, LastPackedBlock)


def encode_packed(clip: Any, packing: Packing, device: torch.device, checkpointing: bool) -> Tensor:
    """(U, D) embeddings of the distinct texts at their last tokens: projected, not normalised."""
    text = text_modules(clip)
    blocks = text.transformer.resblocks
    tokens, positions = to_device(packing.tokens, device), to_device(packing.positions, device)
    x = text.token_embedding(tokens) + F.embedding(positions, text.positional_embedding)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x.dtype
    texts = packed_attention(packing, device, dtype, blocks[0].attn.head_dim)
    for block in blocks:
        x = run(block, x, checkpointing, texts=texts)
    x = text.ln_final(x)
    projection = text.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Module) else x @ projection
