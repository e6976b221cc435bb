"""The examples in docstrings run and print what they show; every name that users import from ``betaclip`` has one."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from support.paths import ROOT

import betaclip
from betaclip.kernels import attention_pool, similarity

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in ("betaclip", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
PUBLIC = [
    *(f"betaclip.{name}" for name in betaclip.__all__ if callable(getattr(betaclip, name))),
    *(f"betaclip.kernels.similarity.{name}" for name in similarity.__all__),
    *(f"betaclip.kernels.attention_pool.{name}" for name in attention_pool.__all__),
]


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
    assert examples(name, pkgutil.resolve_name(name))
