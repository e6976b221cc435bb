"""The examples in docstrings run and give what they say; what users import from ``betaclip`` has one."""

import doctest
import importlib
import inspect

import pytest
import torch
from support.paths import ROOT

import betaclip

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in ("betaclip", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
# Public names whose docstring is still without one.
MISSING = {"BetaCALLoss", "ClipLoss", "TextConditionedPool", "beta_cal_bce_loss", "beta_cal_ce_loss"}
PUBLIC = [name for name in betaclip.__all__ if inspect.isclass(value := getattr(betaclip, name)) or callable(value)]


def examples(name: str, found: object) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder(recurse=True).find(found, name) if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str) -> None:
    name = f"betaclip.{module}" if module.startswith("kernels") else module
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    tests = examples(name, importlib.import_module(name))
    assert tests, "an example outside of any docstring"
    for test in tests:
        torch.manual_seed(0)
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_an_example(name: str) -> None:
    assert examples(name, getattr(betaclip, name)) or name in MISSING
