"""Pictures on their way to the model: as they are seen, or as their pixels are stored, and without the unreadable."""

import torch
from PIL import ExifTags, Image
from support import colours

from betaclip.data.transforms import read_image
from betaclip.evaluation.encode import Squash, read_pictures


def test_read_pictures(tmp_path, caplog):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned, broken = tmp_path / "turned.png", colours.save_broken(tmp_path / "broken.png")
    Image.fromarray(colours.picture({(0, 0): "red"}, 64, 32)).save(turned, exif=exif)
    array = colours.picture({(1, 2): "blue"})
    for upright, size in ((True, (32, 64)), (False, (64, 32))):
        caplog.clear()
        first, second, third = read_pictures([turned, broken, array], Squash(16), depth=2, upright=upright)
        assert second is None and "broken.png" in caplog.text
        assert first is not None and first[1] == size
        assert torch.equal(first[0], Squash(16)(read_image(turned, upright=upright)))
        assert third is not None and torch.equal(third[0], Squash(16)(Image.fromarray(array)))
