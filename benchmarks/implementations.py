"""The losses that benchmarks/loss_throughput.py compares: dense forms, stock PyTorch, peers, and ours.

Forms: "ce" and "bce", β-CAL at K texts per image; "clip" and "siglip", the same at K = 1, where other libraries
join. Each implementation starts from raw embeddings and returns one () loss of the same value: "ce" and "bce"
as in the released code, "clip" as in open_clip, "siglip" as in open_clip (summed over texts, a mean over images).
Peers are imported when they are asked for, and those that cannot run here say why.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from batches import Batch
from dense import LEAN, PUBLISHED, mean_over_valid, target_logits, unit, within_images
from harness import Unavailable
from torch import Tensor

from betaclip import BetaCALLoss
from betaclip.kernels.memory import forget
from betaclip.kernels.similarity.operators import BACKENDS

FORMS = ("ce", "bce", "clip", "siglip")
BETA = 0.5
# Rows per chunk of linear_cross_entropy: its own choice on the CPU, where others are no faster (512 to 4096 rows
# differ by 4 % at N = 9216, one core) and take more memory; large products on a GPU.
CHUNK = {"cpu": None, "cuda": 4096}


Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Implementation:
    """build(form, batch) imports what it needs and returns the loss, or raises Unavailable.

    copies: N × N matrices, and chunk: rows of one, of float32 at least, that exist at once in forward and in
    forward + backward; measured, rounded up. By them a run is refused that would exhaust the CPU's memory.
    compiles: the first call at a size compiles. forget: lets go of scratch kept between calls, for it to be counted.
    """

    forms: tuple[str, ...]
    build: Callable[[str, Batch], Loss]
    copies: tuple[float, float] = (0, 0)
    chunk: int = 0
    compiles: bool = False
    forget: Callable[[], None] = lambda: None

    def estimated_bytes(self, phase: str, n: int, dim: int, itemsize: int) -> int:
        """Peak above the inputs: the matrices, and eight arrays of the inputs' shape."""
        copies = self.copies[phase != "forward"]
        return int(copies * n * n + self.chunk * n + 8 * n * dim) * max(itemsize, 4)


def loss_flop(form: str, phase: str, n: int, dim: int) -> int:
    """FLOP that a loss which keeps no N × N matrix needs: S for the value; S again, dV and dT for softmax
    gradients; dV and dT only for sigmoid ones, which need no statistic of the whole matrix.
    """
    products = 1 if phase == "forward" else {"ce": 4, "clip": 4, "bce": 3, "siglip": 3}[form]
    return 2 * products * n * n * dim


def memory_limit_bytes(device_type: str, n: int, dim: int, itemsize: int) -> int:
    """What betaclip promises: on the CPU twice the inputs and 64 MiB, on GPUs four times the inputs and 512 MB."""
    inputs = 2 * n * dim * itemsize
    return 4 * inputs + 512 * 10**6 if device_type == "cuda" else 2 * inputs + 64 * 2**20


def _dense(table: Mapping[str, Callable[..., Tensor]], form: str, batch: Batch, compiled: bool = False) -> Loss:
    loss = table["bce" if form in ("bce", "siglip") else "ce"]
    if compiled:
        torch._dynamo.reset()  # static shapes, the fastest code, and no limit of recompilations to run into
        loss = torch.compile(loss, dynamic=False)
    if form != "siglip":
        return lambda b: loss(b.image, b.text, b.scale, beta=BETA, mask=b.mask)
    return lambda b: len(b.image) * loss(b.image, b.text, b.scale, beta=BETA, mask=b.mask, bias=b.bias)


