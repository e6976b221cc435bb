"""COCO and Flickr30k with several captions of each picture, for retrieval.

Three forms of file are read, whatever their names:

* Karpathy's ``dataset_coco.json`` and ``dataset_flickr30k.json``, with ``images`` (``filepath``: a folder, if there are
  several; ``filename``; ``split``; ``sentences``, each with ``raw``: the text), of which those of split ``test`` are
  taken, 5000 and 1000;
* COCO's own ``captions_val2017.json``, with ``images`` (``id``, ``file_name``) and ``annotations`` (``image_id``,
  ``caption``);
* rows with ``image``, a path, and ``caption``, a list of texts: ``coco_karpathy_test.json``, ``flickr30k_test.json``.

All captions of a picture are taken: some of COCO's have more than five.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from betaclip.data.readers.annotations import BadRowError, checked_captions, picture_and_captions
from betaclip.data.readers.retrieval_set import RetrievalOptions, RetrievalSet, Row, collect, load_json


@dataclass(frozen=True, kw_only=True)
class COCOOptions(RetrievalOptions):
    """Settings of COCO."""

    coco: Path | None = None
    """COCO's captions (Karpathy's dataset_coco.json, of which the test split is taken, or captions_val2017.json):
    retrieval."""
    coco_images: Path | None = None
    """Folder that the paths of COCO's pictures start from; by default that of the captions."""

    def read(self) -> RetrievalSet | None:
        return _read("coco", self.coco, self.coco_images, self.allow_outside_root)


@dataclass(frozen=True, kw_only=True)
class Flickr30kOptions(RetrievalOptions):
    """Settings of Flickr30k."""

    flickr30k: Path | None = None
    """Flickr30k's captions (Karpathy's dataset_flickr30k.json, of which the test split is taken): retrieval."""
    flickr30k_images: Path | None = None
    """Folder that the paths of Flickr30k's pictures start from; by default that of the captions."""

    def read(self) -> RetrievalSet | None:
        return _read("flickr30k", self.flickr30k, self.flickr30k_images, self.allow_outside_root)


def _read(name: str, file: Path | None, images: Path | None, allow_outside_root: bool) -> RetrievalSet | None:
    if file is None:
        return None
    return collect(name, _rows(file, name), images or file.parent, allow_outside_root=allow_outside_root)


def _rows(file: Path, name: str) -> Iterable[Row]:
    content = load_json(file, name)
    if isinstance(content, list):
        return ((f"{file}, row {i}", partial(picture_and_captions, row)) for i, row in enumerate(content, 1))
    images = content.get("images") if isinstance(content, dict) else None
    if isinstance(images, list) and isinstance(content.get("annotations"), list):
        captions: dict[Any, list[Any]] = {}
        for row in content["annotations"]:
            if isinstance(row, dict) and isinstance(row.get("image_id"), int | str):
                captions.setdefault(row["image_id"], []).append(row.get("caption"))
        return ((f"{file}, image {i}", partial(_of_coco, image, captions)) for i, image in enumerate(images, 1))
    if isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images):
        test = ((i, image) for i, image in enumerate(images, 1) if _is_test(image))
        return ((f"{file}, image {i}", partial(_of_karpathy, image)) for i, image in test)
    wanted = '"images" with "sentences" (Karpathy) or with "annotations" beside them (COCO), or rows with "image"'
    raise ValueError(f"{name}: expected {file} to hold {wanted}")


def _is_test(image: Any) -> bool:
    return not isinstance(image, dict) or image.get("split") == "test"  # what is no object is listed as unusable


def _of_karpathy(image: Any) -> tuple[str, list[str]]:
    try:
        return str(Path(image.get("filepath", ""), image["filename"])), checked_captions(
            [sentence["raw"] for sentence in image["sentences"]]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise BadRowError(f"expected filename and sentences with raw: {type(error).__name__}: {error}") from error


def _of_coco(image: Any, captions: dict[Any, list[Any]]) -> tuple[str, list[str]]:
    try:
        found = captions.get(image["id"])
        if not found:
            raise BadRowError("a picture without a caption")
        return str(Path(image["file_name"])), checked_captions(found)
    except (KeyError, TypeError) as error:
        raise BadRowError(f"expected id and file_name: {type(error).__name__}: {error}") from error
