"""Figures of attention, drawn for a model that attends to the colour it reads."""

import sys
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox
from PIL import Image
from support import colours

from betaclip import visualize as module
from betaclip.cli import main
from betaclip.model.tokenizer import Tokenizer
from betaclip.visualize import attention_figure

LONG = "the very small checkered red square " * 8
TEXTS = ["a red square", "on the left of $5 _{", LONG, "blue", "red", LONG.replace(" ", "")]


@pytest.mark.parametrize("size", [(32, 32), (160, 64), (60, 400), (3000, 2000), (1200, 100)])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_nothing_overlaps(size, count):
    """Titles, panels, and the colour bar with its numbers stand apart, within the figure."""
    picture = colours.picture({(0, 1): "red"}, *size)
    figure = attention_figure(colours.ColourModel(), Tokenizer(), picture, TEXTS[:count])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    panels = [axis for axis in figure.axes if axis.images]
    (bar,) = (axis for axis in figure.axes if not axis.images)
    assert len(panels) == 1 + count
    titles = [axis.title for axis in panels[1:]]
    assert all(title.get_text().strip() for title in titles)
    boxes = [axis.get_window_extent(renderer) for axis in panels]
    boxes += [title.get_window_extent(renderer) for title in titles]
    tight = bar.get_tightbbox(renderer)
    assert tight is not None
    boxes.append(tight)
    for i, one in enumerate(boxes):
        assert one.x0 >= 0 and one.y0 >= 0 and one.x1 <= figure.bbox.x1 and one.y1 <= figure.bbox.y1
        for other in boxes[:i]:
            assert Bbox.intersection(one.padded(-1), other.padded(-1)) is None
    for axis in panels:  # they have the picture's shape
        box = axis.get_window_extent(renderer)
        assert box.width / box.height == pytest.approx(size[0] / size[1], rel=0.02)


def test_figure_shows_the_attention():
    """In multiples of even attention, over the picture's pixels, on one scale for all, under the boxes."""
    picture = colours.picture({(0, 1): "red", (2, 3): "green"}, 160, 64)
    boxes = [colours.box_of(0, 1, 160, 64), colours.box_of(2, 3, 160, 64), (0, 0, 160, 64)]
    figure = attention_figure(colours.ColourModel(), Tokenizer(), picture, ["red", "green", "nothing"], boxes)
    panels = [axis for axis in figure.axes if axis.images]
    np.testing.assert_array_equal(np.asarray(panels[0].images[0].get_array()), picture)
    for axis, box, peak in zip(panels[1:], boxes, (16, 16, 1), strict=True):
        gray, shown = axis.images
        assert gray.get_extent() == shown.get_extent() == [0, 160, 64, 0]
        values = np.asarray(shown.get_array())
        assert values.shape == (64, 160) and shown.get_clim()[0] == 0
        assert values.max() == pytest.approx(peak, rel=0.01) and shown.get_clim()[1] == pytest.approx(16, rel=0.01)
        (rectangle,) = axis.patches
        assert rectangle.get_bbox().extents.tolist() == list(box)
        if peak > 1:
            y, x = np.unravel_index(values.argmax(), values.shape)
            assert box[0] <= x < box[2] and box[1] <= y < box[3]


def test_even_attention_looks_even():
    """The scale goes to at least 2, so even attention does not fill it."""
    figure = attention_figure(colours.ColourModel(sharpness=0), Tokenizer(), colours.picture({}), ["red"])
    shown = figure.axes[1].images[1]
    assert shown.get_clim() == (0, 2)
    np.testing.assert_allclose(np.asarray(shown.get_array()), 1, rtol=1e-5)


def test_boxes_must_be_as_many_as_texts():
    picture = colours.picture({})
    with pytest.raises(ValueError, match="zip"):
        attention_figure(colours.ColourModel(), Tokenizer(), picture, ["red", "blue"], [(0, 0, 1, 1)])


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(module, "load_checkpoint", lambda path, device, **heads: colours.ColourModel().to(device))


def test_command(tmp_path, known, capsys):
    """It writes the figure of the picture and the texts that it was given."""
    picture, texts = colours.picture({(0, 1): "red"}, 160, 64), ["a red mug", "on the left"]
    file, out = colours.save(tmp_path / "picture.png", picture), tmp_path / "new" / "attention.png"
    main(["visualize", "checkpoint", str(file), *texts, "--out", str(out), "--device", "cpu"])
    assert capsys.readouterr().out == f"wrote {out}\n"
    canvas = FigureCanvasAgg(attention_figure(colours.ColourModel(), Tokenizer(), picture, texts))
    canvas.draw()
    with Image.open(out) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(canvas.buffer_rgba()))


