"""FG-OVD: a box, the text that describes what is in it, and negatives that differ in one, two or three attributes.

Besides these four difficulties the benchmark has subsets whose negatives differ in one kind of attribute. Two forms of
file are read, whatever their endings, both on images of COCO 2017:

* the benchmark's own: ``1_attributes.json``, ``color.json`` … with ``images`` (``file_name``:
  ``train2017/000000075285.jpg``), ``annotations`` (``image_id``, ``bbox`` as x, y, width, height, ``category_id``,
  ``neg_category_ids``) and ``categories`` (``id``, ``name``: the text);
* FG-CLIP's: ``h_attributes_llava.jsonl`` … with one object a line: ``img_path``, ``bbox`` likewise, ``pos_expression``
  and ``neg_expression``, both lists of texts.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from betaclip.data.batches import Bad
from betaclip.data.multiple_choice import Choice, ChoiceSet
from betaclip.data.readers.annotations import BadRowError, parse_json
from betaclip.data.readers.paths import picture_path, read_file

DIFFICULTIES = ("hard", "medium", "easy", "trivial")

# What the files of a subset begin with: the benchmark's name, which FG-CLIP also uses, then FG-CLIP's other one.
SUBSETS = {
    "hard": ("1_attributes", "h_attributes"),
    "medium": ("2_attributes", "m_attributes"),
    "easy": ("3_attributes", "e_attributes"),
    "trivial": ("shuffle_negatives", "shuffle_attributes"),
    "color": ("color",),
    "material": ("material",),
    "pattern": ("pattern",),
    "transparency": ("transparency",),
}


def fg_ovd_file(folder: str | Path, subset: str) -> Path:
    """The file of a subset in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there is no such subset, or there are several files for it.
    """
    if subset not in SUBSETS:
        raise ValueError(f"subset: expected one of {', '.join(SUBSETS)}, got {subset!r}")
    candidates = (path for stem in SUBSETS[subset] for path in sorted(Path(folder).glob(f"{stem}*")))
    found = [path for path in candidates if path.suffix in (".json", ".jsonl") and path.is_file()]
    if not found:
        names = " or ".join(f"{stem}*.json, {stem}*.jsonl" for stem in SUBSETS[subset])
        raise FileNotFoundError(f"fg_ovd: {folder} has no {names}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"fg_ovd: {folder} has several files for {subset}: {names}; leave one of them there")
    return found[0]


def load_fg_ovd(file: str | Path, images: str | Path, *, allow_outside_root: bool = False) -> ChoiceSet:
    """The choices of one file, in either form; ``images`` is the folder that holds ``train2017`` and ``val2017``.

    A row is bad if its image is missing, its box is empty, or it lacks a text or negatives.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has neither form, or no usable row.
    """
    file, images = Path(file), Path(images)
    if not file.is_file():
        raise FileNotFoundError(f"fg_ovd: {file} is not a file")
    content = read_file(file)
    choices: list[Choice] = []
    bad: list[Bad] = []
    for where, record in _lines(file, content) if b'"img_path"' in content else _annotations(file, content):
        try:
            choices.append(_choice(record(), images, allow_outside_root))
        except BadRowError as error:
            bad.append(Bad(where, str(error)))
    return ChoiceSet(f"fg_ovd: {file}", choices, bad)


class _Record(NamedTuple):
    """A row as it stands in the file, with values of any type."""

    image: Any
    bbox: Any
    positive: Any
    negatives: Any


def _lines(file: Path, lines: bytes) -> Iterator[tuple[str, Callable[[], _Record]]]:
    for number, line in enumerate(lines.splitlines(), 1):
        if line.strip():
            yield f"{file}, row {number}", partial(_of_line, line)


def _of_line(line: bytes) -> _Record:
    row = parse_json(line)
    if not isinstance(row, dict):
        raise BadRowError(f"expected an object, got {type(row).__name__}")
    positive = row.get("pos_expression")
    if isinstance(positive, list) and len(positive) == 1:
        positive = positive[0]
    return _Record(row.get("img_path"), row.get("bbox"), positive, row.get("neg_expression"))


def _annotations(file: Path, raw: bytes) -> Iterator[tuple[str, Callable[[], _Record]]]:
    try:
        content = parse_json(raw)
        images = {image["id"]: image["file_name"] for image in content["images"]}
        texts = {category["id"]: category["name"] for category in content["categories"]}
        rows = list(content["annotations"])
    except (BadRowError, KeyError, TypeError) as error:
        wanted = "an object with images (id, file_name), categories (id, name) and annotations, or lines with img_path"
        raise ValueError(f"fg_ovd: expected {file} to hold {wanted}: {type(error).__name__}: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"{file}, annotation {number}", partial(_of_annotation, row, images, texts)


def _of_annotation(row: Any, images: dict[Any, Any], texts: dict[Any, Any]) -> _Record:
    try:
        negatives = [texts[category] for category in row["neg_category_ids"]]
        return _Record(images[row["image_id"]], row["bbox"], texts[row["category_id"]], negatives)
    except (KeyError, TypeError) as error:
        raise BadRowError(f"{type(error).__name__}: {error}") from error


def _choice(record: _Record, images: Path, allow_outside_root: bool) -> Choice:
    """The choice in a row.

    Raises:
        BadRowError: the message says what is wrong with the row.
    """
    image, bbox, positive, negatives = record
    if not isinstance(image, str) or not image.strip("/"):
        raise BadRowError(f"image: expected a path, got {image!r}")
    # The paths in FG-CLIP's files begin with a slash, which means the folder.
    path = picture_path(images, image.lstrip("/"), allow_outside_root)
    if not path.is_file():
        raise BadRowError(f"image: {path} is not a file")
    if not isinstance(positive, str) or not positive.strip():
        raise BadRowError(f"positive: expected a text, got {positive!r}")
    if not isinstance(negatives, list) or not negatives or not all(isinstance(n, str) and n.strip() for n in negatives):
        raise BadRowError(f"negatives: expected texts, got {negatives!r}")
    numbers = isinstance(bbox, list) and all(isinstance(value, int | float) and isfinite(value) for value in bbox)
    if not numbers or len(bbox) != 4:
        raise BadRowError(f"box: expected four numbers, got {bbox!r}")
    x, y, width, height = bbox
    if not (width > 0 and height > 0):
        raise BadRowError(f"box: expected a width and a height above 0, got {bbox}")
    return Choice(path, (x, y, x + width, y + height), positive, tuple(negatives))
