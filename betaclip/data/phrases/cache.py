"""Gives the phrases of a sentence: from a file that all workers of a machine share, or by extracting them on the fly.

The file holds a hash of each distinct sentence and the spans of its phrases. That is enough, because a caption's
phrases are those of the sentences that were sampled from it. The file is mapped into memory, not read:

    header    512 bytes: "betaclip phrases", then JSON {version, style, extractor, sentences, spans}, then blanks
    keys      sentences x uint64, sorted: BLAKE2b of the sentence's UTF-8
    firsts    (sentences + 1) x uint64: the sentence's first span
    spans     spans x (uint16 begin, uint16 end, uint8 kind)
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from betaclip.data.phrases.extraction import ExtractorName, create_extractor
from betaclip.data.phrases.spans import Extractor, Phrase, PhraseStyle, Span, cut_phrases
from betaclip.files import write_atomically

SPANS = np.dtype([("begin", "<u2"), ("end", "<u2"), ("kind", "u1")])
VERSION = 3  # of the file, and of how captions are split into sentences
_MAGIC = b"betaclip phrases\n"
_HEADER = 512

_log = logging.getLogger(__name__)


class UnknownSentenceError(LookupError):
    """A cache of phrases lacks a sentence: it was made from other captions."""


def key_of(sentence: str) -> int:
    return int.from_bytes(blake2b(sentence.encode(), digest_size=8).digest(), "little")


class PhraseCache:
    """The phrases of a sentence, from a file that :func:`write_cache` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a cache of phrases, or not whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"phrases: {self.path} is not a file; betaclip prepare makes it")
        with self.path.open("rb") as file:
            header = file.read(_HEADER)
        if not header.startswith(_MAGIC) or len(header) < _HEADER:
            raise ValueError(f"phrases: {self.path} was not made by betaclip prepare")
        try:
            about = json.loads(header[len(_MAGIC) :])
            version, sentences, spans = (int(about[name]) for name in ("version", "sentences", "spans"))
            if version == VERSION:
                self.extractor, self.style = str(about["extractor"]), str(about["style"])
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            raise ValueError(f"phrases: {self.path} has a damaged header; run betaclip prepare again") from error
        if version != VERSION:
            raise ValueError(f"phrases: {self.path} has version {version}, not {VERSION}; run betaclip prepare again")
        layout = (("keys", "<u8", sentences), ("firsts", "<u8", sentences + 1), ("spans", SPANS, spans))
        expected = _HEADER + sum(np.dtype(dtype).itemsize * count for _, dtype, count in layout)
        if self.path.stat().st_size != expected:
            raise ValueError(f"phrases: {self.path} is not whole; run betaclip prepare again")
        data = np.asarray(np.memmap(self.path, np.uint8, "r", offset=_HEADER))
        arrays, begin = [], 0
        for _, dtype, count in layout:
            end = begin + np.dtype(dtype).itemsize * count
            arrays.append(data[begin:end].view(dtype))
            begin = end
        self.keys, self.firsts, self.spans = arrays

    def __reduce__(self) -> tuple[type["PhraseCache"], tuple[Path]]:
        return PhraseCache, (self.path,)  # a worker that was spawned maps the file itself

    def __len__(self) -> int:
        return len(self.keys)

    def __call__(self, sentence: str) -> list[Phrase]:
        """The phrases of a sentence.

        Raises:
            UnknownSentenceError: the file lacks the sentence.
        """
        key = np.uint64(key_of(sentence))
        row = int(np.searchsorted(self.keys, key))
        if row == len(self.keys) or self.keys[row] != key:
            raise UnknownSentenceError(f"{self.path} does not know the sentence {sentence!r}")
        spans = self.spans[int(self.firsts[row]) : int(self.firsts[row + 1])]
        return cut_phrases(sentence, (Span(*span) for span in spans.tolist()))


class PhrasesOnTheFly:
    """The phrases of a sentence, extracted when they are asked for."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor

    def __call__(self, sentence: str) -> list[Phrase]:
        (spans,) = self.extractor([sentence])
        return cut_phrases(sentence, spans)


def open_phrases(
    path: str | Path | None, extractor_name: ExtractorName = "spacy", style: PhraseStyle = "longest"
) -> Callable[[str], list[Phrase]]:
    """What gives the phrases of a sentence: the cache at ``path`` or, without one, an extractor, as the log says.

    Raises:
        FileNotFoundError, ValueError: the cache or the extractor cannot be used, or the cache has another style.
    """
    if path is not None:
        cache = PhraseCache(path)
        if cache.style != style:
            raise ValueError(
                f"phrase_style: {path} has phrases of style {cache.style!r}, not {style!r}; "
                f"run betaclip prepare --phrase-style {style}"
            )
        return cache
    extractor = create_extractor(extractor_name, style=style)
    _log.info("phrases are extracted anew in every epoch (%s); betaclip prepare does it once", extractor.name)
    return PhrasesOnTheFly(extractor)


def pack(sentences: Sequence[str], spans: Iterable[Sequence[Span]]) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays of a part of a cache: keys (N,), counts (N,) and spans, in the order of the N sentences."""
    rows = [list(row) for row in spans]
    return {
        "keys": np.array([key_of(sentence) for sentence in sentences], np.uint64),
        "counts": np.array([len(row) for row in rows], np.uint64),
        "spans": np.array([tuple(span) for row in rows for span in row], SPANS),
    }


def write_cache(
    path: str | Path,
    extractor: str,
    parts: Iterable[dict[str, npt.NDArray[np.generic]]],
    style: PhraseStyle = "longest",
) -> int:
    """Write the file that PhraseCache reads, from parts that ``pack`` made. It appears under its name when it is whole.

    Returns:
        The number of distinct sentences.
    """
    columns = list(parts)
    keys, counts, spans = (np.concatenate([part[name] for part in columns]) for name in ("keys", "counts", "spans"))
    counts = counts.astype(np.int64)
    keys, rows = np.unique(keys, return_index=True)
    firsts = (counts.cumsum() - counts)[rows]
    counts = counts[rows]
    ends = counts.cumsum()
    gathered = spans[np.arange(counts.sum()) + np.repeat(firsts - (ends - counts), counts)]
    about = {
        "version": VERSION, "style": style, "extractor": extractor, "sentences": len(keys), "spans": len(gathered),
    }  # fmt: skip
    header = (_MAGIC + json.dumps(about).encode()).ljust(_HEADER)
    if len(header) != _HEADER:
        raise ValueError(f"extractor: expected a short name, got {extractor!r}")
    with write_atomically(path) as file:
        file.write(header)
        for values in (keys.astype("<u8"), np.append(0, ends).astype("<u8"), gathered.astype(SPANS)):
            file.write(values.tobytes())
    return len(keys)
