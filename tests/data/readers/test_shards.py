"""Shards: each sample once over ranks and workers, an order that depends on the seed, resuming, and bad shards."""

import bz2
import gzip
import json
import lzma
import random
import shutil
import tarfile
import tracemalloc
from collections import Counter
from itertools import islice

import pytest
import torch
from support.shards import picture, sample, write_shard
from torch.utils.data import DataLoader

from betaclip.data.batches import Bad, Example, collate
from betaclip.data.example_maker import ExampleMaker
from betaclip.data.phrases.cache import PhraseCache, PhrasesOnTheFly
from betaclip.data.phrases.rules import RuleExtractor
from betaclip.data.prepare import PrepareConfig, prepare
from betaclip.data.readers.shards import ShardDataset, captions_of_shard, expand_shards

SHARDS, SAMPLES = 6, 4


@pytest.fixture
def shards(tmp_path):
    forms = ("txt", "json", "share.json")
    for number in range(SHARDS):
        keys = range(number * SAMPLES, (number + 1) * SAMPLES)
        files = [f for key in keys for f in sample(key, f"A cat sits on {key} mats. A dog runs.", forms[number % 3])]
        write_shard(tmp_path / f"{number:04d}.tar", files)
    return expand_shards(str(tmp_path / "{0000..0005}.tar"))


def dataset(shards, **options):
    return ShardDataset(shards, ExampleMaker(8, 77, PhrasesOnTheFly(RuleExtractor())), **options)


def keys(items):
    return [int(item.path.rpartition("/")[2]) for item in items]


def loader(data, workers, batch_size=2, **options):
    fork = "fork" if workers else None
    return DataLoader(
        data, batch_size, num_workers=workers, collate_fn=collate, multiprocessing_context=fork, **options
    )


def test_examples(shards):
    examples = list(dataset(shards, shuffle=0))
    assert all(isinstance(example, Example) for example in examples)
    assert sorted(keys(examples)) == list(range(SHARDS * SAMPLES))
    for key, example in zip(keys(examples), examples, strict=True):
        assert example.path == f"{shards[key // SAMPLES]}/{key}"
        assert example.texts[:3] == [f"A cat sits on {key} mats. A dog runs", f"A cat sits on {key} mats", "A dog runs"]
        assert example.image.shape == (3, 8, 8)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (4, 1)])
def test_every_sample_once(shards, ranks, workers):
    paths = []
    for rank in range(ranks):
        data = dataset(shards, rank=rank, ranks=ranks, shuffle=3)
        paths.append([path for batch in loader(data, workers) for path in batch.paths])
    assert all(paths), "a rank without samples"
    assert Counter(path for rank in paths for path in rank) == Counter(
        f"{shards[key // SAMPLES]}/{key}" for key in range(SHARDS * SAMPLES)
    )


def test_order_is_of_seed_and_epoch(shards):
    def order(seed, epoch):
        data = dataset(shards, seed=seed, shuffle=4)
        data.set_epoch(epoch)
        return keys(data)

    assert order(0, 0) == order(0, 0)
    orders = {tuple(order(seed, epoch)) for seed in range(2) for epoch in range(2)} | {tuple(range(SHARDS * SAMPLES))}
    assert len(orders) == 5
    whole = keys(dataset(shards, shuffle=0))
    assert all(whole[i : i + SAMPLES] == sorted(whole[i : i + SAMPLES]) for i in range(0, len(whole), SAMPLES))


def test_an_example_does_not_depend_on_ranks_workers_and_folders(shards, tmp_path):
    alone = {example.path: example for example in dataset(shards, seed=3)}
    data = dataset(shards, seed=3, rank=1, ranks=2)
    for batch in loader(data, 2):
        for path, image in zip(batch.paths, batch.images, strict=True):
            assert torch.equal(image, alone[path].image)
    (tmp_path / "elsewhere").mkdir()
    for shard in shards:
        shutil.copy(shard, tmp_path / "elsewhere")
    moved = dataset([str(tmp_path / "elsewhere" / shard.rpartition("/")[2]) for shard in shards], seed=3)
    assert [example.texts for example in moved] == [example.texts for example in alone.values()]
    assert all(torch.equal(a.image, b.image) for a, b in zip(moved, alone.values(), strict=True))
    data.set_epoch(1)
    later = {example.path: example for example in data}
    assert any(not torch.equal(alone[path].image, later[path].image) for path in later)


