"""Build libbetaclip.so from the CUDA sources beside this file: find compiler and CUTLASS's headers, then call ninja.

pip runs it through setup.py; ``python csrc/build_library.py`` builds in place, into betaclip/lib. Beside the library
lies a record of how it was built, or of why it was not. Objects stay in build/cuda, where ninja finds them next time.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
BUILD = ROOT / "build" / "cuda"
LIBRARY, RECORD = "libbetaclip.so", "build.json"
PROGRAMS = ("emulation", "accumulator_map")  # tests' programs that run the kernels' sources on the CPU
DEVICE_CODE = "device_passes"  # and what nvcc translates for the device, for tests to run on the CPU
VARIABLE = "BETACLIP_BUILD_CUDA"
ARCHITECTURE = "90a"
# Only the headers of this wheel are needed; as an ordinary requirement it would bring in some 320 MB of other wheels.
CUTLASS = "nvidia-cutlass==4.2.0.0"
CUTLASS_SHA256 = "f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6"
CUTLASS_FOLDERS = ("include", "tools/util/include")
FLAGS = [
    f"-gencode=arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}",
    # Flushing denormals makes __expf and __logf single instructions.
    *("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-ftz=true"),
    # The library exports the functions of betaclip.h, and nothing of CUTLASS or the CUDA runtime.
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"),
    *("-cudart", "static", "-Xlinker", "--exclude-libs,ALL"),
]


def reason_not_to_build() -> str | None:
    """Return why no library will be built, or None if one will be.

    Raises:
        RuntimeError: BETACLIP_BUILD_CUDA demands a library that cannot be built, or is not one of auto, 0 and 1.
    """
    demand = os.environ.get(VARIABLE, "auto")
    if demand not in ("auto", "0", "1"):
        raise RuntimeError(f"{VARIABLE}: expected auto, 0 or 1, got {demand!r}")
    if demand == "0":
        return f"left out by {VARIABLE}=0"
    missing = _missing_compiler()
    if missing and demand == "1":
        raise RuntimeError(f"{VARIABLE}=1, but {missing}")
    return missing


def requirements() -> list[str]:
    """Return the packages that the build needs beside setuptools."""
    if reason_not_to_build():
        return []
    # Not the system's ninja: with another version than the next build's, each would compile everything anew.
    have_headers = bool(os.environ.get("CUTLASS_PATH")) or _fetched_headers().is_dir()
    return ["ninja", *([] if have_headers else ["pip"])]


def install(folder: Path) -> None:
    """Put the library and its record, or the record of its absence, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = reason_not_to_build()
    if missing:
        (folder / LIBRARY).unlink(missing_ok=True)  # from an earlier build
        print(f"betaclip: installing without the CUDA library: {missing}")
        record: dict[str, object] = {"missing": missing}
    else:
        with _alone():
            replacement = folder / f"{LIBRARY}.new"  # not in place: a process may have the old one mapped
            shutil.copy(_build(), replacement)
            replacement.replace(folder / LIBRARY)
        version = ".".join(map(str, _version(compiler())))
        record = {"architectures": [f"sm_{ARCHITECTURE}"], "nvcc": version, "cutlass": _cutlass_version()}
    (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")


def build(target: str = LIBRARY) -> Path:
    """Bring a target up to date with all that it is made of.

    Args:
        target: the library, what a program of PROGRAMS prints (``NAME.out``), or the PTX of DEVICE_CODE (``NAME.ptx``).

    Returns:
        Its path.
    """
    with _alone():
        return _build(target)


def _build(target: str = LIBRARY) -> Path:
    # Every object depends on this file, since ninja compares commands but not the compilers behind them.
    _write_if_changed(BUILD / "compiler", f"{compiler()} {_version(compiler())}\n")
    _write_if_changed(BUILD / "build.ninja", _ninja_file())
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    if subprocess.run(["ninja", "-C", str(BUILD), "-j", jobs, target]).returncode:
        raise RuntimeError(f"the CUDA library does not compile ({VARIABLE}=0 installs without it)")
    return BUILD / target


def _ninja_file() -> str:
    includes = [f"-isystem {_quoted(folder)}" for folder in cutlass_includes()]
    sources = sorted(CSRC.glob("*.cu"))
    objects = [f"{source.stem}.o" for source in sources]
    lines = [
        f"nvcc = {_quoted(compiler())}",
        f"flags = {' '.join([*FLAGS, *includes])}",
        "rule compile",
        "  command = $nvcc $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $nvcc $flags -shared $in -o $out",
        *(
            f"build {name}: compile {_escaped(source)} | compiler"
            for name, source in zip(objects, sources, strict=True)
        ),
        f"build {LIBRARY}: link {' '.join(objects)}",
        "rule program",
        "  command = $nvcc $flags $in -MD -MF $out.d -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        *(f"build {name}: program {_escaped(CSRC / 'tests' / name)}.cpp | compiler" for name in PROGRAMS),
        "rule print",
        "  command = ./$in > $out.new && mv $out.new $out",
        *(f"build {name}.out: print {name}" for name in PROGRAMS),
        "rule translate",
        "  command = $nvcc $flags $in -MD -MF $out.d -ptx -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        f"build {DEVICE_CODE}.ptx: translate {_escaped(CSRC / 'tests' / DEVICE_CODE)}.cu | compiler",
    ]
    return "\n".join(lines) + "\n"


def _quoted(path: Path) -> str:
    """Quote a path for a command in a ninja file."""
    return shlex.quote(str(path)).replace("$", "$$")


def _escaped(path: Path) -> str:
    """Escape a path for ninja's lists of inputs and outputs."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


@contextmanager
def _alone() -> Iterator[None]:
    """Hold the lock of the build folder: two builds at a time would write the same objects."""
    import fcntl  # builds run on Linux only, but installations everywhere load this module

    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compiler() -> Path:
    """Return nvcc's path: that of CUDA_HOME, else that of PATH.

    Raises:
        FileNotFoundError: neither has one.
    """
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    found = found or shutil.which("nvcc")
    if found is None:
        raise FileNotFoundError("no nvcc on PATH" + (f" nor in CUDA_HOME={home}" if home else ", and no CUDA_HOME"))
    return Path(found)


def _missing_compiler() -> str | None:
    if sys.platform != "linux":
        return f"the CUDA library is for Linux, this is {sys.platform}"
    try:
        nvcc = compiler()
    except FileNotFoundError as error:
        return str(error)
    version = _version(nvcc)
    return None if version >= (12,) else f"{nvcc} of CUDA {version[0]} cannot compile for sm_{ARCHITECTURE}: needs 12"


def _version(nvcc: Path) -> tuple[int, ...]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bV(\d+(?:\.\d+)*)", text)
    if found is None:
        raise RuntimeError(f"{nvcc} --version: no version in {text!r}")
    return tuple(int(part) for part in found[1].split("."))


def cutlass_includes() -> list[Path]:
    """Return the header folders of CUTLASS: those below CUTLASS_PATH, else those of the pinned wheel.

    Raises:
        RuntimeError: CUTLASS_PATH holds no CUTLASS, or the wheel could not be fetched.
    """
    given = os.environ.get("CUTLASS_PATH")
    top = Path(given).resolve() if given else _fetched_headers()
    if not given and not top.is_dir():
        _fetch_headers(top)
    if not (top / "include" / "cutlass" / "version.h").is_file():
        raise RuntimeError(f"CUTLASS_PATH={given}: no include/cutlass/version.h below it")
    return [top / folder for folder in CUTLASS_FOLDERS]


def _cutlass_version() -> str:
    text = (cutlass_includes()[0] / "cutlass" / "version.h").read_text(encoding="utf-8")
    return ".".join(re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH) (\d+)", text))


def _fetched_headers() -> Path:
    return BUILD / CUTLASS.replace("==", "-")


def _fetch_headers(top: Path) -> None:
    """Unpack the headers of the pinned wheel into ``top``; refuse a wheel with another hash."""
    with TemporaryDirectory(dir=BUILD) as scratch:
        pinned = Path(scratch, "requirements.txt")
        pinned.write_text(f"{CUTLASS} --hash=sha256:{CUTLASS_SHA256}\n", encoding="utf-8")
        options = f"--no-deps --only-binary=:all: --require-hashes --requirement {pinned.name} --dest .".split()
        fetched = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options], cwd=scratch, capture_output=True, text=True
        )
        if fetched.returncode:
            raise RuntimeError(
                f"{CUTLASS} could not be fetched; set CUTLASS_PATH to a copy of CUTLASS, or {VARIABLE}=0 to install"
                f" without the CUDA library:\n{fetched.stderr}"
            )
        (wheel,) = Path(scratch).glob("*.whl")
        prefixes = tuple(f"cutlass_library/source/{folder}/" for folder in CUTLASS_FOLDERS)
        with zipfile.ZipFile(wheel) as contents:
            contents.extractall(scratch, [name for name in contents.namelist() if name.startswith(prefixes)])
        Path(scratch, "cutlass_library", "source").rename(top)


if __name__ == "__main__":
    install(ROOT / "betaclip" / "lib")
