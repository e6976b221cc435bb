"""How the similarity kernels divide the matrix."""

import pytest

from betaclip.kernels.architecture import choose
from betaclip.kernels.similarity.tiles import CHUNK_ROWS, PREFIX_FORWARD_TILES, PREFIX_TILES, TILES, rectangles


@pytest.mark.parametrize(
    "row_tiles, col_tiles, programs", [(1, 1, 132), (18, 18, 132), (5, 700, 132), (4608, 4608, 264)]
)
def test_rectangles_cover_the_matrix(row_tiles, col_tiles, programs):
    strips, ranges = rectangles(row_tiles, col_tiles, programs)
    assert strips * ranges <= programs
    height, width = -(-row_tiles // strips), -(-col_tiles // ranges)
    assert height * strips >= row_tiles and width * ranges >= col_tiles
    # No program has much more than its share.
    assert height * width <= 1.35 * max(1, row_tiles * col_tiles / programs) + 1


def test_a_chunk_is_whole_tiles():
    tables = TILES, PREFIX_FORWARD_TILES, PREFIX_TILES
    assert all(table.keys() == CHUNK_ROWS.keys() for table in tables)
    for architecture, itemsize in TILES:
        for table in tables:
            tile = choose(table, architecture, itemsize)
            assert choose(CHUNK_ROWS, architecture, itemsize) % max(tile.block_m, tile.block_n) == 0
