"""Tile shapes of the Triton attention pooling kernels: a fixed table, chosen from architecture and dtype.

Forward. A block of 256 patches takes the usual 196 or 256 patches of an image at once, so that the sums over patches
are formed but once; its logits, 64 x 256 in float32, take 64 of a thread's 255 registers at eight warps. Float32
products (TF32x3) hold three parts of each operand and want smaller blocks. Backward. A tile like those of a matrix
product, two accumulators in one. Tests compile every entry ahead of time and read the machine code (no spill); none
has been timed on a GPU yet.
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


# By architecture and bytes per element.
FORWARD: dict[tuple[str, int], Tile] = {
    ("sm_90", 2): Tile(64, 256, 64, 8, 3),
    ("sm_90", 4): Tile(64, 64, 32, 8, 2),
    ("sm_80", 2): Tile(64, 256, 32, 8, 2),
    ("sm_80", 4): Tile(64, 64, 16, 8, 2),
    ("gfx942", 2): Tile(64, 256, 32, 8, 1),
    ("gfx942", 4): Tile(64, 128, 32, 8, 1),
}
BACKWARD: dict[tuple[str, int], Tile] = {
    ("sm_90", 2): Tile(64, 128, 64, 8, 3),
    ("sm_90", 4): Tile(64, 64, 32, 8, 2),
    ("sm_80", 2): Tile(64, 128, 32, 8, 3),
    ("sm_80", 4): Tile(64, 32, 32, 8, 2),
    ("gfx942", 2): Tile(64, 64, 32, 4, 1),
    ("gfx942", 4): Tile(64, 64, 32, 4, 1),
}


def _choose(table: dict[tuple[str, int], Tile], architecture: str, itemsize: int) -> Tile:
    """NVIDIA's other architectures share sm_80's tiles, AMD's others gfx942's."""
    if architecture.startswith("gfx"):
        return table["gfx942", itemsize]
    return table["sm_90" if architecture == "sm_90" else "sm_80", itemsize]


def forward_tile(architecture: str, itemsize: int) -> Tile:
    if architecture == "interpreter":  # small, so that a test of a few patches and queries meets several tiles
        return Tile(16, 16, 16, 4, 1)
    return _choose(FORWARD, architecture, itemsize)


def backward_tile(architecture: str, itemsize: int) -> Tile:
    if architecture == "interpreter":
        return Tile(16, 32, 16, 4, 1)
    return _choose(BACKWARD, architecture, itemsize)
