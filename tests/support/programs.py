"""Programs that lie outside the package, as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load_program(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
