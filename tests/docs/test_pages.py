"""README and docs: their Python runs, their links lead somewhere, and the names in them exist."""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from support.markdown import anchors, blocks, links, pages, read
from support.paths import ROOT

from betaclip.train import TrainConfig

PAGES = pages()
PYTHON = [page for page in PAGES if any(block.language == "python" and block.run for block in blocks(read(page)))]
_OPTION = re.compile(r"--((?:model|data|loss|optimizer|run|evaluation)\.[a-z0-9.-]+)")
_NAME = re.compile(r"`(?!betaclip\.(?:h|safetensors)\b)(betaclip(?:\.\w+)+)")


@pytest.mark.parametrize("page", PYTHON)
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page are one session."""
    monkeypatch.chdir(tmp_path)
    session: dict[str, Any] = {"__name__": page}
    for block in blocks(read(page)):
        if block.language == "python" and block.run:
            # Lines as they are counted in the page, for tracebacks.
            exec(compile("\n" * (block.line - 1) + block.code, ROOT / page, "exec"), session)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in links(read(page)):
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {link}"
        assert path.resolve().is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page: str) -> None:
    for name in _NAME.findall(read(page)):
        assert exists(name), f"{page}: {name}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])  # which has old ones too
def test_options_of_train_exist(page: str) -> None:
    options = {option for option, _ in fields(TrainConfig)}
    for option in _OPTION.findall(read(page)):
        name = option.rstrip(".").replace("-", "_")
        assert name in options or name.replace(".no_", ".") in options, f"{page}: --{option}"


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or a name in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[count:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


def fields(kind: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """The settings of a dataclass of dataclasses, by their dotted names."""
    found = []
    for field in dataclasses.fields(kind):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        nested = dataclasses.is_dataclass(default)
        found += fields(type(default), f"{prefix}{field.name}.") if nested else [(prefix + field.name, default)]
    return found


def test_what_is_wrong_is_found() -> None:
    assert exists("betaclip.BetaCALLoss.forward")
    assert not exists("betaclip.BetaCalLoss") and not exists("betaclip.loses")
    names = {name for name, _ in fields(TrainConfig)}
    assert {"run.steps", "optimizer.pool.lr"} <= names and "run.stepz" not in names
    text = "# One β two\n<!-- not run: slow -->\n```python\n[a](b)\n```\n```python\n1\n```\n[c](d#e)"
    assert [block.run for block in blocks(text)] == [False, True]
    assert [block.line for block in blocks(text)] == [4, 7]
    assert links(text) == ["d#e"] and anchors(text) == {"one-β-two"}
