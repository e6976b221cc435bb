"""Annotations read by the offsets of their rows: both forms, all that JSON strings may hold, and broken files."""

import json
import pickle
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from betaclip.data.readers.annotations import Annotations, BadRowError

TRICKY = ['a "quoted" dog', "ends in a backslash \\", '\\" }], {[', "new\nline\ttab", "über café 犬 🐕", "[{}],,", "a"]


def row(number, caption):
    return {
        "id": number,
        "image": f"images/{number}.jpg",
        "size": [{"w": 640}, [480, None]],
        "conversations": [{"from": "human", "value": 'What is "this"?'}, {"from": "gpt", "value": caption}],
    }


def write(path, rows, **options):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, **options) + "\n" for r in rows))
    else:
        path.write_text(json.dumps(rows, **options))
    return path


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_array(tmp_path, chunk, ascii_only, indent):
    rng = random.Random(0)
    captions = TRICKY + ["".join(rng.choices('\\"[]{},: xé', k=rng.randrange(1, 20))) + "x" for _ in range(60)]
    rows = [row(i, caption) for i, caption in enumerate(captions)]
    source = Annotations(write(tmp_path / "a.json", rows, ensure_ascii=ascii_only, indent=indent), chunk=chunk)
    assert [source[i] for i in range(len(source))] == [(f"images/{i}.jpg", [c]) for i, c in enumerate(captions)]


def test_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(i, caption) for i, caption in enumerate(TRICKY)])
    truth = [(f"images/{i}.jpg", [caption]) for i, caption in enumerate(TRICKY)]
    for text in (path.read_text(), path.read_text().rstrip("\n")):
        path.write_text(text)
        source = Annotations(path)
        assert [source[i] for i in range(len(source))] == truth


def test_the_content_decides_not_the_name(tmp_path):
    rows = [row(i, caption) for i, caption in enumerate(TRICKY)]
    lines, whole = (write(tmp_path / name, rows).read_text() for name in ("a.jsonl", "a.json"))
    for mark in ("", "\ufeff"):
        for name, text in (("a.json", lines), ("a.jsonl", whole), ("a.jsonl", lines), ("a.json", f" \n{whole}")):
            (tmp_path / name).write_text(mark + text)
            source = Annotations(tmp_path / name)
            assert [source[i][1] for i in range(len(source))] == [[caption] for caption in TRICKY], (name, mark)


def test_half_a_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"image": "a.jpg", "conversations": [{}, {"value": "a \\ud83d cat"}]}\n')
    assert Annotations(path)[0] == ("a.jpg", ["a ? cat"])


def test_forms_of_captions(tmp_path):
    forms = [
        ({"caption": "a cat"}, ["a cat"]),
        ({"caption": ["a cat", "a dog"]}, ["a cat", "a dog"]),
        ({"captions": ["a cat", "a dog"]}, ["a cat", "a dog"]),
        ({"captions": "a cat"}, ["a cat"]),
        ({"caption": "a cat", "captions": ["a dog"]}, ["a cat"]),
        ({"caption": None, "conversations": [{}, {"value": "a cat"}]}, ["a cat"]),
    ]
    rows = [{"image": "a.jpg", **form} for form, _ in forms]
    for name in ("a.json", "a.jsonl"):
        source = Annotations(write(tmp_path / name, rows))
        assert [source[i] for i in range(len(source))] == [("a.jpg", captions) for _, captions in forms]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"image": "a.jpg", "conv', "not JSON: Unterminated string"),
        ("", "not JSON: Expecting value"),
        ("[]", 'no "image"'),
        ("3", 'no "image"'),
        ('{"image": 3}', 'no "image"'),
        ('{"image": "a.jpg"}', 'no "caption", "captions" or "conversations", of image a.jpg'),
        ('{"image": "a.jpg", "caption": null}', 'no "caption", "captions" or "conversations", of image a.jpg'),
        ('{"image": "a.jpg", "caption": 3}', "empty caption, of image a.jpg"),
        ('{"image": "a.jpg", "captions": []}', "empty list of captions, of image a.jpg"),
        ('{"image": "a.jpg", "captions": ["a", "b", " "]}', r"empty caption \(number 3 of 3\), of image a.jpg"),
        ('{"image": "a.jpg", "conversations": [{}]}', r'no "conversations"\[1\]\["value"\], of image a.jpg'),
        ('{"image": "a.jpg", "conversations": [{}, {"value": " \\n"}]}', "empty caption, of image a.jpg"),
        ('{"image": "a.jpg", "conversations": [{}, {"value": ["x"]}]}', "empty caption, of image a.jpg"),
        ("\x80", "not JSON"),
        ("[" * 200_000, "not JSON"),
    ],
)
def test_bad_rows(tmp_path, line, fault):
    path = tmp_path / "a.jsonl"
    good = json.dumps(row(0, "a cat")).encode()
    path.write_bytes(b"\n".join((good, line.encode("latin-1"), good, b"")))
    source = Annotations(path)
    assert len(source) == 3 and source[2] == ("images/0.jpg", ["a cat"])
    with pytest.raises(BadRowError, match=fault):
        source[1]
    assert source.where(1) == f"{path}, row 2"


