"""Tile shapes of the Triton similarity kernels: fixed tables by architecture and bytes per element.

Nothing is tuned at run time: ranks of a job must agree, and a kernel must be importable without a GPU.

Timed on a GPU: sm_90 in 16 bits alone (``benchmarks/results/tuning.md``). Two programs of four warps share a
multiprocessor there, so that one multiplies while the other takes exponentials. Up to 696 bytes of a thread's registers
spill, and still the kernels take 12 to 25 % less time on an H200 (N = 36 864, D = 512) than with one program of eight
warps.

Reasons for the others. Operands come from L2 at 64 bytes per clock and SM at most; a 128 x 128 tile asks for just that
when the matrix units run at full rate, smaller tiles for more, and 128 x 256 spills in the backward. BLOCK_D * itemsize
= 128 bytes is the widest swizzle of TMA. Float32 runs as TF32x3, three products, so it waits less for memory; on
sm_80, whose operands pass through registers, 32 columns at a time leave no register (Triton 3.8 spills), 16 leave 75.
AMD's 64 KB of LDS hold two stages. sm_100 (B200; sm_103 takes the same) multiplies by tcgen05 from tensor memory; in
float32, 128 columns would spill in the merge. sm_120 (RTX 50) has TMA, but the matrix instructions of sm_80, and
99 KB of shared memory. Tests compile every entry ahead of time and read the machine code: the architecture's matrix
unit, and no spills but these and some bytes of one kernel each on sm_100 in 16 bits (24) and sm_80 (8).
"""

from betaclip.kernels.architecture import Tile

# Small, so that a test of a few dozen rows meets several tiles, strips and chunks.
_INTERPRETER = Tile(32, 16, 32, 4, 1)

TILES: dict[tuple[str, int], Tile] = {
    ("sm_120", 2): Tile(128, 128, 64, 8, 3, tma=True),
    ("sm_120", 4): Tile(128, 64, 32, 8, 3, tma=True),
    ("sm_100", 2): Tile(128, 128, 64, 8, 4, tma=True),
    ("sm_100", 4): Tile(128, 64, 32, 8, 4, tma=True),
    ("sm_90", 2): Tile(128, 128, 64, 4, 3, programs=2, tma=True),
    ("sm_90", 4): Tile(128, 128, 32, 8, 3, tma=True),
    ("sm_80", 2): Tile(128, 128, 32, 8, 4),
    ("sm_80", 4): Tile(128, 64, 16, 8, 4),
    ("gfx942", 2): Tile(128, 128, 32, 8, 2),
    ("gfx942", 4): Tile(64, 64, 32, 4, 2),
    ("interpreter", 2): _INTERPRETER,
    ("interpreter", 4): _INTERPRETER,
}

# The gradient of the sigmoid form, whose epilogue is the longest: an H200 hides it best behind two other programs.
SOFTPLUS_GRADIENT_TILES: dict[tuple[str, int], Tile] = {
    **TILES,
    ("sm_90", 2): Tile(128, 64, 64, 4, 3, programs=3, tma=True),
}

# The forward of the log-sum-exp with several prefixes.
PREFIX_FORWARD_TILES: dict[tuple[str, int], Tile] = {
    **TILES,
    ("sm_100", 2): Tile(128, 64, 64, 8, 4, tma=True),
    ("sm_90", 2): Tile(128, 128, 64, 8, 4, tma=True),
}

# Everything else with several prefixes. A tile's cosines outlive its epilogue, where the gradient also sums
# dS * cosine: these are the largest tiles with which no kernel spills.
PREFIX_TILES: dict[tuple[str, int], Tile] = {
    ("sm_120", 2): Tile(64, 64, 64, 8, 3, tma=True),
    ("sm_120", 4): Tile(64, 32, 32, 8, 3, tma=True),
    ("sm_100", 2): Tile(64, 64, 64, 8, 4, tma=True),
    ("sm_100", 4): Tile(64, 32, 64, 8, 2, tma=True),
    ("sm_90", 2): Tile(128, 64, 64, 8, 4, tma=True),
    ("sm_90", 4): Tile(64, 64, 32, 8, 3, tma=True),
    ("sm_80", 2): Tile(64, 64, 32, 8, 4),
    ("sm_80", 4): Tile(64, 32, 16, 8, 4),
    ("gfx942", 2): Tile(128, 64, 32, 8, 2),
    ("gfx942", 4): Tile(64, 64, 32, 4, 2),
    ("interpreter", 2): _INTERPRETER,
    ("interpreter", 4): _INTERPRETER,
}

# Rows and columns of the square of dS that the backward holds at a time, if memory allows. The two products over it
# should run at full rate: results of 4096 x 512 in tiles of 128 x 256 occupy 64 of an H100's 132 multiprocessors, those
# of 8192 x 512 fill 97 %. 8192 x 8192 in 16 bits (128 MiB) leave L2, but an H100 writes them at 0.6 TB/s and reads them
# at 1.0 TB/s, of memory's 3.0; an RTX 5090 at 0.4 of 1.8 TB/s. On an A100, 4096 x 4096 stay within 40 MiB of L2.
CHUNK_ROWS: dict[tuple[str, int], int] = {
    ("sm_120", 2): 8192,
    ("sm_120", 4): 4096,
    ("sm_100", 2): 8192,
    ("sm_100", 4): 4096,
    ("sm_90", 2): 8192,
    ("sm_90", 4): 4096,
    ("sm_80", 2): 4096,
    ("sm_80", 4): 2048,
    ("gfx942", 2): 4096,
    ("gfx942", 4): 2048,
    ("interpreter", 2): 64,
    ("interpreter", 4): 64,
}


def rectangles(row_tiles: int, col_tiles: int, programs: int) -> tuple[int, int]:
    """How many strips of rows and ranges of columns to cut the matrix of tiles into, one rectangle a program.

    The largest rectangle sets the time, so its area is minimised. Ties go to the smaller number of strips and ranges,
    which is how many partial sums each column and row has.
    """
    best = (row_tiles * col_tiles, 2, 1, 1)
    for strips in range(1, min(row_tiles, programs) + 1):
        ranges = min(col_tiles, programs // strips)
        area = -(-row_tiles // strips) * -(-col_tiles // ranges)
        best = min(best, (area, strips + ranges, strips, ranges))
    return best[2], best[3]
