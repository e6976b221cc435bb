"""Tile tables and the choice of their entries."""

import pytest

from betaclip.kernels.architecture import Tile, choose
from betaclip.kernels.attention_pool.tiles import BACKWARD, FORWARD
from betaclip.kernels.similarity.tiles import CHUNK_ROWS, TILES

TABLES = {"similarity": TILES, "forward": FORWARD, "backward": BACKWARD}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_every_table_serves_every_architecture(table, itemsize):
    """Architectures without an entry take that of their family's first one, or of their vendor's oldest."""
    assert table.keys() <= TILES.keys()
    size = min(itemsize, 4)
    for name in ("sm_80", "sm_90", "gfx942", "interpreter"):
        assert choose(table, name, itemsize) == table[name, size]
    assert choose(table, "sm_70", itemsize) == choose(table, "sm_86", itemsize) == table["sm_80", size]
    assert choose(table, "gfx1100", itemsize) == choose(table, "gfx950", itemsize) == table["gfx942", size]
    for name, first in (("sm_103", "sm_100"), ("sm_121", "sm_120")):
        assert choose(table, name, itemsize) == choose(table, first, itemsize)
        assert choose(table, first, itemsize) == table.get((first, size), table["sm_80", size])


def test_an_entry_is_all_that_a_new_architecture_needs():
    tile = Tile(128, 256, 64, 8, 4)
    assert choose({**TILES, ("sm_110", 2): tile}, "sm_110", 2) == tile


@pytest.mark.parametrize("itemsize", [2, 4])
def test_chunks_shrink_with_the_element(itemsize):
    """The square of dS is to fit into the L2 cache, or to fill the multiprocessors where memory is fast enough."""
    for name, megabytes in {"sm_80": 32, "gfx942": 32, "sm_90": 128, "sm_103": 128, "sm_120": 128}.items():
        assert itemsize * choose(CHUNK_ROWS, name, itemsize) ** 2 == megabytes * 2**20 // (itemsize // 2)
