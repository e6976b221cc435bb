"""The contents of wheel, sdist and checkout, and the owner of the name ``kernels``."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from support.nvcc import write_cutlass, write_nvcc
from support.paths import ROOT

import betaclip

pytestmark = pytest.mark.slow
SOURCES = {
    file.relative_to(ROOT).as_posix() for name in ("betaclip", "kernels") for file in (ROOT / name).rglob("*.py")
}
CONFIGS = {f"betaclip/configs/{file.name}" for file in (ROOT / "configs").glob("*.toml")}
MODULES = {name if name.startswith("betaclip/") else f"betaclip/{name}" for name in SOURCES}
PAGE = {f"betaclip/page/{name}" for name in ("template.html", "style.css", "script.js")}
PACKAGE = {*MODULES, *CONFIGS, *PAGE, "betaclip/py.typed", "betaclip/lib/build.json"}
NOT_BUILT = {**os.environ, "BETACLIP_BUILD_CUDA": "0"}
PRINT_KERNELS = """
import importlib.util
spec = importlib.util.find_spec("kernels")
print(spec and spec.origin, *(spec.submodule_search_locations if spec else ()), sep="\\n")
"""
PRINT_LIBRARY = "from betaclip.kernels import libbetaclip; print(libbetaclip.status())\n"
UNIX_ONLY = {"fcntl", "grp", "pwd", "resource", "termios"}
PRINT_FILES = (
    "import betaclip.env, betaclip.kernels.backends as b; print(betaclip.env.__file__, b.__file__, sep='\\n')\n"
)


def run(*command, **options):
    """Standard output of a command that must succeed, by lines."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What is built, copied, since building leaves files behind; betaclip/kernels is a text file as it is in a clone
    without symbolic links."""
    copy = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("betaclip", "kernels", "csrc", "configs", "examples", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "lib")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    (copy / "betaclip" / "kernels").unlink()
    (copy / "betaclip" / "kernels").write_text("../kernels")
    return copy


@pytest.fixture(scope="module")
def sdist(clone, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, clone, cwd=out, env=NOT_BUILT)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"), NOT_BUILT)


def build_wheel(source, out, environment):
    """Without an environment of its own for setuptools; the installation that is tested had one."""
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", out)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=out, env=environment)
    (file,) = out.iterdir()
    return file


@pytest.fixture
def clean_venv(tmp_path):
    """Python and site-packages of a venv without betaclip that borrows torch instead of downloading it again.

    The path in the .pth file makes packages importable; it does not activate editable installs found there.
    """
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (site_packages,) = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(site_packages, "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]))
    return python, Path(site_packages)


def test_wheel_holds_the_package_and_nothing_else(wheel):
    information = f"betaclip-{betaclip.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as contents:
        names, metadata = set(contents.namelist()), contents.read(f"{information}/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {"betaclip", information}
    assert {name for name in names if name.startswith("betaclip/")} == PACKAGE
    assert wheel.name.endswith("-py3-none-any.whl")
    assert f"{information}/licenses/LICENSE" in names
    assert f"\nVersion: {betaclip.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_sdist_holds_what_runs(sdist, clone):
    """Modules, CUDA sources, configurations, benchmarks and examples, and no test, which would need the repository."""
    with tarfile.open(sdist) as contents:
        members = {member.name.split("/", 1)[-1] for member in contents.getmembers() if member.isfile()}
    folders = ("csrc", "configs", "examples", "benchmarks")
    files = [file for folder in folders for file in (clone / folder).rglob("*.*")]
    files = [file for file in files if file.is_file() and file.suffix != ".pyc"]
    assert members >= {*SOURCES, *(file.relative_to(clone).as_posix() for file in files)}
    assert members >= {"pyproject.toml", "setup.py", "README.md", "LICENSE", "benchmarks/captions.json"}
    assert not [name for name in members if name.startswith("tests/") or name.endswith(".pyc")]


@pytest.fixture
def with_library(stand_in_library, tmp_path):
    """An environment whose nvcc makes the stand-in library."""
    nvcc = write_nvcc(tmp_path / "bin", library=stand_in_library._name)
    path = f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"
    cutlass = str(write_cutlass(tmp_path / "cutlass"))
    return {**os.environ, "PATH": path, "CUTLASS_PATH": cutlass, "BETACLIP_BUILD_CUDA": "1"}


def test_wheel_with_the_library(sdist, with_library, clean_venv, tmp_path):
    python, site_packages = clean_venv
    (tmp_path / "out").mkdir()
    wheel = build_wheel(sdist, tmp_path / "out", with_library)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"betaclip-{betaclip.__version__}-py3-none-{platform}.whl"
    with zipfile.ZipFile(wheel) as contents:
        names = {name for name in contents.namelist() if name.startswith("betaclip/")}
    assert names == {*PACKAGE, "betaclip/lib/libbetaclip.so"}
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site_packages, wheel)
    status, *files = run(python, "-I", "-c", PRINT_LIBRARY + PRINT_FILES, cwd=tmp_path)
    assert status == f"cpu ({site_packages / 'betaclip' / 'lib' / 'libbetaclip.so'})"
    assert all(Path(file).is_relative_to(site_packages) for file in files)


def test_editable_install(clone, with_library, clean_venv, tmp_path):
    """It finds kernels without the symbolic link, and its library."""
    python, _ = clean_venv
    checkout = tmp_path / "checkout"
    shutil.copytree(clone, checkout, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "--no-build-isolation", "--editable", checkout, cwd=tmp_path, env=with_library)
    assert run(python, "-I", "-c", PRINT_LIBRARY + PRINT_FILES + PRINT_KERNELS, cwd=tmp_path) == [
        f"cpu ({checkout / 'betaclip' / 'lib' / 'libbetaclip.so'})",
        str(checkout / "betaclip" / "env.py"),
        str(checkout / "kernels" / "backends.py"),
        "None",
    ]


def test_uninstalled_checkouts_import(clone, clean_venv):
    """One with the symbolic link and one without, each in a process of its own, which has torch's import done."""
    python, _ = clean_venv
    program = f"""
import os, torch
for root in {str(ROOT)!r}, {str(clone)!r}:
    if os.fork():
        assert os.wait()[1] == 0
    else:
        os.chdir(root)  # the first place where Python looks for modules
        exec({PRINT_FILES!r})
        break
"""
    assert run(python, "-E", "-c", program) == [
        str(root / file)
        for root, kernels in ((ROOT, "betaclip/kernels"), (clone, "kernels"))
        for file in ("betaclip/env.py", f"{kernels}/backends.py")
    ]


