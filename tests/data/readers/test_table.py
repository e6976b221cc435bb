"""Tables as open_clip reads them, found by their first line, and faults in lines and quotes."""

import csv
import pickle
import random

import pytest

from betaclip.data.readers.annotations import BadRowError
from betaclip.data.readers.table import Table, TableOptions

TRICKY = [
    'a "quoted" dog',
    '"',
    "a, b; c",
    "new\nline\ttab",
    "windows\r\nline",
    "über café 犬 🐕\x85\u2028",
]


def write(path, rows, header=("filepath", "title"), separator="\t", **options):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator, **options).writerows([header, *rows])
    return path


def rows_of(table):
    return [table[i] for i in range(len(table))]


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_rows(tmp_path, separator, ends):
    """All that fields may hold in quotes."""
    rng = random.Random(0)
    captions = TRICKY + ["".join(rng.choices('",;\t\n é', k=9)) + "x" for _ in range(60)]
    path = write(tmp_path / "a.csv", enumerate(captions), separator=separator, lineterminator=ends)
    table = Table(path, TableOptions())
    assert table.separator == separator
    assert rows_of(table) == [(str(i), [caption]) for i, caption in enumerate(captions)]


@pytest.fixture
def limit():
    before = csv.field_size_limit(100)
    yield
    csv.field_size_limit(before)


def test_field_beyond_the_limit_is_a_bad_row(tmp_path, limit):
    """The limit is that of Python's csv module, for the whole process: 131 072 characters unless it is set."""
    table = Table(write(tmp_path / "a.csv", [("a.jpg", "x" * 101), ("b.jpg", "a dog")]), TableOptions())
    with pytest.raises(BadRowError, match="field larger than field limit"):
        table[0]
    assert table[1] == ("b.jpg", ["a dog"])


def test_columns(tmp_path):
    path = write(tmp_path / "a.csv", [("1", "a cat", "a.jpg"), ("2", "a dog", "b.jpg")], ("id", "text", "file"), ",")
    options = TableOptions(csv_img_key="file", csv_caption_key="text")
    assert rows_of(Table(path, options)) == [("a.jpg", ["a cat"]), ("b.jpg", ["a dog"])]
    path = write(tmp_path / "a.tsv", [("a.jpg", "a, cat")], ("image", "caption"))
    assert rows_of(Table(path, TableOptions(csv_separator="\\t"))) == [("a.jpg", ["a, cat"])]
    assert rows_of(pickle.loads(pickle.dumps(Table(path, TableOptions())))) == [("a.jpg", ["a, cat"])]
    path = write(tmp_path / "a.tsv", [("a.jpg", "a cat")], separator="|")
    assert rows_of(Table(path, TableOptions(csv_separator="|"))) == [("a.jpg", ["a cat"])]


def test_blank_lines_a_mark_and_a_last_line_without_an_end(tmp_path):
    path = tmp_path / "a.tsv"
    for text in ("filepath\ttitle\na\tb\n\n\nc\td\n\n", "\ufefffilepath\ttitle\n\na\tb\nc\td"):
        path.write_text(text, encoding="utf-8")
        table = Table(path, TableOptions())
        assert rows_of(table) == [("a", ["b"]), ("c", ["d"])] and table.where(1) == f"{path}, row 2"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"a.jpg", r"1 fields in 2 columns; a field with '\\t' needs quotes"),
        (b"a.jpg\ta cat\tand a dog", "3 fields in 2 columns"),
        (b"\ta cat", "no 'filepath'"),
        (b"a.jpg\t ", "empty caption, of image a.jpg"),
        (b'a.jpg\t"Hello" she said', "expected after"),
        (b"a.jpg\t" + b"x" * 200_000, "field larger than field limit"),
        (b"a.jpg\t\xff", "not UTF-8"),
    ],
)
def test_bad_rows(tmp_path, line, fault):
    """A fault within a line is one bad row, and the rows after it are read."""
    path = tmp_path / "a.tsv"
    path.write_bytes(b"\n".join((b"filepath\ttitle", b"x.jpg\ta cat", line, b"y.jpg\ta dog", b"")))
    table = Table(path, TableOptions())
    assert len(table) == 3 and table[0] == ("x.jpg", ["a cat"]) and table[2] == ("y.jpg", ["a dog"])
    with pytest.raises(BadRowError, match=fault):
        table[1]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "has the columns ; expected one of them to be 'filepath' or 'image'"),
        ("filepath\ttitle\n", {}, "has no row with an image and a caption: it is empty"),
        (
            "path,text\na,b\n",
            {},
            r"the columns 'path', 'text'; expected one of them to be 'filepath' or 'image' \(",
        ),
        (
            "image,text\na,b\n",
            {},
            r"'text'; expected .* 'title' or 'caption' \(csv_caption_key, csv_separator",
        ),
        ("image,filepath,title\na,b,c\n", {}, "expected one of them to be 'filepath' or 'image'"),
        ("image,image,title\na,b,c\n", {}, "expected one of them to be 'filepath' or 'image'"),
        ("image,title\na,b\n", {"csv_img_key": "file"}, r"expected one of them to be 'file' \(csv_img_key"),
        ("image,title\na,b\n", {"csv_separator": ";"}, "has the columns 'image,title'"),
        ("image,title\na,b\n", {"csv_separator": ", "}, r"^csv_separator: expected one character, or \\t .*, got ', '"),
        ("image,title\na,b\n", {"csv_separator": "é"}, "csv_separator: expected one character"),
        ("image,title\na,\n", {}, "has no row with an image and a caption; the first: empty caption, of image a"),
        ('image,title\na,b\nc,"d\ne,f\n', {}, "a.csv has a fault in the quotes that begin in line 3: unexpected end"),
        ('image,title\nc,"d\ne" f,g\n', {}, "has a fault in the quotes that begin in line 2: "),
        ('"image"x,title\na,b\n', {}, "has a fault in its first line"),
        (f"image,title\na,{'b' * 3000}\n", {}, r"a.csv has a row of more than 2000 bytes, at byte 12"),
    ],
)
def test_rejects(tmp_path, content, options, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        Table(tmp_path / "a.csv", TableOptions(**options), max_row=2000)


def test_rejects_other_encodings(tmp_path):
    (tmp_path / "a.csv").write_text("image,title\na,b\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"annotations: .*a.csv is in UTF-16; expected UTF-8"):
        Table(tmp_path / "a.csv", TableOptions())
