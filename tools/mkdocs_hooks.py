"""Make links from a page to any file of the repository work on the mkdocs site, as they do on a code host.

mkdocs publishes docs/ alone. A file outside of it that a page links to (a figure of benchmarks/results, a
configuration, CONTRIBUTING.md) is published under repository/, and the link is rewritten.

The API reference is read from a copy of the sources, because mkdocstrings wants an __init__.py in every package and
kernels/ must not have one (CONTRIBUTING.md says why).
"""

import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = "docs"
# ](target), ](target#anchor) and ](target "title")
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)\s#]+)")


_sources = tempfile.TemporaryDirectory(prefix="betaclip-docs-")


def on_config(config: Any) -> Any:
    """Point mkdocstrings to the copy."""
    package = Path(_sources.name, "betaclip")
    without = shutil.ignore_patterns("__pycache__", "lib", "kernels")
    shutil.copytree(ROOT / "betaclip", package, ignore=without, dirs_exist_ok=True)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=without, dirs_exist_ok=True)
    (package / "kernels" / "__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_sources.name]
    return config


on_config.mkdocs_priority = 100  # type: ignore[attr-defined]  # before mkdocstrings' own, which reads the paths


def on_files(files: Any, config: Any) -> Any:
    """Add the files that pages link to, and those that the added pages link to."""
    from mkdocs.structure.files import File

    pages = [f"{DOCS}/{file.src_uri}" for file in files.documentation_pages()]
    for page in pages:
        for target in linked_files((ROOT / page).read_text(encoding="utf-8"), page):
            uri = site_uri(target)
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
                if target.endswith(".md"):
                    pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return rewritten(markdown, repository_path(page.file.src_uri))


def linked_files(markdown: str, page: str) -> Iterator[str]:
    """Files of the repository outside of docs/ to which a page of the repository links."""
    for match in LINK.finditer(markdown):
        target = _target(match, page)
        if not target.startswith(f"{DOCS}/") and (ROOT / target).is_file():
            yield target


def rewritten(markdown: str, page: str) -> str:
    """The page's Markdown, with links that are right at its place on the site."""
    here = posixpath.dirname(site_uri(page))

    def link(match: re.Match[str]) -> str:
        target = _target(match, page)
        if not (ROOT / target).is_file():
            return match.group()  # mkdocs reports it as broken
        return match.group(1) + posixpath.relpath(site_uri(target), here or ".")

    return LINK.sub(link, markdown)


def site_uri(path: str) -> str:
    """The path on the site of a file of the repository."""
    return path.removeprefix(f"{DOCS}/") if path.startswith(f"{DOCS}/") else f"repository/{path}"


def repository_path(uri: str) -> str:
    """The inverse of :func:`site_uri`."""
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"{DOCS}/{uri}"


def _target(match: re.Match[str], page: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), match.group(2)))
