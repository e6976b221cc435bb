"""Pictures and captions in tar shards, read in sequence with the webdataset library, for storage that seeks slowly.

A sample is a picture (``KEY.jpg``, ``.jpeg``, ``.png`` or ``.webp``) and its captions: ``KEY.json`` with a "caption",
a list of "captions" or ShareGPT4V's "conversations", or else ``KEY.txt``. A key ends at the first dot of a file's name.
"""

import io
import logging
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import webdataset as wds
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

from betaclip.data.batches import Bad, Example
from betaclip.data.example_maker import CaptionOptions, ExampleMaker, draw_caption
from betaclip.data.readers.annotations import BadRowError, captions_of, checked_caption, parse_json
from betaclip.data.stream import Stream
from betaclip.settings import bounded

_PICTURES = ("jpg", "jpeg", "png", "webp")
_MAX_FILE = 1 << 27  # bytes of a picture or a caption; a worker holds hundreds of samples
_MAX_LONG_NAME = 1 << 20  # bytes of the headers in which a tar archive has long names and other properties
_LONG_NAMES = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
_META = re.compile(r"__[^/]*__($|/)")  # files about the shard, by webdataset's convention

# Some versions of webdataset put addresses into a shell's command, between quotes, which these characters cannot end.
_SAFE_ADDRESS = re.compile(r"[\w:/?#@&+,=.~%-]+", re.ASCII)

_log = logging.getLogger(__name__)


def expand_shards(shards: str, *, allow_commands: bool = False) -> list[str]:
    """The files or addresses of a pattern such as ``shards-{0000..0099}.tar``; ``::`` stands between patterns.

    Raises:
        FileNotFoundError: some of the files are missing.
        ValueError: an address is a command, or could hide one, and ``allow_commands`` is not set.
    """
    found = list(expand_urls(shards))
    for shard in found if not allow_commands else ():
        scheme = urlparse(shard).scheme
        if scheme == "pipe" or (scheme not in ("", "file") and not _SAFE_ADDRESS.fullmatch(shard)):
            raise ValueError(f"shards: {shard!r} is a command, or may hide one; allow_commands would run it")
    missing = [shard for shard in found if ":" not in shard and not Path(shard).is_file()]
    if missing:
        raise FileNotFoundError(f"shards: {len(missing)} of {len(found)} are not files; the first: {missing[0]}")
    return found