def _linear_cross_entropy(form: str, batch: Batch) -> Loss:
    """Two calls of PyTorch's chunked linear + cross-entropy give logsumexp_j S_ij - S_ii, rows and columns."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy (torch >= 2.13 has)")
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions(batch_chunk_size=CHUNK[batch.image.device.type])
    rows = batch.image.shape[0] * batch.image.shape[1]
    own = torch.arange(rows, device=batch.image.device)
    if batch.mask is not None:
        own = torch.where(batch.mask.flatten(), own, -100)  # leaves the row out of the mean
    half = batch.image.dtype in (torch.bfloat16, torch.float16)

    def over_own(x: Tensor, y: Tensor, b: Batch) -> Tensor:
        """() mean of logsumexp_j S_ij - S_ii"""
        if not half:
            return F.linear_cross_entropy(x, y, own[: len(x)], options=options)
        # reduction="mean" would round the loss to the inputs' dtype; this forms S once more instead.
        rows = F.linear_cross_entropy(x, y, own[: len(x)], reduction="none", options=options)
        return mean_over_valid(rows.float().view(b.image.shape[:2]), b.mask)

    def loss(b: Batch) -> Tensor:
        v, t = unit(b.image, b.scale), unit(b.text)
        block, weights, _ = within_images(v, t, BETA, 1.0, b.mask)
        one_way, other = (over_own(x.flatten(0, 1), y.flatten(0, 1), b) for x, y in ((v, t), (t, v)))
        positives = block.diagonal(dim1=1, dim2=2) - target_logits(block, weights)
        return (one_way + other) / 2 + mean_over_valid(positives, b.mask)

    return loss


def _betaclip(backend: str, form: str, batch: Batch) -> Loss:
    if backend == "triton" and batch.image.device.type != "cuda":
        raise Unavailable("needs a GPU (its interpreter is for tests)")
    reasons = BACKENDS[backend](batch.image.flatten(0, 1), batch.text.flatten(0, 1))
    if reasons:
        raise Unavailable("; ".join(reasons))
    loss = BetaCALLoss("bce" if form in ("bce", "siglip") else "ce", BETA, padding="published", backend=backend)
    if form != "siglip":
        return lambda b: loss(b.image, b.text, b.scale, mask=b.mask)
    return lambda b: len(b.image) * loss(b.image, b.text, b.scale, mask=b.mask, logit_bias=b.bias)


def reference(form: str, batch: Batch) -> Loss:
    """The definition of correct: betaclip's dense reference, to be called in float64."""
    return _betaclip("reference", form, batch)


def _units(b: Batch) -> tuple[Tensor, Tensor]:
    """(B, D) normalised, for losses that leave it to the model."""
    return unit(b.image).squeeze(1), unit(b.text).squeeze(1)


def _open_clip(form: str, batch: Batch) -> Loss:
    try:
        from open_clip.loss import ClipLoss, SigLipLoss
    except Exception as error:
        raise Unavailable(f"open_clip: {error}") from error
    module = ClipLoss() if form == "clip" else SigLipLoss()
    dtype, device = batch.image.dtype, batch.image.device.type
    half = dtype in (torch.bfloat16, torch.float16)

    def loss(b: Batch) -> Tensor:
        with torch.autocast(device, dtype if half else None, enabled=half):  # as its training script does
            return module(*_units(b), *b.leaves[2:])

    return loss


def _siglip_kernel(form: str, batch: Batch) -> Loss:
    try:  # looks for a GPU when imported, and raises RuntimeError if there is none
        from siglip_kernel import fused_siglip_loss
    except Exception as error:
        raise Unavailable(f"siglip_kernel: {error}") from error
    return lambda b: fused_siglip_loss(*_units(b), b.scale.log(), b.bias)


def _inf_cl(form: str, batch: Batch) -> Loss:
    try:
        from inf_cl import cal_flash_loss
    except Exception as error:
        raise Unavailable(f"inf_cl: {error}") from error
    if batch.image.device.type != "cuda":
        raise Unavailable("inf_cl: needs a GPU")
    dim = batch.image.shape[-1]
    head = min(256, dim & -dim)
    if head < 16:
        raise Unavailable(f"inf_cl: needs D divisible by 16, not {dim}")

    def loss(b: Batch) -> Tensor:
        v, t = _units(b)
        one_way, other = (cal_flash_loss(x, y, scale=b.scale, head_dim=head).mean() for x, y in ((v, t), (t, v)))
        return (one_way + other) / 2

    return loss


def implementations() -> dict[str, Implementation]:
    """By name, in the order of the tables."""
    ours = {
        f"betaclip/{backend}": Implementation(FORMS, partial(_betaclip, backend), forget=forget)
        for backend in BACKENDS
        if backend != "reference"
    }
    return {
        "published": Implementation(("ce", "bce"), partial(_dense, PUBLISHED), (10, 13)),
        "dense": Implementation(FORMS, partial(_dense, LEAN), (4, 7)),
        # For K = 1 it would compile the same code again.
        "compiled": Implementation(("ce", "bce"), partial(_dense, LEAN, compiled=True), (2, 3), compiles=True),
        "linear_cross_entropy": Implementation(("ce", "clip"), _linear_cross_entropy, chunk=4 * 4096),
        "open_clip": Implementation(("clip", "siglip"), _open_clip, (5, 7)),
        "siglip_kernel": Implementation(("siglip",), _siglip_kernel),
        "inf_cl": Implementation(("clip",), _inf_cl),
        **ours,
    }
