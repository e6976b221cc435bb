"""Facts that are repeated in files for code hosts agree with their source."""

import re

from support.markdown import read

import betaclip


def test_citation_has_the_version() -> None:
    assert re.findall(r"^version: (\S+)$", read("CITATION.cff"), re.MULTILINE) == [betaclip.__version__]


def test_changelog_has_the_version() -> None:
    versions = re.findall(r"^## (.+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == "Unreleased" and betaclip.__version__ in versions


def test_workflow_runs_every_lane() -> None:
    (lanes,) = re.findall(r"lane: \[(.+)\]", read(".github/workflows/ci.yml"))
    (known,) = re.findall(r"these lanes: (.+)$", read(".ci/run"), re.MULTILINE)
    assert lanes.split(", ") == [lane for lane in known.split() if lane != "minimum"]


def test_hooks_are_of_the_lint_lane() -> None:
    (lint,) = re.findall(r"^style\(\) \{\n(.*?)^listed", read(".ci/run"), re.MULTILINE | re.DOTALL)
    hooks = re.findall(r"entry: (.+)$", read(".pre-commit-config.yaml"), re.MULTILINE)
    assert len(hooks) >= 4
    for hook in hooks:
        assert hook.removesuffix(" --force-exclude") in lint


def test_bug_form_asks_for_the_report() -> None:
    assert "`betaclip env`" in read(".github/ISSUE_TEMPLATE/bug.yml")
