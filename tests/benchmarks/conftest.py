"""Puts benchmarks/ on the path, as Python does for its scripts."""

import sys

from support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