def imported_at_once(file):
    """The names of all modules that a file imports outside of functions."""
    nodes = [ast.parse(file.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)


def test_imports_need_no_module_that_only_unix_has():
    files = [*(ROOT / name for name in SOURCES), *(ROOT / "csrc").glob("*.py")]
    imports = {file: set(imported_at_once(file)) for file in files}
    assert "torch" in imports[ROOT / "betaclip" / "pooling.py"]
    assert not {file: found & UNIX_ONLY for file, found in imports.items() if found & UNIX_ONLY}


def test_kernels_is_a_directory_and_not_a_package():
    assert (ROOT / "betaclip" / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_name_kernels_is_not_ours_elsewhere(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    lines = run(sys.executable, "-c", PRINT_KERNELS, cwd=tmp_path, env=environment)
    assert not [line for line in lines if str(ROOT) in line]


def test_name_kernels_is_no_module_of_ours_in_the_root():
    """Python sees a directory of that name (a namespace without code), or a package installed under it."""
    origin, *_ = run(sys.executable, "-c", PRINT_KERNELS, cwd=ROOT)
    assert origin == "None" or not Path(origin).is_relative_to(ROOT)


@pytest.mark.parametrize("in_root", [True, False])
def test_an_installed_package_kernels_is_found(in_root, tmp_path):
    """It comes after the working directory on sys.path, as site-packages does."""
    theirs = tmp_path / "theirs" / "kernels" / "__init__.py"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "theirs")}
    origin, *_ = run(sys.executable, "-c", PRINT_KERNELS, cwd=ROOT if in_root else tmp_path, env=environment)
    assert origin == str(theirs)
