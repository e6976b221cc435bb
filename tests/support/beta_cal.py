"""Batches for the options of the losses, and the loss of each text on the whole matrix."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from support.precision import assert_exact
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ["ce", "bce"]
B, K, D = 5, 3, 8


def batch(dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    """Leaves of unequal norms, a mask that leaves the second image no text, and weights of the texts."""
    shapes = (B, K, D), (B, K, D), (), ()
    image, text, scale, bias = (torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes)
    mask = torch.arange(K, device=DEVICE) < torch.tensor([3, 0, 1, 2, 3], device=DEVICE)[:, None]
    leaves = [t.requires_grad_() for t in (image, text, scale.abs() + 4, bias - 2)]
    return SimpleNamespace(
        image=image, text=text, scale=leaves[2], bias=leaves[3], mask=mask, leaves=leaves,
        weights=torch.rand(B, K, dtype=dtype, device=DEVICE) + 0.1,
    )  # fmt: skip


def dense_rows(
    form: str,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    beta: float = 0.4,
    mask: Tensor | None = None,
    smoothing: float = 0.0,
    divisor: str = "pairs",
    extra: Tensor | None = None,
    ids: Tensor | None = None,
    extra_ids: Tensor | None = None,
) -> Tensor:
    """(B, K) the loss of each text, 0 for padded ones: the docstrings' formulas."""
    kept = (torch.ones(image.shape[:2], device=image.device) if mask is None else mask).bool()
    own = torch.arange(len(image), device=image.device)[:, None].expand_as(kept)[kept]
    v, t = (F.normalize(embeds[kept], dim=-1) for embeds in (image, text))
    further = t[:0] if extra is None else F.normalize(extra, dim=-1)
    s, same = scale * v @ torch.cat((t, further)).T, F.pad(own[:, None] == own, (0, len(further)))
    w = F.pad(beta + (1 - beta) * torch.eye(len(t), dtype=s.dtype, device=s.device), (0, len(further))) * same
    out = torch.zeros_like(same)
    if ids is not None:
        columns = torch.cat((ids[kept], ids.new_full(further.shape[:1], -1) if extra_ids is None else extra_ids))
        out = (ids[kept][:, None] == columns) & (columns >= 0) & ~same
    if form == "bce":
        s = s + bias
        negatives = F.softplus(s).masked_fill(out, 0)
        rows = torch.where(same, w * F.softplus(-s), negatives).sum(1) / (len(s) if divisor == "pairs" else 1)
    else:
        rows = sum(_cross_entropy(*given, smoothing) for given in ((s, w, out), _transposed(s, w, out))) / 2
    return rows.new_zeros(kept.shape).masked_scatter(kept, rows)


def _transposed(*matrices: Tensor) -> list[Tensor]:
    """(N, N) from (N, N + E), whose further columns are no rows."""
    return [m[:, : len(m)].T for m in matrices]


def _cross_entropy(s: Tensor, w: Tensor, out: Tensor, smoothing: float) -> Tensor:
    target = w / w.sum(1, keepdim=True)
    if smoothing:
        return F.cross_entropy(s, target, reduction="none", label_smoothing=smoothing)
    return s.masked_fill(out, -torch.inf).logsumexp(1) - (target * s).sum(1)


def gradients(loss: Tensor, leaves: list[Tensor], incoming: Tensor | None = None) -> list[Tensor]:
    """The loss, and its gradients; 0 for a leaf that it does not depend on."""
    found = torch.autograd.grad(loss, leaves, incoming, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True))]


def assert_equal(ours: list[Tensor], truth: list[Tensor]) -> None:
    for a, t in zip(ours, truth, strict=True):
        assert_exact(a, t)


def ragged(b: SimpleNamespace, **slots: Any) -> dict[str, Any]:
    """The valid rows of the batch alone, as arguments of a loss; ``slots`` are further (B, K, ...) arguments."""
    index = torch.arange(B, device=DEVICE)[:, None].expand_as(b.mask)[b.mask]
    return {"image_embeds": b.image[b.mask], "text_embeds": b.text[b.mask], "image_index": index} | {
        name: value[b.mask] for name, value in slots.items()
    }
