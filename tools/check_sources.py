"""Check the project's text files for paths of a machine, package indexes, and copies of the version number.

    python tools/check_sources.py            # all files that git tracks or does not ignore
    python tools/check_sources.py FILE...    # these files, as a pre-commit hook calls it

Prints each violation as ``file:line: text: rule`` and exits with 1 if there is any.
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION_FILE = "betaclip/__init__.py"
RULES = {
    "a path of one machine": r"(?<![\w.~/$}-])/(?:home|root|Users|work|tmp|mnt|scratch)/",
    # The brackets keep the pattern from finding itself.
    "a package index": r"(?:py[p]i|pythonhosted|download\.p[y]torch)\.org|--(?:extra-)?index-ur[l]|--find-link[s]",
}


def violations(name: str, text: str, version: str) -> Iterator[str]:
    """Each violation in the text of the file ``name``, a path relative to the root."""
    rules = dict(RULES)
    if name in ("pyproject.toml", "setup.py") or (name.startswith(("betaclip/", "kernels/")) and name != VERSION_FILE):
        rules[f"a second copy of the version; {VERSION_FILE} has it"] = f"[\"']{re.escape(version)}[\"']"
    for number, line in enumerate(text.splitlines(), 1):
        for rule, pattern in rules.items():
            for match in re.finditer(pattern, line):
                yield f"{name}:{number}: {match.group()}: {rule}"


def version_of(root: Path) -> str:
    (version,) = re.findall(r'^__version__ = "(.+)"$', (root / VERSION_FILE).read_text("utf-8"), flags=re.MULTILINE)
    return str(version)


def text_files(root: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The name and content of each text file; links and deleted files are left out."""
    for name in names:
        path = root / name
        if path.is_file() and not path.is_symlink() and b"\0" not in (content := path.read_bytes()):
            yield name, content.decode("utf-8")


def main(root: Path, names: list[str]) -> int:
    if not names:
        listing = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    version = version_of(root)
    found = [line for name, text in text_files(root, names) for line in violations(name, text, version)]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(ROOT, sys.argv[1:]))
