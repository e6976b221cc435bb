"""Each check of text files finds the text that it looks for."""

import pytest
from support.paths import ROOT
from support.programs import load_program

check_sources = load_program(ROOT / "tools" / "check_sources.py")
FOLDER = "tmp"  # apart, so that no path of one machine stands here


@pytest.fixture
def project(tmp_path):
    (tmp_path / "betaclip").mkdir()
    (tmp_path / "betaclip" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    return tmp_path


@pytest.mark.parametrize(
    "name, line, rule",
    [
        ("docs/setup.md", f"cd /{FOLDER}/run", "a path of one machine"),
        ("configs/run.toml", 'root = "/' + 'home/someone"', "a path of one machine"),
        ("README.md", "pip install -" + "-find" + "-links wheels", "a package index"),
        ("setup.py", "setup(version='1.2.3')", "a second copy of the version"),
        ("betaclip/env.py", 'VERSION = "1.2.3"', "a second copy of the version"),
    ],
)
def test_finds(project, name, line, rule, capsys):
    (project / name).parent.mkdir(exist_ok=True)
    (project / name).write_text(f"first line\n{line}\n")
    assert check_sources.main(project, [name]) == 1
    (found,) = capsys.readouterr().out.splitlines()
    assert found.startswith(f"{name}:2: ") and rule in found


@pytest.mark.parametrize("line", ["betaclip/{}/", "$HOME/{}/x", "https://example.org/{}/", "../{}/", "1.2.3"])
def test_passes(project, line, capsys):
    (project / "README.md").write_text(line.format(FOLDER))
    assert check_sources.main(project, ["README.md", "betaclip/__init__.py", "deleted.md"]) == 0
    assert capsys.readouterr().out == ""
