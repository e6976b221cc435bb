"""Tile tables and the choice of their entries."""

import pytest

from betaclip.kernels.architecture import Tile, choose
from betaclip.kernels.attention_pool.tiles import BACKWARD, FORWARD
from betaclip.kernels.similarity.tiles import CHUNK_ROWS, TILES

TABLES = {"similarity": TILES, "forward": FORWARD, "backward": BACKWARD}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_every_table_serves_every_architecture(table, itemsize):
    """Architectures without an entry, such as Blackwell's sm_100, take that of their vendor's oldest one."""
    assert table.keys() == TILES.keys()
    size = min(itemsize, 4)
    for name in ("sm_80", "sm_90", "gfx942", "interpreter"):
        assert choose(table, name, itemsize) == table[name, size]
    assert choose(table, "sm_100", itemsize) == choose(table, "sm_86", itemsize) == table["sm_80", size]
    assert choose(table, "gfx1100", itemsize) == table["gfx942", size]


def test_an_entry_is_all_that_a_new_architecture_needs():
    tile = Tile(128, 256, 64, 8, 4)
    assert choose({**TILES, ("sm_100", 2): tile}, "sm_100", 2) == tile


def test_chunks_shrink_with_the_element():
    """The square of dS is to fit into the L2 cache."""
    for name in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for itemsize in (2, 4):
            assert itemsize * choose(CHUNK_ROWS, name, itemsize) ** 2 <= 32 * 2**20
