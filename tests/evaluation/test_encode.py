import logging

import pytest
import torch
from PIL import ExifTags, Image
from support import colours
from torch import nn

from betaclip.data.batches import Bad
from betaclip.data.transforms import read_image
from betaclip.evaluation.encode import Squash, batches, evaluating, log_unusable, read_pictures


def test_evaluating_returns_every_mode():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model[1].eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert model.training and model[0].training and not model[1].training and torch.is_grad_enabled()


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_read_pictures_in_order(tmp_path, caplog, depth):
    files = colours.save_seven(tmp_path)
    found = list(read_pictures([*files, colours.noise(9, 8)], Squash(32), depth))
    assert [picture is None for picture in found] == [False, False, True, False, False, False, True, False]
    for i, side in ((0, 32), (5, 32), (7, 8)):
        picture = found[i]
        assert picture is not None and picture[0].shape == (3, 32, 32) and picture[1] == (side, side)
    again = next(read_pictures([files[5]], Squash(32), 1))
    assert again is not None and found[5] is not None and torch.equal(again[0], found[5][0])
    assert f"left out {files[2]}" in caplog.text and f"left out {files[6]}" in caplog.text


def test_pictures_are_turned_unless_boxes_count_stored_pixels(tmp_path, caplog):
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


def test_batches():
    assert list(batches(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]] and list(batches([], 3)) == []


def test_long_lists_of_bad_data_are_cut(caplog):
    with caplog.at_level(logging.WARNING):
        log_unusable([Bad(f"path {i}", "gone") for i in range(30)])
    assert "path 19" in caplog.text and "path 20" not in caplog.text and "left out 10 more" in caplog.text
