"""The page about a run: its structure, and what someone sees who opens it in a browser."""

import json
import re
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import html5lib
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright
from support import colours

from betaclip.data.registry import DataConfig
from betaclip.evaluation.run import Evaluator
from betaclip.evaluation.sets import EvaluationConfig
from betaclip.page.page import write_page
from betaclip.training.config import TrainingConfig

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NAME = "a <b>run</b> & \"more\" 'quoted' </script><script>hacked=1</script> 猫"
CAPTION = 'A red "box" <b>&amp; 猫</script><img src=x onerror=hacked=1>. The green one'
ROWS = [
    {"step": 10 * i, "loss": 8 / i, "leak": 0.1 / i, "lr_pool": 0.1, "images_per_s": 5.0, "epoch": i / 4}
    for i in (1, 2, 3, 4)
]
SHARES = {"retrieval/t2i_r1": 0.75, "retrieval/i2t_r1": 0.5, "retrieval/left_out": 0.0} | {
    f"retrieval/{direction}_r{k}": 1.0 for direction in ("t2i", "i2t") for k in (5, 10)
}
RESULTS = {
    "β-CLIP": {"retrieval/images": 50.0, "retrieval/texts": 50.0, **SHARES},
    "global loss only": {"retrieval/images": 50.0, "retrieval/texts": 50.0, **SHARES, "retrieval/t2i_r1": 0.25},
}


