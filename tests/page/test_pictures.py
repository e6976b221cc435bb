"""The pictures of a page and the attention of their texts, of a model that attends to the colour it reads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import colours, shards

from betaclip.data.registry import DataConfig, MixtureSet, RetrievalConfig
from betaclip.data.scenes import dataset as scenes
from betaclip.data.transforms import denormalize, normalize
from betaclip.evaluation.tasks.pointing import pointing
from betaclip.model.tokenizer import Tokenizer
from betaclip.page import pictures as module
from betaclip.page.pictures import shown_pictures

MODEL = colours.ColourModel().eval()


@pytest.fixture
def own(tmp_path):
    """Five wide pictures of a red and a green square, with captions; the second cannot be read."""
    folder = tmp_path / "own"
    for i in range(5):
        colours.save(folder / f"{i}.png", colours.picture({(0, 1): "red", (2, 3): "green"}, 160, 64))
        (folder / f"{i}.txt").write_text(f"A red square {i}. The green one. One more.")
    colours.save_broken(folder / "1.png")
    return DataConfig(kind="pairs", annotations=folder, phrase_extractor="rules", max_phrases=0)


def test_scenes():
    """Test scenes, larger than the model sees them; the figures are those of the evaluation."""
    origin, pictures = shown_pictures(MODEL, DataConfig(scenes_seed=3), [])
    assert origin.startswith("Test scenes") and len(pictures) == module.PICTURES
    seen = scenes.scene(3, 0, colours.SIZE, scenes.TEST)
    first = pictures[0]
    assert first.about == seen.caption and [text.text for text in first.texts] == seen.phrases[: module.PHRASES]
    assert (first.drawing.width, first.drawing.height) == (module.MAX_SIDE, module.MAX_SIDE)
    left, top, width, height = (value * colours.SIZE / 100 for value in first.texts[0].place)
    assert (left, top, left + width, top + height) == pytest.approx(seen.boxes[0], abs=0.01)
    one = replace(seen, phrases=seen.phrases[:1], boxes=seen.boxes[:1])
    values = pointing(MODEL, Tokenizer(), [one], batch_size=1)
    assert first.texts[0].figure == f"{100 * values['mass_in_box']:.0f} %"
    assert f"which is {100 * values['box_share']:.0f} % of the picture" in first.texts[0].words


def test_rows_that_were_left_out(own):
    origin, pictures = shown_pictures(MODEL, replace(own, test_rows=3), [])
    assert "left out of the training" in origin
    assert [one.about[:14] for one in pictures] == ["A red square 0", "A red square 2"]
    first = pictures[0]
    assert (first.drawing.width, first.drawing.height) == (160, 64)  # the whole picture
    assert [text.text for text in first.texts] == ["A red square 0", "The green one"]
    assert first.top == pytest.approx(16, rel=0.01)
    assert [(text.figure, text.place) for text in first.texts] == [("16.0 ×", None)] * 2


def test_what_cannot_be_read_is_passed_over(own):
    """No row that was left out has its picture: a set of the evaluation takes their place."""
    for i in (0, 2):
        (own.annotations / f"{i}.png").write_bytes(b"no picture")
    sets = RetrievalConfig(pairs=own.annotations).read_retrieval_sets()
    origin, pictures = shown_pictures(MODEL, replace(own, test_rows=3), sets)
    assert origin == "Pictures of pairs, a set of the evaluation."
    assert [one.about[:14] for one in pictures] == ["A red square 3", "A red square 4"]
    for i in (3, 4):
        (own.annotations / f"{i}.png").write_bytes(b"no picture")
    assert shown_pictures(MODEL, replace(own, test_rows=3), sets) == ("", [])


def test_a_set_of_the_evaluation_goes_before_training_pictures(own):
    sets = RetrievalConfig(pairs=own.annotations).read_retrieval_sets()
    origin, pictures = shown_pictures(MODEL, own, sets)
    assert origin == "Pictures of pairs, a set of the evaluation." and len(pictures) == 4
    origin, pictures = shown_pictures(MODEL, own, [])
    assert "was trained on" in origin and len(pictures) == 4


def test_mixtures_and_shards(own, tmp_path):
    """Pictures without a file of their own are shown as the model has seen them."""
    caption = "A red square. The green one."
    path = shards.write_shard(tmp_path / "0.tar", [f for i in range(8) for f in shards.sample(i, caption, "txt")])
    stream = DataConfig(kind="shards", shards=path, epoch_samples=8, phrase_extractor="rules", max_phrases=0)
    origin, pictures = shown_pictures(MODEL, stream, [])
    assert "was trained on" in origin and len(pictures) == module.PICTURES
    assert (pictures[0].drawing.width, pictures[0].drawing.height) == (colours.SIZE, colours.SIZE)
    part = MixtureSet(kind="pairs", annotations=own.annotations, phrase_extractor="rules", max_phrases=0)
    mixture = DataConfig(kind="mixture", mixture={"a": part, "scenes": MixtureSet(scenes=10)})
    _, pictures = shown_pictures(MODEL, mixture, [])
    assert len(pictures) == module.PICTURES
    assert {one.drawing.width for one in pictures} == {colours.SIZE, 160}


def test_data_that_are_gone(own):
    with pytest.raises(FileNotFoundError):
        shown_pictures(MODEL, replace(own, annotations=own.annotations / "gone"), [])


def test_denormalize():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    assert np.array_equal(denormalize(normalize(image)), image)
    assert denormalize(torch.full((3, 1, 1), 1e3)).tolist() == [[[255, 255, 255]]]
