"""The losses over all ranks that benchmarks/global_batch.py compares: ours in two ways, open_clip's, Inf-CL's rings.

Each takes this rank's rows and returns a () loss. Forms: "ce" and "bce", β-CAL at K texts per image, ours alone;
"clip" is CLIP's loss of as many pairs as there are texts, where other libraries join: equal products, one value.
After an average over ranks of what each returns, loss and gradients are those of one process with the whole batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from batches import Batch
from dense import unit
from harness import Unavailable
from implementations import BETA
from torch import Tensor

from betaclip import BetaCALLoss
from betaclip.losses.across_ranks import TRANSPORTS

FORMS = ("ce", "bce", "clip")
Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class GlobalLoss:
    """build(form, batch) imports what it needs and returns the loss, or raises Unavailable.

    transport: of ours, whose cost is modelled; else None.
    """

    forms: tuple[str, ...]
    build: Callable[[str, Batch], Loss]
    transport: str | None = None


def beta_cal(form: str, gather: bool | str, backend: str = "auto") -> Loss:
    module = BetaCALLoss("bce" if form == "bce" else "ce", BETA, backend=backend, gather=gather)
    return lambda b: module(b.image, b.text, b.scale, mask=b.mask)


def _ours(transport: str, form: str, batch: Batch) -> Loss:
    return beta_cal(form, transport)


def _units(b: Batch) -> tuple[Tensor, Tensor]:
    """(B, D) normalised, which others leave to the model."""
    return unit(b.image).squeeze(1), unit(b.text).squeeze(1)


def _open_clip(form: str, batch: Batch) -> Loss:
    """Its way to many ranks: ``--local-loss --gather-with-grad``."""
    try:
        from open_clip.loss import ClipLoss
    except Exception as error:
        raise Unavailable(f"open_clip: {error}") from error
    module = ClipLoss(local_loss=True, gather_with_grad=True, rank=dist.get_rank(), world_size=dist.get_world_size())
    dtype, device = batch.image.dtype, batch.image.device.type
    half = dtype in (torch.bfloat16, torch.float16)

    def loss(b: Batch) -> Tensor:
        with torch.autocast(device, dtype if half else None, enabled=half):  # as its training script does
            return module(*_units(b), b.scale)

    return loss


def _inf_cl(name: str, form: str, batch: Batch) -> Loss:
    """``cal_ring_loss`` is its ring in plain PyTorch, ``cal_inf_loss`` the same ring around Triton kernels."""
    try:
        import inf_cl
    except Exception as error:
        raise Unavailable(f"inf_cl: {error}") from error
    if name == "cal_inf_loss" and batch.image.device.type != "cuda":
        raise Unavailable("inf_cl: its kernels need a GPU")
    if dist.get_world_size() == 1:
        raise Unavailable("inf_cl: its ring sends to itself on one rank")
    dim = batch.image.shape[-1]
    head = min(256, dim & -dim)
    if head < 16:
        raise Unavailable(f"inf_cl: needs D divisible by 16, not {dim}")
    ring = getattr(inf_cl, name)

    def loss(b: Batch) -> Tensor:
        v, t = _units(b)
        return (ring(v, t, scale=b.scale, head_dim=head) + ring(t, v, scale=b.scale, head_dim=head)) / 2

    return loss


def global_losses() -> Mapping[str, GlobalLoss]:
    """By name, in the order of the tables."""
    return {
        "open_clip": GlobalLoss(("clip",), _open_clip),
        "inf_cl/ring": GlobalLoss(("clip",), partial(_inf_cl, "cal_ring_loss")),
        "inf_cl/ring, Triton": GlobalLoss(("clip",), partial(_inf_cl, "cal_inf_loss")),
        **{f"betaclip/{way}": GlobalLoss(FORMS, partial(_ours, way), way) for way in TRANSPORTS},
    }