def test_bad_rows_of_an_array(tmp_path):
    path = write(tmp_path / "a.json", [None, row(1, "a cat"), [1, [2, "]"]], "x, y", {}, row(5, "a dog")])
    source = Annotations(path)
    assert [source._fault(i) == "" for i in range(len(source))] == [False, True, False, False, False, True]
    assert source[5] == ("images/5.jpg", ["a dog"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "has no row with an image and a caption: it is empty"),
        ("a.jsonl", "", "has no row with an image and a caption: it is empty"),
        ("a.json", "[]", "has no row with an image and a caption: it is empty"),
        ("a.json", '[{"image": "a.jpg"}]', 'no row with an image and a caption; the first: no "caption"'),
        (
            "a.json",
            '[{"image": "a.jpg"}, {"im',
            "fault in the row at byte 20, or is only a part of a file: Unterminated",
        ),
        (
            "a.json",
            '[{"image": "a.jpg"}',
            "fault in the row at byte 1, or is only a part of a file: no comma or closing",
        ),
        ("a.json", '[{"image": "a.jpg"},', "fault in the row at byte 20, or is only a part of a file"),
        ("a.json", '[{"image": "a.jpg]}', "fault in the row at byte 1, .*: Unterminated string"),
        ("a.json", '[{"image": "a.jpg"} {}]', "fault in the row at byte 1, .*: expected a comma or a closing bracket"),
        ("a.json", '[{}, {"image" 3}, {}]', "fault in the row at byte 4, .*: Expecting ':' delimiter"),
        ("a.json", "[" * 200_000, "fault in the row at byte 1, "),
        ("a.json", "Not found", "no row with an image and a caption; the first: not JSON"),
    ],
)
def test_rejects(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Annotations(tmp_path / name)


def test_gives_up_a_file_without_usable_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(Annotations, "_fault", lambda self, row: "none" if row < 1000 else pytest.fail("looked on"))
    with pytest.raises(
        ValueError, match="has no row with an image and a caption among the first 1000; the first: none"
    ):
        Annotations(write(tmp_path / "a.jsonl", [{}] * 1200))


def test_gives_up_a_row_without_end(tmp_path):
    path = write(tmp_path / "a.json", [row(0, "a cat"), row(1, "a dog " * 100)])
    assert len(Annotations(path, chunk=100, max_row=1000)) == 2
    with pytest.raises(ValueError, match=r"fault in the row at byte \d+, .*: Unterminated string"):
        Annotations(path, chunk=100, max_row=500)


def test_gives_up_a_line_without_end(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(0, "a cat"), row(1, "a dog " * 100)])
    assert len(Annotations(path, max_row=1000)) == 2
    with pytest.raises(ValueError, match=r"a.jsonl has a row of more than 500 bytes, at byte \d+"):
        Annotations(path, max_row=500)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_names_another_encoding(tmp_path, name, encoding):
    path = write(tmp_path / name, [row(0, "a cat")])
    path.write_text(path.read_text(), encoding=encoding)
    with pytest.raises(ValueError, match=f"annotations: .*{name} is in {encoding.upper()}; expected UTF-8"):
        Annotations(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_file_that_is_removed_or_cut_later(tmp_path, name):
    source = Annotations(write(tmp_path / name, [row(0, "a cat"), row(1, "a dog")]))
    source.path.write_text(source.path.read_text()[:200])
    assert source[0] == ("images/0.jpg", ["a cat"])
    with pytest.raises(BadRowError, match="not JSON"):
        source[1]
    source.path.unlink()
    for gone in range(2):
        with pytest.raises(BadRowError, match=r"FileNotFoundError: .*a\.json"):
            source[gone]


def test_rejects_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"annotations: .*nowhere\.json is not a file"):
        Annotations(tmp_path / "nowhere.json")


def test_what_follows_the_array_does_not_matter(tmp_path):
    path = write(tmp_path / "a.json", [row(0, "a cat"), row(1, "a dog")])
    path.write_text(path.read_text() + "\n[1, 2]")
    assert len(Annotations(path)) == 2


def test_holds_eight_bytes_per_row(tmp_path):
    source = Annotations(write(tmp_path / "a.json", [row(i, "a cat " * 50) for i in range(1000)]))
    assert source.separators.nbytes == 8 * 1001
    assert len(pickle.dumps(source)) < 8 * 1001 + 1000


def test_workers_read_for_themselves(tmp_path):
    source = Annotations(write(tmp_path / "a.json", [row(i, f"cat {i}") for i in range(40)]))
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        assert list(pool.map(source.__getitem__, range(40))) == [(f"images/{i}.jpg", [f"cat {i}"]) for i in range(40)]
