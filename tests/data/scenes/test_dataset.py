"""Scenes as data: the same everywhere, examples, choices."""

import itertools
import os
import pickle
import subprocess
import sys
from collections import Counter
from random import Random

import numpy as np
import torch
from torch.utils.data import DataLoader

from betaclip.data.batches import Draw, collate
from betaclip.data.scenes.dataset import DIFFICULTIES, TEST, TRAIN, ScenesDataset, choices, scene
from betaclip.data.scenes.layout import random_layout
from betaclip.data.scenes.texts import describe
from betaclip.data.transforms import normalize
from betaclip.model.tokenizer import Tokenizer

DIGEST = """
import hashlib
from random import Random
from betaclip.data.scenes.drawing import draw
from betaclip.data.scenes.layout import random_layout
from betaclip.data.scenes.texts import describe
layouts = [(rng := Random(f"train/0/{i}"), random_layout(rng)) for i in range(20)]
told = [describe(layout, rng) for rng, layout in layouts]
drawn = [(image.tobytes(), boxes) for image, boxes in (draw(layout, 72) for _, layout in layouts)]
digest = hashlib.sha256(repr((told, drawn)).encode()).hexdigest()
"""
CAPTION = (
    "There are three shapes on a plain light green background. "
    "In the upper left is a large yellow plain circle. "
    "Below it is a large red plain circle. "
    "A large dotted red triangle sits in the lower right. "
    "The large dotted shape is to the right of the large yellow shape."
)
PHRASES = [
    "large plain yellow circle",
    "the large red plain circle",
    "the red circle",
    "the large dotted red triangle",
    "the large triangle",
    "a large yellow shape above a red circle",
    "a large triangle right of a large yellow shape",
]
BOXES = [
    (1, 2, 21, 21),
    (2, 27, 21, 46),
    (2, 27, 21, 46),
    (49, 50, 68, 67),
    (49, 50, 68, 67),
    (1, 2, 21, 46),
    (1, 2, 68, 67),
]
PIXELS = [
    [[190, 226, 190], [190, 226, 190], [190, 226, 190], [190, 226, 190]],
    [[190, 226, 190], [190, 226, 190], [190, 226, 190], [190, 226, 190]],
    [[190, 226, 190], [220, 44, 48], [190, 226, 190], [190, 226, 190]],
    [[190, 226, 190], [190, 226, 190], [190, 226, 190], [190, 226, 190]],
]


def test_is_the_same_in_every_process():
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    run = [sys.executable, "-c", f"{DIGEST}print(digest)"]
    there = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    here: dict[str, str] = {}
    exec(DIGEST, here)
    assert there == here["digest"]


def test_is_the_same_on_every_machine():
    """Scenes equal those drawn when this test was written; a change would make published figures incomparable."""
    shown = scene(0, 0, 72)
    assert shown.caption == CAPTION
    assert shown.phrases == PHRASES
    assert shown.boxes == BOXES
    assert np.abs(shown.image[::18, ::18].astype(int) - PIXELS).max() <= 1


def test_scenes_differ():
    shown = [scene(seed, i, split=split) for seed in (0, 1) for split in (TRAIN, TEST) for i in range(100)]
    assert len({s.caption for s in shown}) == len({s.image.tobytes() for s in shown}) == len(shown)


def test_is_one_scene_at_any_size():
    small, large = scene(3, 7, 72), scene(3, 7, 144)
    assert small.caption == large.caption and small.phrases == large.phrases
    assert large.image.shape == (144, 144, 3)
    np.testing.assert_allclose(np.array(small.boxes) * 2, large.boxes, atol=3)


def test_boxes_of_phrases():
    found = Counter()
    for i in range(100):
        shown, rng = scene(0, i), Random(f"train/0/{i}")
        _, phrases = describe(random_layout(rng), rng)
        assert shown.phrases == [phrase.text for phrase in phrases] and len(phrases) == len(shown.boxes)
        assert len(shown.thing_boxes) == len(shown.layout.things)
        for box, phrase in zip(shown.boxes, phrases, strict=True):
            named = np.array([shown.thing_boxes[k] for k in phrase.things])
            assert box == (*named[:, :2].min(0), *named[:, 2:].max(0))
            found[len(phrase.things)] += 1
        assert shown.caption == " ".join(shown.sentences)
    assert set(found) == {1, 2} and found[1] > found[2] > 50


def test_choices():
    values = Counter()
    for one in choices(5, 60, 96):
        shown = one.scene
        assert shown.image.shape == (96, 96, 3)
        thing = shown.layout.things[shown.thing_boxes.index(one.box)]
        assert one.positive.split()[1:] == list(thing.kind)
        assert tuple(one.negatives) == DIFFICULTIES
        for wrong, texts in enumerate(one.negatives.values(), start=1):
            assert len(set(texts)) == len(texts) == 10
            for text in texts:
                article, *words = text.split()
                assert article == "a"
                differs = [a != b for a, b in zip(thing.kind, words, strict=True)]
                assert sum(differs) == wrong
                values[tuple(differs)] += 1
    for wrong in range(1, 5):
        of = [count for differs, count in values.items() if sum(differs) == wrong]
        assert len(of) == [4, 6, 4, 1][wrong - 1] and min(of) >= 60  # every set of attributes, once per choice at least


def test_choices_are_reproducible_and_of_the_test_split():
    first, second = ([(c.scene.caption, c.box, c.positive, c.negatives) for c in choices(5, count)] for count in (4, 3))
    assert first[:3] == second
    assert [c[0] for c in first] == [scene(5, i, split=TEST).caption for i in range(4)]
    assert first[0][0] != next(choices(6, 1)).scene.caption


def test_dataset():
    dataset = ScenesDataset(10, 3, 72, Tokenizer())
    assert len(dataset) == 10
    example, shown = dataset[Draw(4, 99)], scene(3, 4)
    assert torch.equal(example.image, normalize(shown.image)) and example.image.shape == (3, 72, 72)
    assert example.texts == [shown.caption, *shown.sentences, *shown.phrases]
    assert example.levels == [0] + [1] * len(shown.sentences) + [2] * len(shown.phrases)
    assert example.tokens == [Tokenizer()(text) for text in example.texts]
    assert example.path == "scenes/train/3/4"
    assert ScenesDataset(10, 3, 72, Tokenizer(), TEST)[Draw(4, 0)].texts[0] == scene(3, 4, split=TEST).caption


def test_workers_change_nothing():
    dataset = pickle.loads(pickle.dumps(ScenesDataset(8, 0, 72, Tokenizer())))  # as a spawned worker has it
    options = {"batch_size": 3, "sampler": [Draw(i, i) for i in range(8)], "collate_fn": collate}
    alone = list(DataLoader(dataset, **options))
    together = list(DataLoader(dataset, num_workers=2, **options))
    for a, b in itertools.zip_longest(alone, together):
        assert torch.equal(a.images, b.images) and torch.equal(a.texts.tokens, b.texts.tokens) and a.paths == b.paths
