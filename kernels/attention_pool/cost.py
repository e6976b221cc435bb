"""The cost of attention pooling, forward and backward, with projected patches and with folded projections.

Per image, with L = H K latent queries, in multiply-adds:

    projected   6 P D² (keys and values, their two gradients each) + 7 K P D (attention, which recomputes its logits)
    folded      8 L P D (2 forward, 6 backward)                    + 7 K D² (folding, unfolding, their gradients)

At D = 512, H = 8 and P = 196 the two are equal near K = 40. There the bytes decide: projecting passes over arrays of
the patches' size 27 times (normalised patches, keys, values and their gradients, each written and read); folding does
so 3 times (x twice, dx), and works in scratch that stays in the outer caches, several times faster than memory.
P is a dimension of each image's products, which run at full rate only in panels of ``_PANEL``: 196 patches cost as much
as 224.
"""

from dataclasses import dataclass

import torch

_CACHED = 0.25  # cost of a byte that stays in the outer caches, relative to a byte of memory
_CACHE_BYTES = 8 * 2**20  # arrays of the patches' size stay in these caches, too, if they are not larger
_PANEL = 32

# FLOP in the time that one byte of memory takes, by device and bytes per element. CPU, float32: from 165 GFLOP/s and
# 15 GB/s, which both forms reach on two cores; benchmarks/pooling_throughput.py --crossover shows the choice beside the
# times. GPU, 16 bits: from an H200's 788 TFLOP/s and 4.3 TB/s; this choice has not been compared with times. The other
# entries follow from the ratios of the dtypes' rates.
_BALANCE = {("cpu", 2): 22, ("cpu", 4): 11, ("cpu", 8): 5.5, ("cuda", 2): 183, ("cuda", 4): 31, ("cuda", 8): 14}


@dataclass(frozen=True)
class Cost:
    """FLOP and bytes moved per image; bytes of scratch in cache count ``_CACHED``."""

    flop: float
    bytes: float


def projected_cost(images: int, queries: int, patches: int, width: int, num_heads: int, itemsize: int) -> Cost:
    """The cost of keys and values of every patch, fused attention, and their gradients, without work that both forms
    share."""
    flop = 2 * (6 * patches * width**2 + 7 * queries * patches * width)
    return Cost(flop, 27 * _bytes(images, patches, width, itemsize))


def _bytes(images: int, patches: int, width: int, itemsize: int) -> float:
    """Bytes that one image contributes to a (B, P, D) array; fewer count if the array stays in cache."""
    each = patches * width * itemsize
    return each if images * each > _CACHE_BYTES else _CACHED * each


def folded_cost(images: int, queries: int, patches: int, width: int, num_heads: int, itemsize: int) -> Cost:
    """The cost of attention by latent queries to the patches themselves, and of its gradients, without work that both
    forms share."""
    latents = num_heads * queries
    panels = -(-patches // _PANEL) * _PANEL
    flop = 2 * (8 * latents * panels * width + 7 * queries * width**2)
    scratch = latents * (18 * patches + 16 * width) * itemsize
    return Cost(flop, 3 * _bytes(images, patches, width, itemsize) + _CACHED * scratch)


def folding_pays(
    images: int, queries: int, patches: int, width: int, num_heads: int, dtype: torch.dtype, device: str
) -> bool:
    """Whether the folded form is expected to be faster. The answer is the same in training and evaluation, so that both
    compute the same numbers."""
    balance = _BALANCE.get((device, dtype.itemsize), _BALANCE["cuda", dtype.itemsize])
    projected, folded = (
        cost(images, queries, patches, width, num_heads, dtype.itemsize) for cost in (projected_cost, folded_cost)
    )
    return folded.flop + balance * folded.bytes < projected.flop + balance * projected.bytes
