"""Links of the site: pages of docs/ stay where they are, other files of the repository lie under repository/."""

import importlib.util
from types import ModuleType

import pytest
from support.paths import ROOT


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", ROOT / "tools" / "mkdocs_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("docs/losses.md", "[a](pooling.md#when-it-pays)", "[a](pooling.md#when-it-pays)"),
        ("docs/losses.md", "[a](../CONTRIBUTING.md#tests)", "[a](repository/CONTRIBUTING.md#tests)"),
        ("docs/losses.md", '![a](../csrc/betaclip.h "title")', '![a](repository/csrc/betaclip.h "title")'),
        ("CONTRIBUTING.md", "[a](docs/losses.md)", "[a](../losses.md)"),
        ("csrc/README.md", "[a](betaclip.h) [b](../README.md)", "[a](betaclip.h) [b](../README.md)"),
        ("docs/losses.md", "[a](#padded-texts) [b](https://arxiv.org/abs/1)", None),
        ("docs/losses.md", "[a](../nowhere.md)", None),
    ],
)
def test_links_are_rewritten(hooks: ModuleType, page: str, link: str, expected: str | None) -> None:
    assert hooks.rewritten(link, page) == (link if expected is None else expected)


def test_files_outside_of_docs_are_found(hooks: ModuleType) -> None:
    text = "[a](../csrc/README.md) [b](losses.md) [c](../nowhere.md) [d](../CONTRIBUTING.md#tests) [e](../csrc)"
    assert list(hooks.linked_files(text, "docs/pooling.md")) == ["csrc/README.md", "CONTRIBUTING.md"]


@pytest.mark.parametrize("path", ["docs/losses.md", "csrc/README.md", "CHANGELOG.md"])
def test_paths_come_back(hooks: ModuleType, path: str) -> None:
    assert hooks.repository_path(hooks.site_uri(path)) == path