class ShardDataset(Stream):
    """The samples of all shards, in an order that the seed and the epoch decide, split over ranks and their workers.

    Without ``epoch_samples`` an epoch is one pass: the shards are permuted and dealt out, and every sample is seen once
    over all ranks and workers. Some ranks may then have more batches than others, so that they cannot train together.
    With ``epoch_samples`` every worker draws shards, with replacement, until it has its part of so many samples: all
    ranks have as many, and some samples come more often than others.

    A shard that cannot be read, or a part of one, is one ``Bad``. All that is random about a sample follows from its
    name, the seed and the epoch, so that a pass has the same examples whatever the number of ranks and workers. With
    replacement it also follows from which worker draws the sample, and when.

    Args:
        shards: files or addresses (:func:`expand_shards`).
        make: makes the example of a sample.
        shuffle: how many samples, undecoded, a worker holds to draw the next from; 0 keeps the order of a shard.
        epoch_samples: samples of an epoch, over all ranks.
        rank, ranks: this process among those of the run.

    Raises:
        ValueError: there are fewer shards than ranks.
    """

    def __init__(
        self,
        shards: Sequence[str],
        make: ExampleMaker,
        *,
        seed: int = 0,
        shuffle: int = 500,
        epoch_samples: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if len(shards) < (ranks if epoch_samples is None else 1):
            raise ValueError(f"shards: expected at least one for each of {ranks} ranks, got {len(shards)}")
        super().__init__(seed=seed, epoch_samples=epoch_samples, rank=rank, ranks=ranks)
        self.shards, self.make, self.shuffle = list(shards), make, shuffle

    def examples(self, epoch: int, worker: int, workers: int, first: int = 0) -> Iterator[Example | Bad]:
        """A worker's examples of an epoch; those before ``first`` are read, but not decoded."""
        for number, sample in enumerate(islice(self._samples(epoch, worker, workers), first, None), first):
            turn = "" if self.epoch_samples is None else f"{self.rank} {worker} {number}"
            yield sample if isinstance(sample, Bad) else self._example(sample, epoch, turn)

    def _samples(self, epoch: int, worker: int, workers: int) -> Iterator[dict[str, Any] | Bad]:
        """This worker's samples of an epoch, undecoded."""
        if self.epoch_samples is None:
            order = random.Random(f"{self.seed} {epoch}").sample(self.shards, len(self.shards))
            mine: Iterator[str] = iter(order[self.rank :: self.ranks][worker::workers])
        else:
            draws = random.Random(f"{self.seed} {epoch} {self.rank} {worker}")
            mine = iter(lambda: draws.choice(self.shards), None)
        samples = (sample for shard in mine for sample in _read(shard))
        if not self.shuffle:
            return samples
        rng = random.Random(f"{self.seed} {epoch} {self.rank} {worker} samples")
        return iter(wds.shuffle(self.shuffle, initial=self.shuffle, rng=rng)(samples))

    def _example(self, sample: dict[str, Any], epoch: int, turn: str) -> Example | Bad:
        path = f"{sample['__url__']}/{sample['__key__']}"
        picture = next((sample[suffix] for suffix in _PICTURES if suffix in sample), None)
        if picture is None:
            return Bad(path, f"no picture ({', '.join(_PICTURES)}); {_endings(sample)}")
        try:
            picture, captions = _content(picture), _captions(sample)
        except BadRowError as error:
            return Bad(path, str(error))
        name = path[len(sample["__url__"].rpartition("/")[0]) :]  # does not depend on the folder
        digest = blake2b(f"{self.seed} {epoch} {name} {turn}".encode(), digest_size=8).digest()
        drawn = int.from_bytes(digest, "little") >> 1
        return self.make(io.BytesIO(picture), path, draw_caption(captions, drawn), drawn)


@dataclass(frozen=True, kw_only=True)
class ShardOptions(CaptionOptions):
    """Settings of tar shards."""

    shards: str | None = None
    """shards: a pattern such as "shards-{0000..0099}.tar"."""
    allow_commands: bool = False
    """shards: also take addresses that run commands, such as "pipe:ssh HOST cat shard.tar"."""
    epoch_samples: int | None = bounded(None, at_least=1)
    """shards: samples of an epoch, over all ranks; training needs it."""
    shuffle: int = bounded(500, at_least=0)
    """shards: samples in the buffer of each worker from which the next is drawn."""

    def create(
        self, image_size: int, context_length: int, *, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> ShardDataset:
        if self.shards is None:
            raise ValueError("shards: kind 'shards' needs a pattern of files")
        return ShardDataset(
            expand_shards(self.shards, allow_commands=self.allow_commands),
            self.example_maker(image_size, context_length),
            seed=seed,
            shuffle=self.shuffle,
            epoch_samples=self.epoch_samples,
            rank=rank,
            ranks=ranks,
        )


def captions_of_shard(shard: str) -> Iterator[str | None]:
    """The captions of each sample, or None for one that has none or cannot be read."""
    for sample in _read(shard, only=(".json", ".txt")):
        if isinstance(sample, Bad):
            _log.warning("%s: %s", sample.path, sample.reason)
            yield None
            continue
        try:
            yield from _captions(sample)
        except BadRowError:
            yield None


def _read(shard: str, only: tuple[str, ...] = ("",)) -> Iterator[dict[str, Any] | Bad]:
    """The samples of a shard, then a Bad if something was wrong with it. only: the endings of the files to read."""
    faults: list[Bad] = []

    def note(error: Exception) -> bool:
        reason = next((text for text in error.args if isinstance(text, str)), "")  # before what webdataset adds
        faults.append(Bad(shard, f"{type(error).__name__}: {reason}"))
        return True  # go on

    samples = 0
    for sample in group_by_keys(_files(shard, only, note), handler=note):
        samples += 1
        yield sample
    yield from faults[:1]
    if not samples and not faults:
        yield Bad(shard, "a shard without samples")


def _files(shard: str, only: tuple[str, ...], note: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """The files of a shard in the form that ``group_by_keys`` takes, up to the first fault.

    In place of the content of a file that is too large stands the BadRowError that says so.
    """
    tar, member = None, None
    try:
        with gopen(shard) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar:
            for member in tar:
                if member.isreg() and not _META.match(member.name) and member.name.lower().endswith(only):
                    data: bytes | BadRowError
                    if member.size > _MAX_FILE:
                        data = BadRowError(f"{member.name} has {member.size} bytes, more than {_MAX_FILE}")
                    else:
                        content = tar.extractfile(member)
                        assert content is not None  # it is a regular file
                        data = content.read()
                    yield {"fname": member.name, "data": data, "__url__": shard}
                tar.members = []  # type: ignore[attr-defined]  # or it would hold all headers
            _check_end(tar.fileobj)
    except DamagedShardError as error:
        note(error)
    except Exception as error:  # decompressors raise whatever a broken file leads them to
        where = f" in {member.name}, byte {member.offset}" if member else ""
        note(type(error)(f"{error}{where}") if isinstance(error, tarfile.TarError) else error)


class DamagedShardError(tarfile.TarError):
    """A shard has a damaged header, or does not end as an archive ends."""


class _Header(tarfile.TarInfo):
    """A member's header. Where one cannot be read, tarfile takes the archive to end; this raises.

    It also raises where a long name has no bound, because tarfile would read it whole.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        offset = archive.fileobj.tell()
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the first of the zero blocks
            raise
        except tarfile.HeaderError as error:
            if archive.fileobj.tell() < offset + tarfile.BLOCKSIZE:
                raise DamagedShardError(f"cut off at byte {offset}, before the zero blocks that end it") from error
            raise DamagedShardError(f"damaged header at byte {offset}: {error}") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type in _LONG_NAMES and header.size > _MAX_LONG_NAME:
            raise DamagedShardError(f"expected a name of at most {_MAX_LONG_NAME} bytes, got {header.size}")
        return header


def _check_end(stream: Any) -> None:
    """Raise if, after the first zero block, there is not a second one, or anything else than zeros."""
    begin = stream.tell()
    end = begin
    while block := stream.read(1 << 16):
        if block.strip(b"\0"):
            at = end + len(block) - len(block.lstrip(b"\0"))
            raise DamagedShardError(f"zero block at byte {begin - tarfile.BLOCKSIZE}, but more data at byte {at}")
        end += len(block)
    if end - begin < tarfile.BLOCKSIZE:
        raise DamagedShardError(f"cut off at byte {end}, before the second of the zero blocks that end it")


def _content(file: bytes | BadRowError) -> bytes:
    """The content of a file, or raise the BadRowError that stands in its place."""
    if isinstance(file, BadRowError):
        raise file
    return file


def _captions(sample: dict[str, Any]) -> list[str]:
    """The captions in KEY.json or, if that has none, the one in KEY.txt.

    Raises:
        BadRowError: neither has one.
    """
    fault = BadRowError(f"no caption (json, txt); {_endings(sample)}")
    if "json" in sample:
        try:
            return captions_of(parse_json(_content(sample["json"])))
        except BadRowError as error:
            fault = error
    if "txt" in sample:
        return [checked_caption(_content(sample["txt"]).decode("utf-8-sig", errors="replace"))]
    raise fault


def _endings(sample: dict[str, Any]) -> str:
    endings = ", ".join(name for name in sample if not name.startswith("__"))
    return f"a key ends at its first dot, after which this one has {endings}"
