"""The cost of attention pooling, forward and backward, with projected patches and with folded projections.

Per image, with L = H K latent queries, in multiply-adds:

    projected   6 P D² (keys and values, their two gradients each) + 7 K P D (attention, which recomputes its logits)
    folded      8 L P D (2 forward, 6 backward; 7 where the forward keeps its weights, 6 where it keeps the means too)
                + 7 K D² (folding, unfolding, their gradients)

**CPU.** At D = 512, H = 8 and P = 196 the two are equal near K = 41. There the bytes decide: projecting passes over
arrays of the patches' size some 27 times (normalised patches, keys, values and their gradients, each written and read);
folding does so 3 times (x twice, dx), and works in scratch that stays in the outer caches, several times faster than
memory. P is a dimension of each image's products, which run at full rate only in panels of ``_PANEL``: 196 patches cost
as much as 224.

**GPU.** Nothing stays in a cache: folding passes over latent queries 15 times (z, g, means, dz and their products) and
over weights 6 times, and over the patches 5 times (norms, the three kernels, and dx). Its kernels compute whole tiles
and run at half of the library's rate (their share of the matrix rate in
``benchmarks/results/machine-code-sm_90.csv``). Both forms are launched in a dozen kernels, of which each costs a few
microseconds; tests count them.
"""

from dataclasses import dataclass

import torch

from betaclip.kernels.attention_pool.folded import KEPT_BYTES

_CACHED = 0.25  # cost of a byte that stays in the outer caches, relative to a byte of memory
_CACHE_BYTES = 8 * 2**20  # arrays of the patches' size stay in these caches, too, if they are not larger
_PANEL = 32
_BLOCK, _WIDE_BLOCK, _BLOCK_P_FORWARD = 64, 128, 256  # of the GPU kernels' tiles for 16 bits
_KERNEL_FLOP = 2  # time of an operation in these kernels, relative to one in a library's product
# Kernels that a GPU launches for forward and backward, one for each operation beside views.
PROJECTED_LAUNCHES, FOLDED_LAUNCHES = 13, 14


@dataclass(frozen=True)
class Machine:
    """FLOP and bytes per microsecond, and microseconds of each launch."""

    flop: float
    bytes: float
    launch: float


# By device and bytes per element. CPU, float32: 165 GFLOP/s and 15 GB/s, which both forms reach on two cores;
# benchmarks/pooling_throughput.py --crossover shows the choice beside the times. GPU, 16 bits: an H100's 700 TFLOP/s in
# library products, and 3.3 TB/s: an H200 is busy for the time of folding, while that of projecting was not compared.
# The other entries follow from the ratios of the dtypes' rates.
_MACHINES = {
    ("cpu", 2): Machine(330e3, 15e3, 0),
    ("cpu", 4): Machine(165e3, 15e3, 0),
    ("cpu", 8): Machine(82e3, 15e3, 0),
    ("cuda", 2): Machine(700e6, 3.3e6, 2),
    ("cuda", 4): Machine(120e6, 3.3e6, 2),
    ("cuda", 8): Machine(50e6, 3.3e6, 2),
}


@dataclass(frozen=True)
class Cost:
    """FLOP and bytes moved per image, those in cache counting ``_CACHED``; launches of the whole batch."""

    flop: float
    bytes: float
    launches: int

    def time_us(self, images: int, machine: Machine) -> float:
        return images * (self.flop / machine.flop + self.bytes / machine.bytes) + self.launches * machine.launch


def projected_cost(
    images: int, queries: int, patches: int, width: int, num_heads: int, itemsize: int, device: str = "cpu"
) -> Cost:
    """The cost of keys and values of every patch, fused attention, and their gradients, without work that both forms
    share."""
    flop = 2 * (6 * patches * width**2 + 7 * queries * patches * width)
    return Cost(flop, 27 * _bytes(images, patches, width, itemsize, device), PROJECTED_LAUNCHES)


def _bytes(images: int, patches: int, width: int, itemsize: int, device: str) -> float:
    """Bytes that one image contributes to a (B, P, D) array; fewer count if the array stays in a CPU's cache."""
    each = patches * width * itemsize
    return each if device != "cpu" or images * each > _CACHE_BYTES else _CACHED * each


def folded_cost(
    images: int, queries: int, patches: int, width: int, num_heads: int, itemsize: int, device: str = "cpu"
) -> Cost:
    """The cost of attention by latent queries to the patches themselves, and of its gradients, without work that both
    forms share."""
    latents = num_heads * queries
    of_patches, of_queries = _bytes(images, patches, width, itemsize, device), 7 * queries * width**2
    if device == "cpu":
        kept_bytes = 4 * latents * patches  # of float32, whatever the patches are
        kept = min(1, KEPT_BYTES["cpu"] / max(images * kept_bytes, 1))
        means_bytes = 4 * latents * width if images * 4 * latents * (patches + width) <= KEPT_BYTES["cpu"] else 0
        flop = 2 * ((8 - kept - (means_bytes > 0)) * latents * _padded(patches, _PANEL) * width + of_queries)
        scratch = latents * (18 * patches + 16 * width) * itemsize
        written_and_read = 2 * (kept * kept_bytes + means_bytes)
        return Cost(flop, 3 * of_patches + _CACHED * scratch + written_and_read, FOLDED_LAUNCHES)
    pairs, rows, columns = 2 * latents, _padded(latents, _BLOCK), _padded(patches, _WIDE_BLOCK)
    of_products = _padded(pairs, _WIDE_BLOCK) * _padded(patches, _BLOCK) + _padded(pairs, _BLOCK) * columns
    of_kernels = 2 * rows * _padded(patches, _BLOCK_P_FORWARD) + 2 * rows * columns + of_products
    flop = 2 * (_KERNEL_FLOP * of_kernels * width + of_queries)
    return Cost(flop, 5 * of_patches + latents * (6 * patches + 15 * width) * itemsize, FOLDED_LAUNCHES)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def folding_pays(
    images: int, queries: int, patches: int, width: int, num_heads: int, dtype: torch.dtype, device: str
) -> bool:
    """Whether the folded form is expected to be faster. The answer is the same in training and evaluation, so that both
    compute the same numbers."""
    device = device if device == "cpu" else "cuda"
    projected, folded = (
        cost(images, queries, patches, width, num_heads, dtype.itemsize, device).time_us(
            images, _MACHINES[device, dtype.itemsize]
        )
        for cost in (projected_cost, folded_cost)
    )
    return folded < projected
