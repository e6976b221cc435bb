"""Puts benchmarks/ on the path, as Python does for its scripts; collecting garbage passes over what is imported."""

import gc
import sys

import pytest
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    gc.freeze()
