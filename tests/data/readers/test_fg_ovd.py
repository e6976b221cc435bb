"""FG-OVD's two forms of files give the same choices, and bad rows are named."""

import json
import os

import pytest

from betaclip.data.multiple_choice import Choice
from betaclip.data.readers.fg_ovd import SUBSETS, fg_ovd_file, load_fg_ovd

TEXTS = ["A red mug", "A blue mug", "A green mug", "A glass vase", "A clear vase"]


@pytest.fixture
def images(tmp_path):
    for name in ("000000000001.jpg", "000000000002.jpg"):
        (tmp_path / "coco" / "train2017").mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco" / "train2017" / name).write_bytes(b"picture")
    return tmp_path / "coco"


@pytest.fixture
def expected(images):
    first, second = (images / "train2017" / f"00000000000{i}.jpg" for i in (1, 2))
    return [
        Choice(first, (10.5, 20.0, 40.5, 60.25), TEXTS[0], (TEXTS[1], TEXTS[2])),
        Choice(second, (0, 0, 5, 7), TEXTS[3], (TEXTS[4],)),
    ]


def benchmark():
    """The benchmark's own form; category and image numbers do not begin at 0, nor are rows in their order."""
    return {
        "images": [{"id": 75 + i, "file_name": f"train2017/00000000000{i}.jpg", "width": 640} for i in (2, 1, 3)],
        "categories": [{"id": 100 + i, "name": text, "frequency": "f"} for i, text in reversed([*enumerate(TEXTS)])],
        "annotations": [
            {"id": 7, "image_id": 76, "bbox": [10.5, 20.0, 30.0, 40.25], "area": 9, "category_id": 100,
             "neg_category_ids": [101, 102], "needs_revision": False},
            {"id": 8, "image_id": 77, "bbox": [0, 0, 5, 7], "category_id": 103, "neg_category_ids": [104]},
        ],
    }  # fmt: skip


def lines():
    """FG-CLIP's form."""
    return [
        {"img_path": "/train2017/000000000001.jpg", "bbox": [10.5, 20.0, 30.0, 40.25], "pos_expression": [TEXTS[0]],
         "neg_expression": TEXTS[1:3]},
        {"img_path": "train2017/000000000002.jpg", "bbox": [0, 0, 5, 7], "pos_expression": TEXTS[3],
         "neg_expression": TEXTS[4:]},
    ]  # fmt: skip


def write_lines(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_benchmark_form(tmp_path, images, expected):
    (tmp_path / "1_attributes.json").write_text(json.dumps(benchmark()))
    found = load_fg_ovd(tmp_path / "1_attributes.json", images)
    assert list(found) == expected and len(found) == 2 and found.bad == []


def test_lines_form(tmp_path, images, expected):
    found = load_fg_ovd(write_lines(tmp_path / "1_attributes_llava.jsonl", lines()), str(images))
    assert list(found) == expected and found.bad == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"img_path": None}, "image: expected a path, got None"),
        ({"img_path": "/"}, "image: expected a path, got '/'"),
        ({"img_path": "train2017/3.jpg"}, "image: .*train2017/3.jpg is not a file"),
        ({"img_path": "../coco/train2017/000000000001.jpg"}, "image '../coco/.*' is outside the folder"),
        ({"img_path": "//../coco/train2017/000000000001.jpg"}, "image '../coco/.*' is outside the folder"),
        ({"pos_expression": []}, r"positive: expected a text, got \[\]"),
        ({"pos_expression": ["a", "b"]}, "positive: expected a text, got"),
        ({"neg_expression": []}, r"negatives: expected texts, got \[\]"),
        ({"neg_expression": ["a", " "]}, "negatives: expected texts, got"),
        ({"neg_expression": None}, "negatives: expected texts, got None"),
        ({"bbox": [1, 2, 3]}, "box: expected four numbers, got"),
        ({"bbox": [1, 2, 3, "4"]}, "box: expected four numbers, got"),
        ({"bbox": [float("nan"), 2, 3, 4]}, "box: expected four numbers, got"),
        ({"bbox": None}, "box: expected four numbers, got None"),
        ({"bbox": [1, 2, 0, 4]}, "box: expected a width and a height above 0"),
    ],
)
def test_bad_lines(tmp_path, images, expected, change, reason):
    path = write_lines(tmp_path / "a.jsonl", [lines()[0] | change, "{", "[]", "", lines()[1]])
    found = load_fg_ovd(path, images)
    assert list(found) == expected[1:]
    assert [bad.path for bad in found.bad] == [f"{path}, row {i}" for i in (1, 2, 3)]
    with pytest.raises(ValueError, match=f"fg_ovd: .*a.jsonl has no usable row; the first: .*, row 1: {reason}"):
        load_fg_ovd(write_lines(path, [lines()[0] | change]), images)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"category_id": 99}, "KeyError: 99"),
        ({"neg_category_ids": [101, 99]}, "KeyError: 99"),
        ({"neg_category_ids": []}, "negatives: expected texts"),
        ({"image_id": 1}, "KeyError: 1"),
        ({"image_id": 78}, "image: "),
        ({"bbox": [1, 1, -2, 3]}, "box: expected a width and a height above 0"),
    ],
)
def test_bad_annotations(tmp_path, images, expected, change, reason):
    content, path = benchmark(), tmp_path / "a.json"
    content["annotations"][0] |= change
    content["annotations"].append(None)
    path.write_text(json.dumps(content))
    found = load_fg_ovd(path, images)
    assert list(found) == expected[1:]
    assert [bad.path for bad in found.bad] == [f"{path}, annotation {i}" for i in (1, 3)]
    assert found.bad[0].reason.startswith(reason)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"images": []}', '{"images": [3], "categories": [], "annotations": []}']
)
def test_rejects_other_files(tmp_path, images, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"fg_ovd: expected .*a\.json to hold an object with images"):
        load_fg_ovd(tmp_path / "a.json", images)