def written(folder, name, data, evaluation, results, model, rows=ROWS):
    """The page of a run with these results; the comparison run has logged half of the steps."""
    runs = {}
    for run, part in (("β-CLIP", rows), ("global loss only", rows[:2] if results else [])):
        runs[run] = folder / name / run
        runs[run].mkdir(parents=True)
        (runs[run] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    default = TrainingConfig()
    config = replace(default, data=data, run=replace(default.run, name=NAME, batch_size=7))
    file = folder / f"{name}.html"
    write_page(file, config, runs, results, model, Evaluator(evaluation))
    return file


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of a run on scenes, of one on pictures with hostile captions, and of one that was stopped."""
    folder, model = tmp_path_factory.mktemp("pages"), colours.ColourModel().eval()
    for i in range(3):
        colours.save(folder / "own" / f"{i}.png", colours.picture({(0, 1): "red", (2, 3): "green"}, 160, 64))
        (folder / "own" / f"{i}.txt").write_text(f"{CAPTION}.")
    own = DataConfig(kind="pairs", annotations=folder / "own", phrase_extractor="rules", max_phrases=0)
    return {
        "scenes": written(folder, "scenes", DataConfig(), EvaluationConfig(scenes=4), RESULTS, model),
        "own": written(folder, "own pictures", own, EvaluationConfig(), {}, model),
        "stopped": written(folder, "stopped", DataConfig(), EvaluationConfig(), {}, None, ROWS[:2]),
        "not logged": written(folder, "not logged", DataConfig(), EvaluationConfig(), {}, model, []),
    }


PARTS = {
    "scenes": ["results", "pictures", "mistakes", "curves", "settings"],
    "own": ["pictures", "curves", "settings"],
    "stopped": ["curves", "settings"],
    "not logged": ["pictures", "settings"],
}


@pytest.mark.parametrize("kind", PARTS)
def test_structure(pages, kind):
    """Valid HTML, the parts for which there is something to show, and links to these."""
    text = pages[kind].read_text("utf-8")
    root = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)
    assert [section.get("id") for section in root.iter("section")] == PARTS[kind]
    assert [link.get("href") for link in root.iter("a")] == [f"#{part}" for part in PARTS[kind]]
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(image.get("alt") is not None and image.get("src").startswith("data:") for image in root.iter("img"))
    assert not re.search(r"(src|href)=.?(https?:)?//|url\(|@import", text)
    assert len(text.encode()) < 3e6


def test_results_stand_beside_chance_and_the_other_run(pages):
    root = html5lib.parse(pages["scenes"].read_text("utf-8"), namespaceHTMLElements=False)
    first = next(element for element in root.iter("ul") if element.get("class") == "measures")[0]
    assert " ".join(" ".join(first.itertext()).split()) == (
        "The picture of a caption found first among 50 β-CLIP 75.0 % global loss only 25.0 % chance 2.0 %"
    )
    heads = [cell.text for cell in root.iter("th") if cell.get("scope") == "row"]
    assert heads[:2] == ["β-CLIP", "global loss only"] and "run.batch_size" not in heads
    settings = {row[0][0].text: [cell.text for cell in row[1:]] for row in root.iter("tr") if len(row[0])}
    assert settings == {"run.batch_size": ["7", "32"]}


def test_head_says_how_far_it_came(pages):
    for kind, updates in (("scenes", "40 of 40; 7 pictures each"), ("stopped", "20 of 40, not finished; 7 pictures")):
        assert updates in pages[kind].read_text("utf-8")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        found = next(filter(None, map(shutil.which, BROWSERS)), driver.chromium.executable_path)
        if not Path(found).exists():
            pytest.skip("no browser: install Debian's chromium-headless-shell, or run: playwright install chromium")
        launched = driver.chromium.launch(executable_path=found)
        yield launched
        launched.close()


@pytest.fixture
def view(browser, pages):
    """Open a page; in the end nothing was asked of the network, and no script has failed or was smuggled in."""
    contexts, faults = [], []

    def open_(kind, width=1200, **options):
        options |= {"viewport": {"width": width, "height": 800}, "reduced_motion": "reduce"}
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on(
            "request", lambda request: faults.append(request.url) if request.url[:5] not in ("file:", "data:") else 0
        )
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(pages[kind].as_uri())
        return page

    yield open_
    for context in contexts:
        assert context.pages[0].evaluate("typeof hacked") == "undefined"
        context.close()
    assert not faults


def brightest(stage):
    """The row and the column of the cell of the model's grid that is shown brightest."""
    with Image.open(BytesIO(stage.screenshot())) as image:
        cells = np.asarray(image.convert("L").resize((colours.GRID, colours.GRID), Image.Resampling.BOX))
    return np.unravel_index(cells.argmax(), cells.shape)


def tab_to(page, button):
    for _ in range(50):
        page.keyboard.press("Tab")
        if button.evaluate("e => e === document.activeElement"):
            return
    raise AssertionError("the Tab key does not reach the text")


@pytest.mark.parametrize("way", ["mouse", "keyboard", "touch"])
def test_pointing_at_a_text_shows_its_attention(view, way):
    """The red text lights up the red square, the green one the green square; then the picture is as before."""
    page = view("own", 390, has_touch=True, is_mobile=True) if way == "touch" else view("own")
    card = page.locator(".picture").nth(1)
    stage, texts, said = card.locator(".stage"), card.locator("button"), card.locator(".said")
    assert texts.first.locator(".text").inner_text() == CAPTION.split(". ")[0]
    stage.scroll_into_view_if_needed()
    before = stage.screenshot()
    for number, cell in ((0, (0, 1)), (1, (2, 3))):
        text = texts.nth(number)
        match way:
            case "mouse":
                text.hover()
            case "keyboard":
                tab_to(page, text)
            case "touch":
                text.tap()
        assert stage.screenshot() != before and brightest(stage) == cell
        assert [layer.is_visible() for layer in card.locator(".layer").all()] == [number == 0, number == 1]
        assert said.inner_text() == "16.0 times even attention where it is highest."
    match way:
        case "mouse":
            page.mouse.move(0, 0)
        case "keyboard":
            tab_to(page, page.locator(".picture").nth(2).locator("button").first)
        case "touch":
            assert texts.nth(1).get_attribute("aria-pressed") == "true"
            texts.nth(1).tap()
    assert said.inner_text() == "" and stage.screenshot() == before
    assert page.locator(".picture").first.locator(".layer:visible").count() == 0


def test_a_click_keeps_the_text(view):
    """Until it is clicked again, or the Escape key is pressed; another one that is pointed at goes before it."""
    page = view("scenes")
    card = page.locator(".picture").first
    texts, layers = card.locator("button"), card.locator(".layer")
    texts.nth(0).click()
    texts.nth(1).hover()
    assert layers.nth(1).is_visible() and not layers.nth(0).is_visible()
    page.mouse.move(0, 0)
    assert layers.nth(0).is_visible() and layers.nth(0).locator(".place").is_visible()
    assert [text.get_attribute("aria-pressed") for text in texts.all()[:2]] == ["true", "false"]
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")  # from the first text to the second
    assert texts.nth(0).get_attribute("aria-pressed") == "false" and layers.nth(1).is_visible()
    page.keyboard.press("Enter")
    assert texts.nth(1).get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("width", [320, 390, 1200])
@pytest.mark.parametrize("kind", ["scenes", "own"])
def test_fits_the_screen(view, kind, width):
    """Nothing is wider than the screen, except what scrolls in a frame of its own; texts are large enough to tap."""
    page = view(kind, width, has_touch=True, is_mobile=width < 1200)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = """[...document.body.querySelectorAll("*:not(.wide *, pre *, svg *)")]
        .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(wide) == []
    assert min(text.bounding_box()["height"] for text in page.locator(".texts button").all()) >= 44


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system(view, scheme):
    page = view("stopped", color_scheme=scheme)
    style = page.evaluate("(({color, backgroundColor: ground}) => [color, ground])(getComputedStyle(document.body))")
    ink, ground = (sum(map(int, re.findall(r"\d+", colour))) / 765 for colour in style)
    assert abs(ink - ground) > 0.75 and (ink > ground) == (scheme == "dark")


def test_curves_tell_the_values_of_a_step(view):
    panel = (page := view("scenes")).locator(".panel").first
    values, step = panel.locator(".legend .value"), panel.locator(".step span")
    assert (step.inner_text(), values.all_inner_texts()) == ("40", ["2", "4"])
    box = panel.locator("svg[role]").bounding_box()
    panel.locator("svg[role]").hover(position={"x": 0.2 * box["width"], "y": 50})
    assert values.all_inner_texts() == ["8", "8"] and float(step.inner_text()) < 15
    page.mouse.move(0, 0)
    assert (step.inner_text(), values.all_inner_texts()) == ("40", ["2", "4"])
    assert view("stopped").locator(".panel .legend").first.inner_text().split() == ["loss", "4"]


def test_strings_are_shown_as_they_are(view):
    page = view("own")
    assert page.locator("h1").inner_text() == NAME and page.title() == f"{NAME} · betaclip"
    assert page.locator(".photo").first.get_attribute("alt").startswith(CAPTION.split(". ")[0])
