import json
from pathlib import Path

import pytest
from support import colours

from betaclip.errors import ConfigError
from betaclip.evaluation.sets import EvaluationConfig, read_sets


def fg_ovd_file(path: Path, file_names: list[str]) -> None:
    """A question about each of the images."""
    images = [{"id": i, "file_name": name} for i, name in enumerate(file_names)]
    question = {"bbox": [0, 0, 8, 8], "category_id": 0, "neg_category_ids": [1]}
    categories = [{"id": i, "name": name} for i, name in enumerate(("red", "green"))]
    annotations = [question | {"image_id": image["id"]} for image in images]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def test_nothing_is_named():
    sets = read_sets(EvaluationConfig())
    assert (sets.retrieval, sets.choices, sets.unusable) == ([], {}, [])


def test_sets_and_their_unusable_samples(tmp_path):
    colours.save(tmp_path / "image" / "1.png", colours.picture({}))
    colours.save(tmp_path / "image" / "2.png", colours.picture({}))
    (tmp_path / "caption").mkdir()
    (tmp_path / "caption" / "1.txt").write_text("red")
    colours.save(tmp_path / "val2017" / "1.png", colours.picture({}))
    fg_ovd_file(tmp_path / "1_attributes.json", ["val2017/1.png"])
    sets = read_sets(EvaluationConfig(urban1k=tmp_path, fg_ovd=tmp_path))
    assert [one.name for one in sets.retrieval] == ["urban1k"] and list(sets.choices) == ["hard"]
    (missing, bad) = sets.unusable
    assert [Path(one.path).name for one in missing] == ["2.png"] and bad == []


def test_rejects(tmp_path):
    with pytest.raises(
        ConfigError, match="has no file of any subset; their names begin with 1_attributes, h_attributes"
    ):
        read_sets(EvaluationConfig(fg_ovd=tmp_path))
    with pytest.raises(ConfigError, match="is not a folder"):
        read_sets(EvaluationConfig(dci=tmp_path / "nowhere"))
