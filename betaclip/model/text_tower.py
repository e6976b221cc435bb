"""The text tower of an open_clip model on packed texts, and its stretched positions."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from betaclip.kernels.precision import autocast_dtype
from betaclip.layers import check_attention
from betaclip.model.blocks import Block, blocks_not_supported_reasons, replace_blocks, run_block
from betaclip.model.packed_attention import PackedAttention, packed_attention
from betaclip.model.packing import Packing, to_device

# Stretching keeps the first FROZEN positions and turns each later one into STRETCH positions.
FROZEN, STRETCH = 20, 4


class PackedBlock(Block):
    """A block that also takes packed texts."""

    @property
    def head_width(self) -> int:
        check_attention(self.attn, "the tower")
        return self.attn.head_dim

    def forward(
        self,
        q_x: Tensor,
        *args: Any,
        attention: PackedAttention | None = None,
        ends_only: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """(M, W) states of the nodes -> (M, W), or with ``ends_only`` (U, W) states of the texts' last tokens.

        Args:
            attention: that of the packed texts. None: compute as open_clip does, with its other arguments.
            ends_only: compute only the states of the last tokens, because nothing else is read from the last block.
        """
        if attention is None:
            return super().forward(q_x, *args, **kwargs)
        (weight, bias), normed, heads = self.in_projection(), self.ln_1(q_x), self.attn.num_heads
        if not ends_only:
            return self.add_attended(q_x, attention.causal(F.linear(normed, weight, bias), heads))
        width = q_x.shape[1]
        q = F.linear(attention.at_ends(normed), weight[:width], bias[:width])
        kv = F.linear(normed, weight[width:], bias[width:])
        return self.add_attended(attention.at_ends(q_x), attention.last(q, kv, heads))


class FrozenStart(nn.Module):
    """Parametrizes a table of positions by its later rows, which are trained; the first rows are frozen.

    frozen: (L, W) the table after stretching; only its first rows are read.
    unused: (FROZEN, W) the first rows of the trained table in the published layout, which nothing reads.
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
    """Number of positions after stretching ``length``: 248 for 77."""
    return FROZEN + STRETCH * (length - FROZEN)


def unstretched(length: int) -> int:
    """Number of positions before stretching to ``length``."""
    return FROZEN + (length - FROZEN) // STRETCH


def stretch_positions(clip: Any) -> None:
    """Stretch the text positions of a model in place, and freeze the first ones.

    The first FROZEN positions are kept. After each later one come three more, interpolated between it and the next;
    after the last one come three extrapolated beyond it.
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


def plain_positions(clip: Any, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take stretched positions in a state dict of a model apart: the state dict with a plain table of positions, as
    open_clip's layout has it, and the tensors that this leaves out. Others are returned as they are, with none."""
    text = text_modules(clip)
    if not is_parametrized(text, "positional_embedding"):
        return dict(state), {}
    prefix = "" if text is clip else "text."
    stretch = f"{prefix}parametrizations.positional_embedding."
    plain = {name: value for name, value in state.items() if not name.startswith(stretch)}
    frozen = state[f"{stretch}0.frozen"]
    plain[f"{prefix}positional_embedding"] = torch.cat((frozen[:FROZEN], state[f"{stretch}original"]))
    return plain, {name: state[name] for name in (f"{stretch}0.frozen", f"{stretch}0.unused")}


def with_stretched_positions(state: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that :func:`plain_positions` took apart. The frozen rows are those of the plain table."""
    whole = dict(state)
    for name, value in rest.items():
        prefix, stretch, part = name.partition("parametrizations.positional_embedding.")
        if part == "0.frozen":
            table = whole.pop(f"{prefix}positional_embedding")
            whole[f"{prefix}{stretch}original"] = table[FROZEN:]
            value = torch.cat((table[:FROZEN], value[FROZEN:]))
        whole[name] = value
    return whole


def text_modules(clip: Any) -> Any:
    """The module that holds the text tower's modules: ``clip.text`` if there is one, else the model itself."""
    return getattr(clip, "text", clip)


def text_not_supported_reasons(clip: Any) -> list[str]:
    """The reasons why the text tower of an open_clip model cannot take packed texts; empty if it can."""
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
    return [*reasons, *blocks_not_supported_reasons(text.transformer.resblocks, "text")]


def prepare_text(clip: Any) -> None:
    """Replace the blocks of the text tower, in place, by :class:`PackedBlock`."""
    replace_blocks(text_modules(clip).transformer.resblocks, PackedBlock)


def encode_packed(clip: Any, packing: Packing, device: torch.device, checkpointing: bool) -> Tensor:
    """Encode the distinct texts into (U, D) embeddings of their last tokens, projected but not normalised."""
    text = text_modules(clip)
    *blocks, last = text.transformer.resblocks
    tokens, positions = to_device(packing.tokens, device), to_device(packing.positions, device)
    x = text.token_embedding(tokens) + F.embedding(positions, text.positional_embedding)
    dtype = autocast_dtype(device.type) or x.dtype
    attention = packed_attention(packing, device, dtype, last.head_width)
    for block in blocks:
        x = run_block(block, x, checkpointing, attention=attention)
    x = text.ln_final(run_block(last, x, checkpointing, attention=attention, ends_only=True))
    projection = text.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Module) else x @ projection