BENCHMARK = [f"{n}_attributes.json" for n in (1, 2, 3)]
BENCHMARK += [f"{name}.json" for name in ("shuffle_negatives", "color", "material", "pattern", "transparency")]


@pytest.mark.parametrize(
    "names",
    [
        BENCHMARK,
        [f"{name}_llava.jsonl" for name in ("h_attributes", "m_attributes", "e_attributes", "shuffle_negatives")],
        [f"{name}_attributes_llava.jsonl" for name in ("h", "m", "e", "shuffle")],
        [f"{name}_llava.jsonl" for name in ("1_attributes", "2_attributes", "3_attributes", "shuffle_negatives")],
    ],
)
def test_files_by_their_real_names(tmp_path, names):
    for name in (*names, "README.md", "results.json"):
        (tmp_path / name).write_text("")
    assert [fg_ovd_file(tmp_path, subset).name for subset, _ in zip(SUBSETS, names, strict=False)] == names


def test_rejects_folders(tmp_path):
    (tmp_path / "1_attributes.json").write_text("")
    os.mkfifo(tmp_path / "3_attributes.json")
    with pytest.raises(
        FileNotFoundError, match=r"fg_ovd: .* has no 3_attributes\*\.json, 3_attributes\*\.jsonl or e_at"
    ):
        fg_ovd_file(tmp_path, "easy")
    (tmp_path / "h_attributes_llava.jsonl").write_text("")
    with pytest.raises(
        ValueError, match=r"several files for hard: 1_attributes\.json, h_attributes_llava\.jsonl; leave"
    ):
        fg_ovd_file(tmp_path, "hard")
    with pytest.raises(ValueError, match=r"expected one of hard, medium, easy, trivial, color, .*, got 'Hard'"):
        fg_ovd_file(tmp_path, "Hard")
    with pytest.raises(FileNotFoundError, match=r"fg_ovd: .*gone\.json is not a file"):
        load_fg_ovd(tmp_path / "gone.json", tmp_path)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_content_decides_not_the_name(tmp_path, images, expected, mark):
    for name, text in (
        ("1_attributes.jsonl", json.dumps(benchmark(), indent=1)),
        ("h_attributes.json", "\n".join(map(json.dumps, lines()))),
    ):
        (tmp_path / name).write_text(mark + text)
        found = load_fg_ovd(tmp_path / name, images)
        assert list(found) == expected and found.bad == []
