"""setuptools' build backend, which also asks for the requirements of the CUDA library if that will be built."""

from typing import Any

import build_library
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  # all other hooks


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *build_library.requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *build_library.requirements()]
