"""The losses that are compared: dense forms, stock PyTorch, peers, and ours, on one device and over ranks.

Forms: "ce" and "bce", β-CAL at K texts per image; "clip" and "siglip", the same at K = 1, where other libraries
join. Each implementation starts from raw embeddings and returns one () loss of the same value: "ce" and "bce"
as in the released code, "clip" as in open_clip, "siglip" as in open_clip (summed over texts, a mean over images).
Over ranks each takes its rank's rows; averaged over ranks, loss and gradients are those of one process with the whole
batch. Peers are imported when they are asked for, and raise Unavailable with the reason where they cannot run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from betaclip import BetaCALLoss
from betaclip.kernels.similarity.operators import BACKENDS
from betaclip.losses.across_ranks import TRANSPORTS
from common.batches import Batch
from common.dense_losses import LEAN, PUBLISHED, target_logits, unit, wide, within_images
from common.harness import Unavailable, compiled_afresh, peer, require

FORMS = ("ce", "bce", "clip", "siglip")
RANK_FORMS = ("ce", "bce", "clip")
BETA = 0.5
# Rows per chunk of linear_cross_entropy: its own choice on the CPU, where others are no faster (512 to 4096 rows
# differ by 4 % at N = 9216, one core) and take more memory; large products on a GPU.
CHUNK = {"cpu": None, "cuda": 4096}
FUSED = {  # peers' linear layer with cross-entropy: module and function
    "liger": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
    "quack": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
}

Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Implementation:
    """build(form, batch) imports what it needs and returns the loss, or raises Unavailable.

    copies: N × N matrices of float32 at least that exist at once, measured, rounded up. By them a run is refused that
    would exhaust the CPU's memory.
    compiles: the first call at a size compiles.
    """

    forms: tuple[str, ...]
    build: Callable[[str, Batch], Loss]
    copies: int = 0
    compiles: bool = False


def loss_flop(form: str, phase: str, n: int, dim: int, kept: int = 0) -> int:
    """FLOP that a loss needs: S for the value; dV and dT for gradients. For those of a softmax also S again, except
    ``kept`` elements; a sigmoid's need no statistic of the whole matrix.
    """
    again = max(n * n - kept, 0) if form in ("ce", "clip") else 0
    return 2 * dim * (n * n if phase == "forward" else 3 * n * n + again)


def _dense(table: Mapping[str, Callable[..., Tensor]], form: str, batch: Batch, compiled: bool = False) -> Loss:
    loss = table["bce" if form in ("bce", "siglip") else "ce"]
    if compiled:
        loss = compiled_afresh(loss)
    if form != "siglip":
        return lambda b: loss(b.image, b.text, b.scale, beta=BETA)
    return lambda b: len(b.image) * loss(b.image, b.text, b.scale, beta=BETA, bias=b.bias)


def _linear_cross_entropy(form: str, batch: Batch) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy (torch >= 2.13 has)")
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions(batch_chunk_size=CHUNK[batch.image.device.type])
    # "mean" would round the loss to the inputs' dtype; "none" forms S once more instead.
    reduction = "none" if batch.image.dtype in (torch.bfloat16, torch.float16) else "mean"

    def cross_entropy(x: Tensor, y: Tensor, own: Tensor) -> Tensor:
        return wide(F.linear_cross_entropy(x, y, own, reduction=reduction, options=options)).mean()

    return both_ways(cross_entropy, batch)


def _fused_cross_entropy(module: str, name: str, form: str, batch: Batch) -> Loss:
    return both_ways(getattr(peer(module, batch.image, needs_gpu=True), name), batch)


def both_ways(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor], batch: Batch) -> Loss:
    """A loss from two calls of a linear layer with cross-entropy, () mean over i of logsumexp_j S_ij - S_ii."""
    own = torch.arange(batch.image.shape[0] * batch.image.shape[1], device=batch.image.device)

    def loss(b: Batch) -> Tensor:
        v, t = unit(b.image, b.scale), unit(b.text)
        block, weights = within_images(v, t, BETA)
        x, y = v.flatten(0, 1), t.flatten(0, 1)
        to_text, to_image = (cross_entropy(*sides, own[: len(x)]) for sides in ((x, y), (y, x)))
        return (to_text + to_image) / 2 + block.diagonal(dim1=1, dim2=2).mean() - target_logits(block, weights)

    return loss


def _betaclip(backend: str, form: str, batch: Batch, gather: bool | str = False, keep: int | str = "auto") -> Loss:
    if backend != "auto":
        require(backend, batch.image, BACKENDS[backend](batch.image.flatten(0, 1), batch.text.flatten(0, 1)))
    loss = BetaCALLoss("bce" if form in ("bce", "siglip") else "ce", BETA, backend=backend, gather=gather, keep=keep)
    if form != "siglip":
        return lambda b: loss(b.image, b.text, b.scale)
    return lambda b: len(b.image) * loss(b.image, b.text, b.scale, logit_bias=b.bias)


def reference(form: str, batch: Batch) -> Loss:
    """Betaclip's dense reference, the definition of correct; call it in float64."""
    return _betaclip("reference", form, batch)


