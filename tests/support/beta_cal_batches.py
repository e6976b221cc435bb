"""Batches and losses of the tests of β-CAL."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip import beta_cal_bce_loss, beta_cal_ce_loss
from betaclip.kernels.similarity.blockwise import Blockwise
from betaclip.kernels.similarity.contract import Operand
from betaclip.kernels.similarity.operators import BACKENDS

FORMS = ["ce", "bce"]
LOSSES = {"ce": beta_cal_ce_loss, "bce": beta_cal_bce_loss}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def require(backend: str, dtype: torch.dtype) -> None:
    probe = torch.zeros(1, 8, dtype=dtype, device=DEVICE)
    if reasons := BACKENDS[backend](probe, probe):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def batch(images: int = 6, texts: int = 5, dim: int = 24, dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    """Unnormalised embeddings, a ragged mask that leaves the second image without any text, and a scale."""
    image, text = (torch.randn(images, texts, dim, dtype=torch.float64).to(DEVICE, dtype) for _ in range(2))
    mask = torch.arange(texts) < torch.tensor([(3 * i + 4) % (texts + 1) for i in range(images)])[:, None]
    mask[0], mask[1:2] = True, False
    scale = torch.tensor(9.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=DEVICE)
    return SimpleNamespace(image=image, text=text, mask=mask.to(DEVICE), scale=scale)


def dense(form, image, text, scale, *, bias=0.0, weights=None, beta=0.5, alpha=1.0, mask=None) -> Tensor:
    """β-CAL on the whole matrix with padded texts left out: the docstrings' formulas, for any mask and weights."""
    images, texts, _ = image.shape
    if weights is None:
        weights = beta + (alpha - beta) * torch.eye(texts, dtype=image.dtype, device=image.device)
    weights = torch.block_diag(*weights.expand(images, texts, texts))
    same = torch.block_diag(*torch.ones(images, texts, texts, device=image.device)).bool()
    rows = torch.ones(images * texts, dtype=torch.bool, device=image.device) if mask is None else mask.flatten()
    v, t = (F.normalize(e.flatten(0, 1)[rows], dim=-1) for e in (image, text))
    s, w, same = scale * v @ t.T + bias, weights[rows][:, rows], same[rows][:, rows]
    if form == "bce":
        return torch.where(same, w * F.softplus(-s), F.softplus(s)).sum() / len(s) ** 2
    return (F.cross_entropy(s, w / w.sum(1, keepdim=True)) + F.cross_entropy(s.T, w.T / w.T.sum(1, keepdim=True))) / 2


class Recorder:
    """The blockwise backend; keeps which functions were called, and the dtypes of their products."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, torch.dtype]] = []

    def __getattr__(self, name: str):
        def call(x: Operand, *rest):
            self.calls.append((name, x.dtype))
            return getattr(Blockwise(), name)(x, *rest)

        return call


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]
