"""What gets installed and from where: wheel, sdist, checkout, and whose the name ``kernels`` is."""

import os
import re
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

FILES = [file for folder in ("betaclip", "kernels") for file in (ROOT / folder).rglob("*.py")]
SOURCES = {file.relative_to(ROOT).as_posix() for file in FILES}
NOT_BUILT = {**os.environ, "BETACLIP_BUILD_CUDA": "0"}
MODULES = {name if name.startswith("betaclip/") else f"betaclip/{name}" for name in SOURCES} | {"betaclip/py.typed"}
PRINT_KERNELS = """
import importlib.util
spec = importlib.util.find_spec("kernels")
print(spec and spec.origin, *(spec.submodule_search_locations if spec else ()), sep="\\n")
"""
PRINT_LIBRARY = "from betaclip.kernels import libbetaclip; print(libbetaclip.status())"
PRINT_FILES = "import betaclip.env, betaclip.kernels.backends as b; print(betaclip.env.__file__, b.__file__, sep='\\n')"


def run(*command, **options):
    """Standard output of a command that must succeed, by lines."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


def project_files():
    """The text files that are, or are about to be, under version control."""
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") is None or subprocess.run(listing, capture_output=True).returncode:
        pytest.skip("needs a git checkout")
    for name in run(*listing):
        path = ROOT / name
        if path.is_file() and b"\0" not in path.read_bytes():
            yield name, path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a copy, since building leaves files behind that a later build would take up."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("sdist")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("betaclip", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, copy, cwd=out, env=NOT_BUILT)
    (archive,) = out.iterdir()
    return archive, copy


@pytest.fixture(scope="module", params=["checkout", "sdist"])
def wheel(request, sdist, tmp_path_factory):
    archive, copy = sdist
    out = tmp_path_factory.mktemp("wheel")
    source = archive if request.param == "sdist" else copy
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, source, cwd=out, env=NOT_BUILT)
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
    assert {name for name in names if name.startswith("betaclip/")} == {*MODULES, "betaclip/lib/build.json"}
    assert wheel.name.endswith("-py3-none-any.whl")
    assert f"{information}/licenses/LICENSE" in names
    assert f"\nVersion: {betaclip.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_sdist_holds_the_modules_as_files(sdist):
    archive, copy = sdist
    with tarfile.open(archive) as contents:
        members = {member.name.split("/", 1)[-1]: member for member in contents.getmembers()}
    assert members.keys() >= {*MODULES, "pyproject.toml", "setup.py", "README.md", "LICENSE"}
    assert all(members[name].isfile() for name in MODULES)
    sources = {file.relative_to(copy).as_posix() for file in (copy / "csrc").rglob("*.*") if file.suffix != ".pyc"}
    assert sources and members.keys() >= sources


def test_wheel_imports_in_a_clean_venv(wheel, clean_venv, tmp_path):
    python, site_packages = clean_venv
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site_packages, wheel)
    for file in run(python, "-I", "-c", PRINT_FILES, cwd=tmp_path):
        assert Path(file).is_relative_to(site_packages)


@pytest.fixture
def with_library(sdist, stand_in_library, tmp_path):
    """A checkout, and an environment whose nvcc makes the stand-in library."""
    checkout = tmp_path / "checkout"
    shutil.copytree(sdist[1], checkout, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info", "lib"))
    nvcc = write_nvcc(tmp_path / "bin", library=stand_in_library._name)
    path = f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"
    cutlass = str(write_cutlass(tmp_path / "cutlass"))
    return checkout, {**os.environ, "PATH": path, "CUTLASS_PATH": cutlass, "BETACLIP_BUILD_CUDA": "1"}


def test_wheel_with_the_library(with_library, clean_venv, tmp_path):
    checkout, environment = with_library
    python, site_packages = clean_venv
    out = tmp_path / "out"
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, checkout, cwd=tmp_path, env=environment)
    (wheel,) = out.iterdir()
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"betaclip-{betaclip.__version__}-py3-none-{platform}.whl"
    with zipfile.ZipFile(wheel) as contents:
        names = {name for name in contents.namelist() if name.startswith("betaclip/")}
    assert names == {*MODULES, "betaclip/lib/build.json", "betaclip/lib/libbetaclip.so"}
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site_packages, wheel)
    library = site_packages / "betaclip" / "lib" / "libbetaclip.so"
    assert run(python, "-I", "-c", PRINT_LIBRARY, cwd=tmp_path) == [f"cpu, not yet run on hardware ({library})"]


def test_editable_install_finds_the_library(with_library, clean_venv, tmp_path):
    """And one without a library takes that of an earlier one away."""
    checkout, environment = with_library
    python, _ = clean_venv
    library = checkout / "betaclip" / "lib" / "libbetaclip.so"
    missing = "none (betaclip was installed without its CUDA library: left out by BETACLIP_BUILD_CUDA=0)"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--editable", checkout]
    for variable, status in (("1", f"cpu, not yet run on hardware ({library})"), ("0", missing)):
        run(*install, cwd=tmp_path, env=environment | {"BETACLIP_BUILD_CUDA": variable})
        assert run(python, "-I", "-c", PRINT_LIBRARY, cwd=tmp_path) == [status]
        assert library.exists() == (variable == "1")


def test_uninstalled_checkout_imports(clean_venv):
    python, _ = clean_venv
    assert run(python, "-E", "-c", PRINT_FILES, cwd=ROOT) == [
        str(ROOT / "betaclip" / "env.py"),
        str(ROOT / "betaclip" / "kernels" / "backends.py"),
    ]


def test_kernels_is_a_directory_and_not_a_package():
    assert (ROOT / "betaclip" / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_name_kernels_is_not_ours_elsewhere(tmp_path):
    assert not [line for line in run(sys.executable, "-c", PRINT_KERNELS, cwd=tmp_path) if str(ROOT) in line]


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


def test_version_is_written_once():
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", *(ROOT / name for name in SOURCES)]
    literals = [file.relative_to(ROOT) for file in files if f'"{betaclip.__version__}"' in file.read_text("utf-8")]
    assert literals == [Path("betaclip/__init__.py")]


def test_no_file_names_a_machine_or_a_package_index():
    machine_path = r"(?<![\w.~/$}-])/(?:home|root|Users|work|tmp|mnt|scratch)/"
    package_index = r"py[p]i\.org|pythonhosted\.or[g]|download\.pytorch\.or[g]|--(?:extra-)?index-ur[l]|--find-link[s]"
    pattern = re.compile(f"{machine_path}|{package_index}")
    found = [(name, match.group()) for name, text in project_files() for match in pattern.finditer(text)]
    assert found == []
