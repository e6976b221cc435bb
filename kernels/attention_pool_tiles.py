"""Tile shapes of the Triton attention pooling kernels: a fixed table, chosen from architecture, dtype and width.

Forward. The running mean, (BLOCK_L, BLOCK_D) in float32 with BLOCK_D the power of two from D on, lives in registers:
64 x 512 takes 128 of a thread's 255 at eight warps, so wider patches halve BLOCK_L. The latent queries and a block of
patches, each over all of D, share the shared memory. Backward. A tile like those of a matrix product, two
accumulators in one. Tests compile every entry ahead of time and read the machine code (no spill); none has been timed
on a GPU yet.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Block sizes and compiler options of one kernel."""

    block_l: int
    block_p: int
    block_d: int
    num_warps: int
    num_stages: int


# By architecture, bytes per element and BLOCK_D (narrower patches use the first entry).
FORWARD: dict[tuple[str, int], dict[int, tuple[int, int, int, int]]] = {
    ("sm_90", 2): {256: (64, 64, 4, 2), 512: (64, 64, 8, 2), 1024: (32, 32, 8, 1)},
    ("sm_90", 4): {256: (32, 32, 4, 1), 512: (32, 32, 8, 1), 1024: (16, 16, 8, 1)},
    ("sm_80", 2): {256: (64, 64, 4, 2), 512: (64, 32, 8, 1), 1024: (32, 16, 8, 1)},
    ("sm_80", 4): {256: (32, 32, 4, 1), 512: (32, 16, 8, 1), 1024: (16, 16, 8, 1)},
    ("gfx942", 2): {256: (64, 32, 4, 1), 512: (32, 32, 8, 1), 1024: (16, 16, 8, 1)},
    ("gfx942", 4): {256: (32, 16, 4, 1), 512: (16, 16, 8, 1), 1024: (16, 16, 8, 1)},
}
BACKWARD: dict[tuple[str, int], Tile] = {
    ("sm_90", 2): Tile(64, 128, 64, 8, 3),
    ("sm_90", 4): Tile(64, 64, 32, 8, 2),
    ("sm_80", 2): Tile(64, 128, 32, 8, 3),
    ("sm_80", 4): Tile(64, 64, 32, 8, 2),
    ("gfx942", 2): Tile(64, 64, 32, 4, 1),
    ("gfx942", 4): Tile(64, 64, 32, 4, 1),
}
WIDEST = 1024


def _family(architecture: str) -> str:
    if architecture.startswith("gfx"):
        return "gfx942"
    return "sm_90" if architecture == "sm_90" else "sm_80"


def forward_tile(architecture: str, itemsize: int, width: int) -> Tile:
    """NVIDIA's other architectures share sm_80's tiles, AMD's others gfx942's."""
    block_d = max(16, 1 << (width - 1).bit_length())
    if architecture == "interpreter":  # small, so that a test of a few patches and queries meets several tiles
        return Tile(16, 16, block_d, 4, 1)
    tiles = FORWARD[_family(architecture), itemsize]
    block_l, block_p, num_warps, num_stages = tiles[min(size for size in tiles if size >= block_d)]
    return Tile(block_l, block_p, block_d, num_warps, num_stages)


def backward_tile(architecture: str, itemsize: int) -> Tile:
    """As for ``forward_tile``."""
    if architecture == "interpreter":
        return Tile(16, 32, 16, 4, 1)
    return BACKWARD[_family(architecture), itemsize]