@pytest.mark.parametrize("epoch_samples", [None, 24])
@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on(shards, workers, epoch_samples):
    data = dataset(shards, seed=1, shuffle=3, epoch_samples=epoch_samples)
    data.set_epoch(2)
    whole = [batch.paths for batch in loader(data, workers)]
    for had in (1, 4, 11):
        data.set_epoch(2, had, 2)
        assert [batch.paths for batch in loader(data, workers)] == whole[had:]


def test_with_replacement(shards):
    seen, per_rank = [], []
    for rank in range(2):
        data = dataset(shards, rank=rank, ranks=2, epoch_samples=60)
        batches = list(loader(data, 2, drop_last=True))
        assert len(batches) == data.batches_per_epoch(2, 2) == 14
        per_rank.append([path for batch in batches for path in batch.paths])
        seen += per_rank[-1]
    assert per_rank[0] != per_rank[1]
    assert len(seen) == 56 and max(Counter(seen).values()) > 1
    endless = dataset(shards, epoch_samples=10_000, seed=5)
    counts = Counter(keys(islice(endless, 200)))
    assert len(counts) == SHARDS * SAMPLES


def test_batches_without_end(shards):
    data = dataset(shards, epoch_samples=24, seed=2, shuffle=3)
    stream = data.batches(2, 2, multiprocessing_context="fork")
    first = [next(stream).paths for _ in range(30)]  # two and a half epochs
    stream.close()
    assert first[:12] != first[12:24]
    for begin in (5, 24):
        data = dataset(shards, epoch_samples=24, seed=2, shuffle=3)
        stream = data.batches(2, 2, begin, multiprocessing_context="fork")
        assert [next(stream).paths for _ in range(30 - begin)] == first[begin:]
        stream.close()


def test_bad_samples(tmp_path):
    good, broken = sample(1, "A red cat", "txt"), picture()[:-200]
    shard = write_shard(
        tmp_path / "a.tar",
        [
            *good, ("2.jpg", broken), ("2.txt", b"A cat"), ("3.txt", b"A cat"), ("4.png", picture()),
            ("5.jpg", picture()), ("5.txt", b" "), ("6.jpg", picture()), ("6.json", b"{"),
            ("7.jpg", picture()), ("7.json", b'{"caption": 3}'), ("8.jpg", picture()),
            ("8.json", b'{"text": "A cat"}'), *sample(9, "A blue dog", "json"),
        ],
    )  # fmt: skip
    items = list(dataset([shard], shuffle=0))
    assert keys(items) == list(range(1, 10))
    reasons = [item.reason if isinstance(item, Bad) else "" for item in items]
    assert [reason[:12] for reason in reasons] == [
        "", "OSError: ima", "no picture (", "no caption (", "empty captio", "not JSON: Ex", "empty captio",
        'no "caption"', "",
    ]  # fmt: skip
    assert list(captions_of_shard(shard)) == ["A red cat", "A cat", "A cat", *[None] * 4, "A blue dog"]


def test_bad_shards(shards, tmp_path):
    cut, empty, none = (str(tmp_path / name) for name in ("cut.tar", "empty.tar", "none.tar"))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "0000.tar").read_bytes()[:5000])
    (tmp_path / "none.tar").write_bytes(b"not a tar file" * 100)
    write_shard(empty, [])
    for epoch_samples in (None, 200):
        items = list(dataset([cut, empty, none, str(tmp_path / "gone.tar")], shuffle=0, epoch_samples=epoch_samples))
        reasons = {item.path: item.reason for item in items if isinstance(item, Bad) and item.path.endswith(".tar")}
        assert reasons.keys() == {cut, empty, none, str(tmp_path / "gone.tar")}
        assert reasons[empty] == "a shard without samples"
        assert reasons[cut].startswith("ReadError: unexpected end of data")
        assert reasons[none] == "DamagedShardError: damaged header at byte 0: invalid header"
        assert reasons[str(tmp_path / "gone.tar")].startswith("FileNotFoundError")
    items = list(dataset([cut, shards[1]], shuffle=0))
    assert {key for key in range(4, 8)} <= {int(i.path.rpartition("/")[2]) for i in items if isinstance(i, Example)}


