"""Launchers of the Triton attention pooling kernels: the two steps between the projections of the folded form."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from betaclip.kernels import architecture as triton_support
from betaclip.kernels.attention_pool.folded import Patches
from betaclip.kernels.attention_pool.tiles import Tile, backward_tile, forward_tile
from betaclip.kernels.precision import accumulation_dtype


def why_not(x: Tensor, q: Tensor) -> list[str]:
    """Reasons from metadata alone."""
    return triton_support.why_not(x)


class Fused:
    """``attention_pool_folded.Attention`` by one kernel each way; products in the dtype of the patches."""

    spares, keeps_lse = 0, True

    def dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype

    def forward(self, x: Patches, z: Tensor, means: Tensor, spare: Tensor) -> Tensor:
        tile = forward_tile(*_target(z))
        lse = z.new_empty(z.shape[:2], dtype=accumulation_dtype(z.dtype))
        sums = z.new_empty(z.shape, dtype=lse.dtype) if x.rows.shape[1] > tile.block_p else None
        grid = z.shape[0] * -(-z.shape[1] // tile.block_l)
        _launch(
            "_attention_pool_fwd_kernel", grid, tile, x, z, (means, lse, sums), z.shape[1], MANY_BLOCKS=sums is not None
        )
        return lse

    def backward(
        self, x: Patches, zg: Tensor, lse: Tensor, delta: Tensor, weights: Tensor, spare: Tensor
    ) -> Tensor | None:
        tile = backward_tile(*_target(zg))
        (images, texts, _, heads, _), patches = zg.shape, x.rows.shape[1]
        blocks = -(-texts * heads // tile.block_l)
        along = None if x.least is None else lse.new_empty(images, blocks, patches)
        _launch(
            "_attention_pool_bwd_kernel", images * blocks * -(-patches // tile.block_p), tile, x, zg,
            (lse, delta, weights, along), texts * heads, H=heads,
        )  # fmt: skip
        return None if along is None else along.sum(1)


def _target(t: Tensor) -> tuple[str, int]:
    return triton_support.architecture(t.device), min(t.element_size(), 4)


def _launch(
    kernel: str, grid: int, tile: Tile, x: Patches, z: Tensor, rest: tuple[Any, ...], latents: int, **constants: Any
) -> None:
    import triton.language as tl

    from betaclip.kernels.attention_pool import triton_kernels as attention_pool_triton_kernels

    rows = x.rows if x.rows.stride(2) == 1 else x.rows.contiguous()
    mask = None if x.mask is None else x.mask.contiguous().view(torch.uint8)
    guard = torch.cuda.device(rows.device) if rows.is_cuda else nullcontext()
    with guard:  # a kernel starts on the current device, wherever its tensors are
        getattr(attention_pool_triton_kernels, kernel)[(grid,)](
            rows, z, mask, *rest, rows.shape[1], latents, rows.stride(0), rows.stride(1),
            0 if mask is None else mask.stride(0),
            D=rows.shape[2], NORMALIZE=x.least is not None, LEAST=x.least or 0.0, HAS_MASK=mask is not None,
            BLOCK_L=tile.block_l, BLOCK_P=tile.block_p, BLOCK_D=tile.block_d,
            PRECISION=triton_support.precision(triton_support.architecture(rows.device), rows.dtype),
            ACC=tl.float64 if rows.dtype == torch.float64 else tl.float32,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **constants,
        )  # fmt: skip