@pytest.mark.parametrize(
    "image, texts, out, message",
    [
        ("good.png", [], "a.png", "TEXT"),
        ("good.png", ["red", " "], "a.png", "texts: expected words, got an empty text as number 2"),
        ("none.png", ["red"], "a.png", "image: none.png: FileNotFoundError"),
        ("broken.png", ["red"], "a.png", "image: broken.png: OSError"),
        ("good.png", ["red"], "a.nothing", "out: a.nothing: Format 'nothing' is not supported"),
        ("good.png", ["red"], "good.png/a.png", "out: good.png/a.png"),
    ],
)
def test_rejects(tmp_path, monkeypatch, known, capsys, image, texts, out, message):
    monkeypatch.chdir(tmp_path)
    colours.save(Path("good.png"), colours.picture({}))
    colours.save_broken(Path("broken.png"))
    with pytest.raises(SystemExit) as exit:
        main(["visualize", "checkpoint", image, *texts, "--out", out, "--device", "cpu"])
    assert exit.value.code == 2
    assert message.lower() in capsys.readouterr().err.lower()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.png", "good.png"]


def test_checkpoint_is_missing(tmp_path, capsys):
    file = colours.save(tmp_path / "picture.png", colours.picture({}))
    with pytest.raises(SystemExit):
        main(["visualize", str(tmp_path / "none.pt"), str(file), "red", "--device", "cpu"])
    assert "checkpoint" in capsys.readouterr().err


def test_headless(tmp_path, monkeypatch):
    """Without pyplot, which would look for a window system."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    monkeypatch.setenv("MPLBACKEND", "tkagg")
    monkeypatch.delenv("DISPLAY", raising=False)
    figure = attention_figure(colours.ColourModel(), Tokenizer(), colours.picture({}), ["red"])
    figure.savefig(tmp_path / "attention.png")
    with Image.open(tmp_path / "attention.png") as image:
        assert image.format == "PNG"


def font_with(letter: str, file: Path) -> str:
    """Write a font whose only letter is a square, and make it known to matplotlib; returns its family."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord(letter): "square"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "Square Sans", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(file)
    font_manager.fontManager.addfont(str(file))
    return "Square Sans"


@pytest.fixture
def square_font(tmp_path, monkeypatch):
    """A font that has 中, beside matplotlib's own, whatever the system has."""
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    return font_with("中", tmp_path / "square.ttf")


def drawn_titles(figure):
    FigureCanvasAgg(figure).draw()
    return [axis.title.get_text() for axis in figure.axes if axis.images][1:]


@pytest.mark.filterwarnings("error")  # matplotlib warns where it draws a box in place of a letter
def test_titles_in_any_script(square_font, caplog):
    """A letter that a font of the system has is drawn in it; others are spelled out, and named."""
    model, picture = colours.ColourModel(), colours.picture({})
    figure = attention_figure(model, Tokenizer(), picture, ["a red 中", "é ü β"])
    assert drawn_titles(figure) == ["a red 中", "é ü β"] and not caplog.messages
    assert figure.axes[1].title.get_fontfamily() == ["DejaVu Sans", square_font]
    figure = attention_figure(model, Tokenizer(), picture, ["中 犬", "\x07 bell"])
    assert drawn_titles(figure) == [r"中 \u72ac", r"\x07 bell"]
    assert caplog.messages == ["no installed font has \\x07 犬: titles show their code points"]


def test_wide_letters_are_wrapped(square_font):
    """A line of them is no wider than one of Latin letters, and the last one says that there is more."""
    figure = attention_figure(colours.ColourModel(), Tokenizer(), colours.picture({}), ["中" * 200])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    title, panel = figure.axes[1].title, figure.axes[1].get_window_extent()
    assert title.get_text().count("\n") == 2 and title.get_text().endswith(" …")
    box = title.get_window_extent(canvas.get_renderer())
    assert panel.x0 <= box.x0 and box.x1 <= panel.x1 and box.width > panel.width / 2


def test_photo_is_upright(tmp_path, known):
    """A camera held upright stores the picture on its side."""
    upright = colours.picture({(0, 1): "red"}, 60, 160)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(upright).rotate(90, expand=True).save(tmp_path / "photo.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "plain.png")
    for name in ("photo", "plain"):
        main(
            ["visualize", "checkpoint", str(tmp_path / f"{name}.png"), "red", "--out", str(tmp_path / f"{name}_a.png")]
        )
    photo, plain = (np.asarray(Image.open(tmp_path / f"{name}_a.png")) for name in ("photo", "plain"))
    np.testing.assert_array_equal(photo, plain)
