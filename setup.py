"""The packages of the distribution and its CUDA library; its metadata is in pyproject.toml."""

from pathlib import Path
from typing import Any, ClassVar

import build_library  # in csrc, on the path of the build backend
from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

FOLDER = Path("betaclip", "lib")


class BuildLibrary(Command):
    """Puts the library, and the record of how it was made or why it was not, into betaclip/lib."""

    editable_mode = False
    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        self.build_lib = ""

    def finalize_options(self) -> None:
        self.build_lib = self.get_finalized_command("build").build_lib

    def run(self) -> None:
        build_library.install(FOLDER if self.editable_mode else self.build_lib / FOLDER)

    def get_outputs(self) -> list[str]:
        names = [build_library.RECORD, *([] if build_library.reason_not_to_build() else [build_library.LIBRARY])]
        return [str(self.build_lib / FOLDER / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {name: str(FOLDER / Path(name).name) for name in self.get_outputs()} if self.editable_mode else {}

    def get_source_files(self) -> list[str]:
        return [str(file) for file in Path("csrc").rglob("*.*") if file.is_file() and file.suffix != ".pyc"]


class Build(build):
    sub_commands: ClassVar[list[Any]] = [*build.sub_commands, ("build_library", None)]


class PlatformDistribution(Distribution):
    """Of a platform if it holds the library, which knows neither Python's nor torch's binary interface."""

    def has_ext_modules(self) -> bool:
        return build_library.reason_not_to_build() is None


class BdistWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# Listed by hand: betaclip/kernels is a symlink, and the directory it points to must not become a package of its own.
setup(
    packages=[
        "betaclip",
        "betaclip.data",
        "betaclip.data.phrases",
        "betaclip.data.readers",
        "betaclip.data.scenes",
        "betaclip.evaluation",
        "betaclip.evaluation.tasks",
        "betaclip.kernels",
        "betaclip.kernels.attention_pool",
        "betaclip.kernels.similarity",
        "betaclip.losses",
        "betaclip.model",
        "betaclip.training",
    ],
    distclass=PlatformDistribution,
    cmdclass={"build": Build, "build_library": BuildLibrary, "bdist_wheel": BdistWheel},
)
