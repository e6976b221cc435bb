"""The packages of the distribution and its CUDA library; its metadata is in pyproject.toml."""

from pathlib import Path
from typing import Any, ClassVar

import build_library  # in csrc, on the path of the build backend
from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

LIBRARY_FOLDER = Path("betaclip", "lib")


class BuildLibrary(Command):
    """Puts the library, and the record of how it was built or why it was not, into betaclip/lib."""

    editable_mode = False
    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        self.build_lib = ""

    def finalize_options(self) -> None:
        self.build_lib = self.get_finalized_command("build").build_lib

    def run(self) -> None:
        build_library.install(LIBRARY_FOLDER if self.editable_mode else self.build_lib / LIBRARY_FOLDER)

    def get_outputs(self) -> list[str]:
        names = [build_library.RECORD, *([] if build_library.reason_not_to_build() else [build_library.LIBRARY])]
        return [str(self.build_lib / LIBRARY_FOLDER / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return (
            {name: str(LIBRARY_FOLDER / Path(name).name) for name in self.get_outputs()} if self.editable_mode else {}
        )

    def get_source_files(self) -> list[str]:
        return [str(file) for file in Path("csrc").rglob("*.*") if file.is_file() and file.suffix != ".pyc"]


class Build(build):
    sub_commands: ClassVar[list[Any]] = [*build.sub_commands, ("build_library", None)]


class PlatformDistribution(Distribution):
    """A distribution that is platform-specific only if it holds the library, which needs neither Python nor torch."""

    def has_ext_modules(self) -> bool:
        return build_library.reason_not_to_build() is None


class BdistWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# betaclip/kernels is a symbolic link, for checkouts that are not installed. A build must not need it, since a clone may
# have a text file in its place. Nor may kernels/ become a package of its own, since transformers looks for that name.
setup(
    packages=[
        *find_packages(include=["betaclip", "betaclip.*"], exclude=["betaclip.kernels*"]),
        "betaclip.kernels",
        *(f"betaclip.kernels.{name}" for name in find_packages("kernels")),
        "betaclip.configs",
    ],
    package_dir={"betaclip.kernels": "kernels", "betaclip.configs": "configs"},
    package_data={"betaclip.configs": ["*.toml"], "betaclip.page": ["*.html", "*.css", "*.js"]},
    distclass=PlatformDistribution,
    cmdclass={"build": Build, "build_library": BuildLibrary, "bdist_wheel": BdistWheel},
)
