"""Tile shapes of the Triton similarity kernels: a fixed table, chosen from architecture and dtype.

Nothing is tuned at run time: ranks of a job must agree, and a kernel must be importable without a GPU.

Reasons. Operands come from L2 at 64 bytes per clock and SM at most; a 128 x 128 tile asks for just that when the
matrix units run at full rate, smaller tiles for more, and 128 x 256 spills in the backward. BLOCK_D * itemsize
= 128 bytes is the widest swizzle of TMA. Float32 runs as TF32x3, three products, so it waits less for memory; on
sm_80, whose operands pass through registers, 32 columns at a time leave no register (Triton 3.8 spills), 16 leave 75.
AMD's 64 KB of LDS hold two stages. Tests compile every entry ahead of time and read the machine code (no spill,
wgmma on sm_90); none has been timed on a GPU yet.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Block sizes and compiler options; ``programs`` is how many share an SM."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    programs: int
    tma: bool = False


# By architecture and bytes per element.
TILES: dict[tuple[str, int], Tile] = {
    ("sm_90", 2): Tile(128, 128, 64, 8, 4, 1, tma=True),
    ("sm_90", 4): Tile(128, 128, 32, 8, 3, 1, tma=True),
    ("sm_80", 2): Tile(128, 128, 32, 8, 4, 1),
    ("sm_80", 4): Tile(128, 64, 16, 8, 4, 1),
    ("gfx942", 2): Tile(128, 128, 32, 8, 2, 1),
    ("gfx942", 4): Tile(64, 64, 32, 4, 2, 1),
}

# Small, so that a test of a few dozen rows meets several tiles, strips and chunks.
INTERPRETER = Tile(32, 16, 32, 4, 1, 1)


def choose(architecture: str, itemsize: int) -> Tile:
    """The tile for an architecture such as ``"sm_90"``; NVIDIA's others share sm_80's, AMD's others gfx942's."""
    if architecture == "interpreter":
        return INTERPRETER
    if architecture.startswith("gfx"):
        return TILES["gfx942", itemsize]
    return TILES["sm_90" if architecture == "sm_90" else "sm_80", itemsize]


def chunk(architecture: str, itemsize: int) -> int:
    """Rows and columns of the square of dS that the backward holds at a time.

    Large enough that the two products over it run at full rate, small enough to stay in the L2 cache between
    its making and its two uses: 4096 x 4096 in 16 bits is 32 MiB of the 50 MiB of an H100 or H200.
    """
    if architecture == "interpreter":
        return 48
    return 4096 if itemsize == 2 else 2048


def rectangles(row_tiles: int, col_tiles: int, programs: int) -> tuple[int, int]:
    """How many strips of rows and ranges of columns to cut the matrix of tiles into, one rectangle a program.

    The time is that of the largest rectangle, so its area is minimised; ties go to fewer strips and ranges,
    whose number is how many partial sums each column and row has.
    """
    best = (row_tiles * col_tiles, 2, 1, 1)
    for strips in range(1, min(row_tiles, programs) + 1):
        ranges = min(col_tiles, programs // strips)
        area = -(-row_tiles // strips) * -(-col_tiles // ranges)
        best = min(best, (area, strips + ranges, strips, ranges))
    return best[2], best[3]