def losses(path):
    """The keys read from a shard, and the faults of the shard itself."""
    items = list(dataset([str(path)], shuffle=0))
    faults = [item.reason for item in items if isinstance(item, Bad) and item.path == str(path)]
    return keys(item for item in items if isinstance(item, Example)), faults


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a shard of five samples, and the offsets at which its members end."""
    path = tmp_path_factory.mktemp("whole") / "a.tar"
    files = [file for key in range(5) for file in sample(key, f"A cat sits on {key} mats.", "txt")]
    write_shard(path, files)
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar]
        return path.read_bytes(), offsets, tar.offset


def test_every_cut_is_noticed(whole, tmp_path):
    content, offsets, end = whole
    rng, shard = random.Random(0), tmp_path / "cut.tar"
    cuts = {*range(0, end + 2048, 512), *(o + d for o in [*offsets, end] for d in (-1, 1, 511, 513)), end + 1023}
    for cut in sorted(cuts | {rng.randrange(end) for _ in range(40)}):
        shard.write_bytes(content[: max(cut, 0)])
        read, faults = losses(shard)
        assert read == list(range(len(read)))
        if cut >= end + 1024:
            assert len(read) == 5 and not faults
        else:
            assert (len(faults) == 1 and "byte" in faults[0]) or cut <= 0, (cut, faults)


@pytest.mark.parametrize("damage", ["zeros", "noise", "one bit"])
def test_every_damaged_header_is_noticed(whole, tmp_path, damage):
    content, offsets, _ = whole
    for number, offset in enumerate(offsets):
        block = bytearray(content[offset : offset + 512])
        if damage == "zeros":
            block = bytearray(512)
        elif damage == "noise":
            block = bytearray(random.Random(number).randbytes(512))
        else:
            block[3] ^= 4
        (tmp_path / "a.tar").write_bytes(content[:offset] + bytes(block) + content[offset + 512 :])
        read, faults = losses(tmp_path / "a.tar")
        assert read == list(range(number // 2)) and len(faults) == 1
        assert f"byte {offset}" in faults[0], faults


def test_a_shard_after_a_shard_is_noticed(whole, tmp_path):
    content, _, end = whole
    (tmp_path / "a.tar").write_bytes(content + content)
    read, faults = losses(tmp_path / "a.tar")
    assert read == list(range(5))
    assert faults == [f"DamagedShardError: zero block at byte {end}, but more data at byte {len(content)}"]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shards(whole, tmp_path, compress):
    packed = compress(whole[0])
    (tmp_path / "a.tar").write_bytes(packed)
    assert losses(tmp_path / "a.tar") == (list(range(5)), [])
    for share in (0.2, 0.5, 0.9):
        (tmp_path / "a.tar").write_bytes(packed[: int(share * len(packed))])
        read, faults = losses(tmp_path / "a.tar")
        assert read == list(range(len(read))) and len(read) < 5 and len(faults) == 1


def sparse_member(path, name, kind, size, after=()):
    """A shard of a member of zeros, which take no room on the disk, and of more files."""
    header = tarfile.TarInfo(name)
    header.size, header.type = size, kind
    rest = path.with_suffix(".rest")
    write_shard(rest, list(after))
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.seek(512 + -(-size // 512) * 512)
        file.write(rest.read_bytes())
    return str(path)


@pytest.mark.parametrize("ending", ["jpg", "json", "txt"])
def test_huge_files_are_not_read(tmp_path, ending):
    size = 300 << 20
    others = [("1.jpg", picture()), ("1.txt", b"A cat")]
    others = [file for file in others if not file[0].endswith(ending)][-1 if ending == "jpg" else 0 :][:1]
    shard = sparse_member(
        tmp_path / "a.tar", f"1.{ending}", tarfile.REGTYPE, size, [*others, *sample(2, "A red cat", "txt")]
    )
    tracemalloc.start()
    bad, good = dataset([shard], shuffle=0)
    assert tracemalloc.get_traced_memory()[1] < size / 10
    tracemalloc.stop()
    assert bad == Bad(f"{shard}/1", f"1.{ending} has {size} bytes, more than {1 << 27}")
    assert good.texts[0] == "A red cat"
    assert list(captions_of_shard(shard)) == ["A cat" if ending == "jpg" else None, "A red cat"]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_huge_names_are_not_read(tmp_path, kind):
    size = 300 << 20
    shard = sparse_member(tmp_path / "a.tar", "name", kind, size, sample(1, "A red cat", "txt"))
    tracemalloc.start()
    (bad,) = dataset([shard], shuffle=0)
    assert tracemalloc.get_traced_memory()[1] < size / 10
    tracemalloc.stop()
    assert bad == Bad(shard, f"DamagedShardError: expected a name of at most {1 << 20} bytes, got {size}")


def test_a_caption_in_either_file(tmp_path):
    """KEY.json may hold other things about the picture; then the caption is in KEY.txt."""
    forms = [
        b'{"url": "x"}',
        b'{"captions": {"en": 1}}',
        b'{"caption": null}',
        b'{"caption": " "}',
        b"{",
        b"[]",
        b'{"caption": "A blue dog"}',
    ]
    files = [
        file for key, form in enumerate(forms)
        for file in ((f"{key}.jpg", picture()), (f"{key}.json", form), (f"{key}.txt", b"A red cat"))
    ]  # fmt: skip
    shard = write_shard(tmp_path / "a.tar", files)
    captions = ["A red cat"] * 6 + ["A blue dog"]
    assert [item.texts[0] for item in dataset([shard], shuffle=0)] == captions
    assert list(captions_of_shard(shard)) == captions


def test_several_captions(tmp_path):
    """Each time a sample is read, one of its captions is drawn; a bad one makes the sample unusable."""
    captions = ["A cat sleeps", "A dog runs", "A lamp is lit"]
    files = []
    for key in range(40):
        names = {"captions": captions} if key % 2 else {"caption": captions}
        files += [(f"{key}.jpg", picture()), (f"{key}.json", json.dumps(names).encode())]
    shard = write_shard(tmp_path / "a.tar", [*files, ("x.jpg", picture()), ("x.json", b'{"captions": ["a", ""]}')])
    data = dataset([shard], shuffle=0)
    *examples, bad = data
    assert bad == Bad(f"{shard}/x", "empty caption (number 2 of 2)")
    first = [example.texts[0] for example in examples]
    assert {*first} == {*captions} and first == [example.texts[0] for example in list(data)[:-1]]
    data.set_epoch(1)
    assert first != [example.texts[0] for example in list(data)[:-1]]
    assert Counter(captions_of_shard(shard)) == {**dict.fromkeys(captions, 40), None: 1}


def test_keys_with_dots_are_explained(tmp_path):
    files = [("img_0.5.jpg", picture()), ("img_0.5.txt", b"A cat"), ("1.jpg", picture()), ("1.v2.txt", b"A cat")]
    shard = write_shard(tmp_path / "a.tar", files)
    first, second = dataset([shard], shuffle=0)
    ends = "a key ends at its first dot, after which this one has"
    assert first == Bad(f"{shard}/img_0", f"no picture (jpg, jpeg, png, webp); {ends} 5.jpg, 5.txt")
    assert second == Bad(f"{shard}/1", f"no caption (json, txt); {ends} jpg, v2.txt")


@pytest.mark.parametrize(
    "address",
    [
        "pipe:cat {folder}/0000.tar", "PIPE:cat {folder}/0000.tar", "{folder}/0000.tar::pipe:cat x.tar",
        "http://host/x.tar'; touch {folder}/hacked; '", "s3://bucket/$(touch x).tar", "https://host/`touch x`.tar",
        "hf://a/b c.tar", "gs://bucket/a\nb.tar", "pipe:cat {{a,b}}.tar",
    ],
)  # fmt: skip
def test_commands_are_refused(shards, tmp_path, address):
    with pytest.raises(ValueError, match=r"shards: .* is a command, or may hide one; allow_commands would run it"):
        expand_shards(address.format(folder=tmp_path))


def test_commands_can_be_allowed(shards, tmp_path):
    (address,) = expand_shards(f"pipe:cat {tmp_path}/0000.tar", allow_commands=True)
    assert sorted(keys(dataset([address], shuffle=0))) == list(range(SAMPLES))
    assert expand_shards("https://host:80/a/x-{00..01}.tar?key=a%20b&c=d") == [
        f"https://host:80/a/x-0{i}.tar?key=a%20b&c=d" for i in range(2)
    ]


def test_rejects(shards, tmp_path):
    with pytest.raises(ValueError, match="shards: expected at least one for each of 7 ranks, got 6"):
        dataset(shards, ranks=7)
    with pytest.raises(ValueError, match="shards: expected at least one"):
        dataset([])
    assert len(dataset(shards, ranks=7, epoch_samples=70).shards) == 6
    with pytest.raises(ValueError, match="epoch_samples: expected a number, got None"):
        next(dataset(shards).batches(2, 0))
    with pytest.raises(FileNotFoundError, match=r"shards: 2 of 3 are not files; the first: .*0006\.tar"):
        expand_shards(str(tmp_path / "{0005..0007}.tar"))
    assert len(expand_shards(f"{tmp_path}/0000.tar::{tmp_path}/0001.tar")) == 2


def test_phrases_of_shards(shards, tmp_path):
    prepare(PrepareConfig(str(tmp_path / "{0000..0005}.tar"), tmp_path / "phrases", "rules", workers=1))
    data = ShardDataset(shards, ExampleMaker(8, 77, PhraseCache(tmp_path / "phrases")))
    truth = {example.path: example.texts for example in dataset(shards)}
    assert {example.path: example.texts for example in data} == truth
