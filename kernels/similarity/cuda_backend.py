"""Launchers of the CUDA similarity kernels of csrc/, and the library products around them.

The forward is one call. The backward holds one square chunk of dS at a time, made by one fused kernel, and adds dS y
and dS^T x to accumulators by two library products. Scale, bias and incoming gradients are read on the device; nothing
here waits for it, and a CUDA graph can capture it.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from betaclip.kernels import libbetaclip as cuda
from betaclip.kernels.memory import aligned
from betaclip.kernels.similarity.chunks import Accumulators, amplification, logsumexp_vectors
from betaclip.kernels.similarity.contract import Operand
from betaclip.kernels.similarity.tiles import CHUNK_ROWS

MAX_DEPTH = 1024


def not_supported_reasons(x: Tensor, y: Tensor) -> list[str]:
    reasons = cuda.not_supported_reasons(x.device)
    if x.dtype not in cuda.DTYPES:
        reasons.append(f"multiplies bfloat16 and float16, not {x.dtype}")
    if not 0 < x.shape[1] <= MAX_DEPTH:
        reasons.append(f"serves D from 1 to {MAX_DEPTH}, not {x.shape[1]}")
    return reasons


@dataclass(frozen=True)
class Cuda:
    """The ``SimilarityBackend`` of csrc/; ``chunk_rows`` are the rows and columns of dS that it holds at a time."""

    chunk_rows: int = CHUNK_ROWS["sm_90", 2]

    def similarity_logsumexp_fwd(self, x: Operand, y: Operand, scale: Tensor) -> tuple[Tensor, Tensor]:
        launch = _Launch(x, y, scale)
        n, m = launch.x.shape[0], launch.y.shape[0]
        lse_x, lse_y = scale.new_empty(n), scale.new_empty(m)
        workspace = launch.workspace("betaclip_logsumexp_workspace_bytes", n, m)
        launch("betaclip_logsumexp_forward", lse_x, lse_y, workspace, workspace.numel())
        return lse_x, lse_y

    def similarity_logsumexp_bwd(
        self,
        x: Operand,
        y: Operand,
        scale: Tensor,
        lse_x: Tensor,
        lse_y: Tensor,
        dlse_x: Tensor,
        dlse_y: Tensor,
        need_dx: bool,
        need_dy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        launch = _Launch(x, y, scale)
        sums = Accumulators(launch.x, launch.y, launch.depth, self.chunk_rows, need_dx, need_dy)
        factor, vectors = logsumexp_vectors(lse_x[None], lse_y[None], dlse_x[None], dlse_y[None], x.dtype)
        pointers = {name: cuda.pointer(vector) for name, vector in vectors._asdict().items()}
        gradient = cuda.LogsumexpGradient(narrow=pointers.pop("single_exp_ok"), **pointers)
        for row, col, row_end, col_end, ds in sums.chunks():
            part = cuda.Chunk(ds.data_ptr(), ds.stride(1), row, row_end, col, col_end)
            launch("betaclip_logsumexp_ds", gradient, part)
        return sums.finish(scale, factor)

    def similarity_softplus_fwd(self, x: Operand, y: Operand, scale: Tensor, bias: Tensor | None) -> Tensor:
        launch = _Launch(x, y, scale)
        n, m = launch.x.shape[0], launch.y.shape[0]
        rows = scale.new_empty(n)
        workspace = launch.workspace("betaclip_softplus_workspace_bytes", n, m)
        launch("betaclip_softplus_forward", bias, rows, workspace, workspace.numel())
        return rows

    def similarity_softplus_fwd_bwd(
        self,
        x: Operand,
        y: Operand,
        scale: Tensor,
        bias: Tensor | None,
        drows: Tensor,
        need_dx: bool,
        need_dy: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        launch = _Launch(x, y, scale)
        sums = Accumulators(launch.x, launch.y, launch.depth, self.chunk_rows, need_dx, need_dy)
        rows = scale.new_zeros(launch.x.shape[0])
        sigmoid = None if bias is None else torch.zeros_like(rows)
        factor = drows.abs().max() / amplification(x.dtype)
        weight = torch.where(factor > 0, drows / factor, 0)
        workspace_of = functools.cache(functools.partial(launch.workspace, "betaclip_softplus_workspace_bytes"))
        for row, col, row_end, col_end, ds in sums.chunks():
            part = cuda.Chunk(ds.data_ptr(), ds.stride(1), row, row_end, col, col_end)
            workspace = workspace_of(row_end - row, col_end - col)
            launch("betaclip_softplus_ds", bias, weight, part, rows, sigmoid, workspace, workspace.numel())
        dbias = scale.new_zeros(()) if sigmoid is None else (sigmoid * drows).sum()
        return rows, *sums.finish(scale, factor), dbias


class _Launch:
    """The arguments that all calls on a pair of operands share. It keeps the operands' aligned copies alive."""

    def __init__(self, x: Operand, y: Operand, scale: Tensor) -> None:
        self.depth = x.rows.shape[1]
        self.x, self.y = (aligned(side.matrix(side.dtype), 8) for side in (x, y))
        self.operands = cuda.Operands(
            self.x.data_ptr(), self.y.data_ptr(),
            cuda.pointer(x.image_id), cuda.pointer(y.image_id), cuda.pointer(x.text_id), cuda.pointer(y.text_id),
            cuda.pointer(scale),
            self.x.stride(0), self.y.stride(0), self.x.shape[0], self.y.shape[0], self.x.shape[1],
            cuda.DTYPES[self.x.dtype],
        )  # fmt: skip

    def __call__(self, function: str, *arguments: Any) -> None:
        pointers = (cuda.pointer(a) if isinstance(a, Tensor) else a for a in arguments)
        cuda.launch(function, self.x.device, self.operands, *pointers)

    def workspace(self, function: str, rows: int, cols: int) -> Tensor:
        return cuda.workspace(function, rows, cols, self.x.device)
