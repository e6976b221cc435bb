"""Tile shapes of the Triton attention pooling kernels: fixed tables by architecture and bytes per element.

Rows of a tile (block_m) are latent queries, columns (block_n) patches. Forward: a block of 256 patches holds the usual
196 or 256 patches of an image, so that sums over patches need not be rescaled; its logits, 64 x 256 in float32, take
64 of a thread's 255 registers at eight warps. Float32 products (TF32x3) hold three parts of each operand and need
smaller blocks. Backward: tiles as for a matrix product, with two accumulators. Products: m are rows and n columns of
[dz; means] or of the patches' gradient, and d the patches or rows of weights that are summed over; sm_100 would spill
with sm_80's entry. Tests compile every entry ahead of time and check the machine code for spills. The interpreter's
tiles are small, so that a test of a few patches and queries covers several.
"""

from betaclip.kernels.architecture import Tile

FORWARD: dict[tuple[str, int], Tile] = {
    ("sm_90", 2): Tile(64, 256, 64, 8, 3),
    ("sm_90", 4): Tile(64, 64, 32, 8, 2),
    ("sm_80", 2): Tile(64, 256, 32, 8, 2),
    ("sm_80", 4): Tile(64, 64, 16, 8, 2),
    ("gfx942", 2): Tile(64, 256, 32, 8, 1),
    ("gfx942", 4): Tile(64, 128, 32, 8, 1),
    ("interpreter", 2): Tile(16, 16, 16, 4, 1),
    ("interpreter", 4): Tile(16, 16, 16, 4, 1),
}
BACKWARD: dict[tuple[str, int], Tile] = {
    ("sm_90", 2): Tile(64, 128, 64, 8, 3),
    ("sm_90", 4): Tile(64, 64, 32, 8, 2),
    ("sm_80", 2): Tile(64, 128, 32, 8, 2),
    ("sm_80", 4): Tile(64, 32, 32, 8, 2),
    ("gfx942", 2): Tile(64, 64, 32, 4, 1),
    ("gfx942", 4): Tile(64, 64, 32, 4, 1),
    ("interpreter", 2): Tile(16, 32, 16, 4, 1),
    ("interpreter", 4): Tile(16, 32, 16, 4, 1),
}
PRODUCTS: dict[tuple[str, int], Tile] = {
    ("sm_100", 2): Tile(128, 128, 64, 8, 3),
    ("sm_90", 2): Tile(128, 128, 64, 8, 3),
    ("sm_90", 4): Tile(64, 64, 32, 8, 2),
    ("sm_80", 2): Tile(64, 128, 32, 8, 3),
    ("sm_80", 4): Tile(64, 64, 32, 8, 2),
    ("gfx942", 2): Tile(128, 128, 32, 8, 1),
    ("gfx942", 4): Tile(64, 64, 32, 4, 1),
    ("interpreter", 2): Tile(16, 32, 16, 4, 1),
    ("interpreter", 4): Tile(16, 32, 16, 4, 1),
}
