"""A stand-in for nvcc and for CUTLASS, so that a build takes a second and needs neither."""

from pathlib import Path

# As a compiler it reports a dependency and writes a line. As a linker it does the same, or copies a library.
_SCRIPT = r"""#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release {version}, V{version}.88"; exit; fi
{{ printf '%s|' "$@"; echo; }} >> "{log}"
while [ $# -gt 0 ]; do case "$1" in -o) out=$2 ;; -MF) dep=$2 ;; -c) source=$2 ;; esac; shift; done
if [ -n "$dep" ]; then echo "$out: $(echo "$source" | sed 's/ /\\ /g')" > "$dep"; fi
if [ -z "$source" ] && [ -n "{library}" ]; then cp "{library}" "$out"; else echo built > "$out"; fi
"""


def write_nvcc(folder: Path, version: str = "13.0", library: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(_SCRIPT.format(version=version, log=folder / "log", library=library))
    nvcc.chmod(0o755)
    return nvcc


def commands(nvcc: Path) -> list[str]:
    """The stand-in's command lines since the last call, with a bar behind each argument."""
    log = nvcc.parent / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def write_cutlass(folder: Path) -> Path:
    version = folder / "include" / "cutlass" / "version.h"
    version.parent.mkdir(parents=True)
    version.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 1\n")
    return folder
