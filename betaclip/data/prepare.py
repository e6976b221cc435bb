"""``betaclip prepare``: extracts the phrases of all sentences of all captions, once, into one file."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from betaclip.data.phrases.cache import VERSION, pack, write_cache
from betaclip.data.phrases.extraction import ExtractorName, create_extractor
from betaclip.data.phrases.spans import Extractor, PhraseStyle, Span
from betaclip.data.readers.annotations import BadRowError
from betaclip.data.readers.pairs import open_rows
from betaclip.data.readers.shards import captions_of_shard, expand_shards
from betaclip.data.readers.table import TableOptions
from betaclip.data.sentences import clean, split_sentences
from betaclip.errors import ConfigError
from betaclip.files import lock_folder, write_atomically
from betaclip.settings import bounded, check_numbers

Report = Callable[[int], object]  # is told how many more captions are done


@dataclass(frozen=True)
class PrepareConfig(TableOptions):
    """The captions to extract phrases from, and how."""

    annotations: str
    """What data.annotations or data.shards name: JSON or JSON lines, a table, a folder with a text file beside each
    picture, or tar shards ("shards-{0000..0099}.tar")."""
    out: Path
    """The file to write; data.phrases of a training run."""
    phrase_extractor: ExtractorName = "spacy"
    """A spaCy model, or word lists, which need no model and are coarser."""
    phrase_style: PhraseStyle = "longest"
    """The longest of overlapping phrases, or those of the published code; data.phrase_style of a training run."""
    spacy_model: str | None = None
    """Name or folder; by default the first English model that is installed."""
    allow_commands: bool = False
    """Also take shards whose addresses run commands, such as "pipe:ssh HOST cat shard.tar"."""
    workers: int = bounded(os.cpu_count() or 1, at_least=1)
    """Processes; one where the system cannot fork."""
    part_rows: int = bounded(10_000, at_least=1)
    """Captions of a part; an interruption loses the parts under way."""


def prepare(config: PrepareConfig) -> None:
    """Write the file. An interrupted call continues from the finished parts, which lie in the folder ``OUT.parts``.

    Raises:
        ConfigError: the captions or the spaCy model are missing, or the folder holds parts of other work or is in use.
    """
    folder = Path(f"{config.out}.parts")
    check_numbers(config)
    try:
        work = _Work(config)
        extractor = create_extractor(config.phrase_extractor, config.spacy_model, config.phrase_style)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    about = {
        "version": VERSION,
        "style": extractor.style,
        "extractor": extractor.name,
        "part_rows": config.part_rows,
    }
    with lock_folder(folder):
        _claim(folder, about | {"source": work.identity})
        _prepare(config, work, extractor, folder)
    shutil.rmtree(folder)


class _Work:
    """The captions, in parts."""

    def __init__(self, config: PrepareConfig) -> None:
        self.parts: list[Any]
        if config.annotations.endswith(".tar"):
            self.rows = None
            self.parts = expand_shards(config.annotations, allow_commands=config.allow_commands)
            self.identity: list[Any] = list(self.parts)
        else:
            self.rows = open_rows(config.annotations, config)
            rows = range(len(self.rows))
            self.parts = [rows[i : i + config.part_rows] for i in range(0, len(rows), config.part_rows)]
            self.identity = list(self.rows.identity())

    def captions(self, number: int) -> Iterator[str | None]:
        """The captions of a part, with None for each unusable row."""
        if self.rows is None:
            yield from captions_of_shard(self.parts[number])
            return
        for row in self.parts[number]:
            try:
                yield from self.rows[row][1]
            except BadRowError:
                yield None


def _prepare(config: PrepareConfig, work: _Work, extractor: Extractor, folder: Path) -> None:
    files = [folder / f"{number:06d}.npz" for number in range(len(work.parts))]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    finished = sum(_captions(file) for file in files if file.exists())
    total = None if work.rows is None else finished + sum(len(work.parts[number]) for number in missing)
    with tqdm(total=total, initial=finished, unit=" captions", desc="phrases") as progress:
        for number in _map(config, work, extractor, [(number, files[number]) for number in missing], progress.update):
            if progress.total is not None:  # a row may have several captions
                progress.total += _captions(files[number]) - len(work.parts[number])
    parts = [_load(file) for file in files]
    sentences = write_cache(config.out, extractor.name, parts, extractor.style)
    bad, captions = (sum(int(part[name]) for part in parts) for name in ("bad", "captions"))
    print(f"{config.out}: {sentences} sentences of {captions} captions, {bad} rows unusable")


def _map(
    config: PrepareConfig, work: _Work, extractor: Extractor, jobs: list[tuple[int, Path]], report: Report
) -> Iterator[int]:
    """Write the parts; yields the number of each when it is done."""
    workers = min(config.workers, len(jobs))
    if workers <= 1 or "fork" not in get_all_start_methods():
        for number, file in jobs:
            _extract(work, extractor, number, file, report)
            yield number
        return
    # A fork shares the loaded spaCy model; no threads have been started that it would lack.
    context = get_context("fork")
    captions, reported = context.Value("q", 0), 0
    with ProcessPoolExecutor(workers, context, _start_worker, (work, extractor, captions)) as pool:
        waiting = {pool.submit(_extract_in_worker, *job): job[0] for job in jobs}
        try:
            while waiting:
                done = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED).done
                now = captions.value
                report(now - reported)
                reported = now
                for future in done:
                    future.result()
                    yield waiting.pop(future)
        finally:
            pool.shutdown(cancel_futures=True)


def _extract(work: _Work, extractor: Extractor, number: int, file: Path, report: Report) -> None:
    captions = list(work.captions(number))
    usable = [caption for caption in captions if caption is not None]
    sentences = list(dict.fromkeys(s for caption in usable for s in split_sentences(clean(caption))))
    spans = _reported(extractor(sentences), len(sentences), len(captions), report)
    part: dict[str, Any] = dict(pack(sentences, spans))
    with write_atomically(file) as stream:
        np.savez(stream, captions=len(usable), bad=len(captions) - len(usable), **part)


def _reported(spans: Iterator[list[Span]], sentences: int, captions: int, report: Report) -> Iterator[list[Span]]:
    """The spans of a part's sentences; the part's captions are reported in proportion, as they are taken."""
    reported = 0
    for done, found in enumerate(spans, 1):
        yield found
        due = captions * done // sentences
        if due > reported:
            report(due - reported)
            reported = due
    report(captions - reported)


def _captions(file: Path) -> int:
    """The number of captions that a part was made of, unusable ones included."""
    with np.load(file) as part:
        return int(part["captions"] + part["bad"])


def _load(file: Path) -> dict[str, Any]:
    with np.load(file) as part:
        return dict(part)


_worker: tuple[_Work, Extractor, Any]


def _start_worker(work: _Work, extractor: Extractor, captions: Any) -> None:
    global _worker
    _worker = work, extractor, captions


def _extract_in_worker(number: int, file: Path) -> None:
    work, extractor, captions = _worker

    def report(count: int) -> None:
        with captions.get_lock():
            captions.value += count

    _extract(work, extractor, number, file, report)


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Create the folder of parts, or check that its parts belong to this work."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "about.json"
    if not file.exists():
        with write_atomically(file) as stream:
            stream.write(json.dumps(about).encode())
    elif json.loads(file.read_text()) != about:
        raise ConfigError(f"out: {folder} holds parts of other captions or of other settings; delete the folder")