def _units(b: Batch) -> tuple[Tensor, Tensor]:
    """(B, D) normalised, for losses that leave it to the model."""
    return unit(b.image).squeeze(1), unit(b.text).squeeze(1)


def _open_clip(form: str, batch: Batch, over_ranks: bool = False) -> Loss:
    """open_clip's loss; over ranks with its ``--local-loss --gather-with-grad``."""
    library = peer("open_clip.loss", batch.image)
    ranks = {"local_loss": True, "gather_with_grad": True} if over_ranks else {}
    if over_ranks:
        ranks |= {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    module = library.SigLipLoss() if form == "siglip" else library.ClipLoss(**ranks)
    dtype, device = batch.image.dtype, batch.image.device.type
    half = dtype in (torch.bfloat16, torch.float16)

    def loss(b: Batch) -> Tensor:
        with torch.autocast(device, dtype if half else None, enabled=half):  # as its training script does
            return module(*_units(b), *((b.scale, b.bias) if form == "siglip" else (b.scale,)))

    return loss


def _siglip_kernel(form: str, batch: Batch) -> Loss:
    library = peer("siglip_kernel", batch.image)
    return lambda b: library.fused_siglip_loss(*_units(b), b.scale.log(), b.bias)


def _inf_cl(name: str, form: str, batch: Batch, needs_gpu: bool = True) -> Loss:
    """``cal_flash_loss`` on one device; over ranks ``cal_ring_loss``, its ring in plain PyTorch, and ``cal_inf_loss``,
    the same ring around Triton kernels."""
    library = peer("inf_cl", batch.image, needs_gpu)
    if name != "cal_flash_loss" and dist.get_world_size() == 1:
        raise Unavailable("inf_cl: its ring sends to itself on one rank")
    dim = batch.image.shape[-1]
    head_dim = min(256, dim & -dim)
    if head_dim < 16:
        raise Unavailable(f"inf_cl: needs D divisible by 16, not {dim}")
    one_way = getattr(library, name)

    def loss(b: Batch) -> Tensor:
        v, t = _units(b)
        return sum(one_way(x, y, scale=b.scale, head_dim=head_dim).mean() for x, y in ((v, t), (t, v))) / 2

    return loss


def implementations() -> dict[str, Implementation]:
    """Losses on one device by name, in the order of the tables."""
    ours = {f"betaclip/{x}": Implementation(FORMS, partial(_betaclip, x)) for x in BACKENDS if x != "reference"}
    fused = {name: Implementation(("ce", "clip"), partial(_fused_cross_entropy, *at)) for name, at in FUSED.items()}
    return {
        "published": Implementation(("ce", "bce"), partial(_dense, PUBLISHED), 14),
        "dense": Implementation(FORMS, partial(_dense, LEAN), 8),
        # For K = 1 it would compile the same code again.
        "compiled": Implementation(("ce", "bce"), partial(_dense, LEAN, compiled=True), 3, compiles=True),
        "linear_cross_entropy": Implementation(("ce", "clip"), _linear_cross_entropy),
        **fused,
        "open_clip": Implementation(("clip", "siglip"), _open_clip, 8),
        "siglip_kernel": Implementation(("siglip",), _siglip_kernel),
        "inf_cl": Implementation(("clip",), partial(_inf_cl, "cal_flash_loss")),
        **ours,
    }


def rank_implementations() -> dict[str, Implementation]:
    """Losses over the ranks of the default process group by name, in the order of the tables."""
    ours = {f"betaclip/{x}": Implementation(RANK_FORMS, partial(_betaclip, "auto", gather=x)) for x in TRANSPORTS}
    return {
        "open_clip": Implementation(("clip",), partial(_open_clip, over_ranks=True)),
        "inf_cl/ring": Implementation(("clip",), partial(_inf_cl, "cal_ring_loss", needs_gpu=False)),
        "inf_cl/ring, Triton": Implementation(("clip",), partial(_inf_cl, "cal_inf_loss")),
        **ours,
    }
