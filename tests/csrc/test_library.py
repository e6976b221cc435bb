"""The CUDA library without a GPU: its interface, the arguments that it refuses, and its machine code."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.paths import ROOT
from support.programs import load_program

from betaclip.kernels import libbetaclip as cuda

CSRC = ROOT / "csrc"
NO_DRIVER = 35  # cudaErrorInsufficientDriver
BUFFER = ctypes.create_string_buffer(4096)
ADDRESS = -(-ctypes.addressof(BUFFER) // 1024) * 1024  # for pointers that are checked but not dereferenced
LAUNCHERS = {
    "betaclip_logsumexp_forward": "operands lse_x lse_y workspace workspace_bytes",
    "betaclip_logsumexp_ds": "operands gradient chunk",
    "betaclip_softplus_forward": "operands bias softplus workspace workspace_bytes",
    "betaclip_softplus_ds": "operands bias weight chunk softplus sigmoid workspace workspace_bytes",
}
HEAVY = 10  # kernels on the matrix unit: both passes of the log-sum-exp, its dS, softplus, its dS, in two dtypes
VECTORS = [name for name, _ in cuda.LogsumexpGradient._fields_]


def compiler(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


def run(*command, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def build_library():
    """csrc/build_library.py, if it finds a compiler."""
    module = load_program(CSRC / "build_library.py")
    if reason := module.reason_not_to_build():
        pytest.skip(reason)
    return module


@pytest.fixture(scope="module")
def path(build_library):
    """The library, built unless an installation has brought it up to date."""
    return build_library.build()


@pytest.fixture(scope="module")
def library(path):
    return cuda.load(path)


@pytest.mark.parametrize("command", ["cc -std=c99 -x c", "cc -std=c11 -x c", "c++ -std=c++11 -x c++"])
def test_header_is_c_and_cpp(command, tmp_path):
    program, *options = command.split()
    file = tmp_path / "includes"
    file.write_text('#include "betaclip.h"\n#include "betaclip.h"\nint main(void) { return betaclip_version(); }\n')
    warnings = ["-pedantic", "-Wall", "-Wextra", "-Werror", *(["-Wstrict-prototypes"] if program == "cc" else [])]
    run(compiler(program), *options, *warnings, "-fsyntax-only", f"-I{CSRC}", file)


def test_exports_the_interface_and_needs_no_driver(path):
    symbols = run(compiler("nm"), "--dynamic", "--defined-only", path).split()[2::3]
    assert set(symbols) == cuda._SIGNATURES.keys()
    wanted = [line.split()[-1] for line in run("nm", "--dynamic", "--undefined-only", path).splitlines()]
    assert not [name for name in wanted if name.startswith("cu") or "torch" in name or name.startswith("Py")]
    needed = re.findall(r"NEEDED.*\[(\w+)", run(compiler("readelf"), "--dynamic", path))
    assert set(needed) <= {"libstdc", "libm", "libgcc_s", "libc", "libdl", "libpthread", "librt", "ld"}


def test_says_what_it_is(library):
    assert library.betaclip_version() == cuda.VERSION
    assert library.betaclip_architectures() == b"sm_90a"


def test_every_error_has_a_text(library):
    names = re.findall(r"(BETACLIP_ERROR_\w+) = (-\d+)", (CSRC / "betaclip.h").read_text())
    texts = {library.betaclip_error_string(code).decode() for code in (0, NO_DRIVER, *(int(c) for _, c in names), -999)}
    assert len(names) == 10 and len(texts) == len(names) + 3 and all(texts)


def call(library, function, **changes) -> int:
    """Call a launcher with valid arguments but for ``changes``, which are arguments or fields of structures."""

    def structure(kind, **values):
        return kind(**values | {name: changes[name] for name, _ in kind._fields_ if name in changes})

    pointers = dict.fromkeys(("x", "y", "x_group", "y_group", "x_text", "y_text", "scale"), ADDRESS)
    sizes = {"x_stride": 64, "y_stride": 72, "n": 300, "m": 200, "d": 64, "dtype": 1}
    bounds = {"row_begin": 10, "row_end": 300, "col_begin": 0, "col_end": 100}
    arguments = {
        **dict.fromkeys(("lse_x", "lse_y", "bias", "weight", "softplus", "sigmoid", "workspace"), ADDRESS),
        "operands": structure(cuda.Operands, **pointers, **sizes),
        "chunk": structure(cuda.Chunk, ds=ADDRESS, ds_stride=104, **bounds),
        "gradient": structure(cuda.LogsumexpGradient, **dict.fromkeys(VECTORS, ADDRESS)),
        "workspace_bytes": 2**40,
        **changes,
    }
    return getattr(library, function)(*(arguments[name] for name in LAUNCHERS[function].split()), None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("function", LAUNCHERS)
def test_refuses_without_a_device(function, library, capfd):
    """Valid arguments, and NULL where that is allowed, give CUDA's own error, and nothing is printed."""
    without = [{f"{side}_{ids}": None for side in "xy"} for ids in ("group", "text")]
    for changes in ({}, *without, {"dtype": 0}):
        assert call(library, function, **changes) == NO_DRIVER
    if "softplus" in function:
        optional = {"bias": None, "sigmoid": None} if function == "betaclip_softplus_ds" else {"bias": None}
        assert call(library, function, **optional) == NO_DRIVER
    assert "driver" in library.betaclip_error_string(NO_DRIVER).decode()
    assert capfd.readouterr() == ("", "")


OPERAND_ERRORS = [
    *(({name: None}, -1) for name in ("operands", "x", "y", "scale")),
    *(({"dtype": value}, -2) for value in (-1, 2)),
    *(({name: value}, -3) for name in ("n", "m") for value in (0, -5, 2**31)),
    *(({"d": value, "x_stride": 2048, "y_stride": 2048}, -4) for value in (0, -8, 12, 1032)),
    *(({name: value}, -5) for name in ("x_stride", "y_stride") for value in (0, 56, 68, 2**39)),
    *(({name: ADDRESS + 8}, -6) for name in ("x", "y")),
    *(({name: ADDRESS + 2}, -6) for name in ("scale", "x_group", "y_group", "x_text", "y_text")),
    *(({name: None}, -7) for name in ("x_group", "y_group", "x_text", "y_text")),
]
CHUNK_ERRORS = [
    *(({name: None}, -1) for name in ("chunk", "ds")),
    *(({"ds_stride": value}, -5) for value in (96, 100, 2**39)),
    ({"ds": ADDRESS + 8}, -6),
    *((change, -8) for change in ({"row_begin": -1}, {"row_begin": 300}, {"row_end": 301}, {"row_end": 10})),
    *((change, -8) for change in ({"col_begin": -8}, {"col_begin": 100}, {"col_end": 208}, {"col_end": 0})),
]
OTHER_ERRORS = {
    "betaclip_logsumexp_forward": [
        *(({name: None}, -1) for name in ("lse_x", "lse_y", "workspace")),
        *(({name: ADDRESS + 2}, -6) for name in ("lse_x", "lse_y")),
        ({"workspace": ADDRESS + 8}, -6),
    ],
    "betaclip_logsumexp_ds": [
        *CHUNK_ERRORS,
        *(({name: None}, -1) for name in ("gradient", *VECTORS)),
        *(({name: ADDRESS + 2}, -6) for name in VECTORS),
    ],
    "betaclip_softplus_forward": [
        *(({name: None}, -1) for name in ("softplus", "workspace")),
        *(({name: ADDRESS + 2}, -6) for name in ("softplus", "bias")),
        ({"workspace": ADDRESS + 8}, -6),
    ],
    "betaclip_softplus_ds": [
        *CHUNK_ERRORS,
        *(({name: None}, -1) for name in ("weight", "softplus", "workspace")),
        *(({name: ADDRESS + 2}, -6) for name in ("weight", "softplus", "sigmoid", "bias")),
        ({"workspace": ADDRESS + 8}, -6),
    ],
}


@pytest.mark.parametrize("function", LAUNCHERS)
def test_rejects_arguments(function, library):
    """Bad arguments are refused before the device is looked at."""
    for changes, code in (*OPERAND_ERRORS, *OTHER_ERRORS[function]):
        assert call(library, function, **changes) == code, changes


@pytest.mark.gpu
@pytest.mark.parametrize("function", [name for name in LAUNCHERS if name != "betaclip_logsumexp_ds"])
def test_rejects_a_small_workspace(function, library):
    assert call(library, function, workspace_bytes=8) == -9


def test_workspace_sizes(library):
    """Sizes are linear in rows and columns, and 0 for sizes out of range."""
    for function in ("betaclip_logsumexp_workspace_bytes", "betaclip_softplus_workspace_bytes"):
        size = getattr(library, function)
        for multiprocessors in (1, 114, 132):
            for n, m in ((1, 1), (129, 5000), (4096, 4096), (73728, 73728), (589824, 589824)):
                # At most 132 partial sums a row, in float32, and some room for flags.
                assert 0 <= size(n, m, multiprocessors) <= 8 * 132 * (n + m) + 2**16
        assert size(0, 5, 132) == size(5, -1, 132) == size(2**31, 5, 132) == size(5, 5, 0) == 0
    # The design's bound of scratch memory at the largest size.
    assert library.betaclip_logsumexp_workspace_bytes(589824, 589824, 132) <= 512 * 2**20


@pytest.fixture(scope="module")
def cuobjdump(path):
    """The disassembler's output for the library, by option."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return lambda option: run(tool, option, path)


def test_machine_code_uses_the_matrix_unit_and_tma(cuobjdump):
    """All operations use wgmma (HGMMA) in both dtypes, on operands that the tensor memory accelerator loads."""
    _, *functions = cuobjdump("-sass").split("Function : ")
    heavy = [text for text in functions if "similarity_kernel" in text.partition("\n")[0]]
    assert len(heavy) == HEAVY
    for text in heavy:
        count = {code: len(re.findall(rf"\b{code}\b", text)) for code in ("HGMMA", "UTMALDG", "STL", "LDL")}
        assert count["HGMMA"] >= 8 and count["UTMALDG"] == 2 and count["STL"] == count["LDL"] == 0, count
    # Both gradients in both dtypes store dS 16 bytes at a time; the log-sum-exp's on either side of a branch.
    assert sorted(text.count("STG.E.128") for text in heavy) == [0] * (HEAVY - 4) + [16, 16, 32, 32]
    atomic = re.compile(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?(?:ATOM|ATOMG|ATOMS|RED)\b", re.MULTILINE)
    # Atomic operations would have another order, and other sums, in every run.
    assert not [text.partition("\n")[0] for text in functions if atomic.search(text)]


def test_machine_code_keeps_everything_in_registers(cuobjdump):
    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump("-res-usage"))
    assert len([name for name, *_ in usage if "similarity_kernel" in name]) == HEAVY
    for name, registers, *memory in usage:
        assert memory == ["0", "0"] and int(registers) <= 168, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, last", [("emulation", "all passed"), ("accumulator_map", "coordinates of y: 0 wrong")]
)
def test_program(program, last, build_library):
    """The kernels' own host and device code, and CuTe's maps, on the CPU; as it ran when something last changed."""
    assert last in build_library.build(f"{program}.out").read_text().splitlines()[-1]


def test_pipeline_model(tmp_path):
    """Every interleaving at the barriers of the ring, for few stages and tiles, and every fault planted in it."""
    executable = tmp_path / "model"
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
    run(compiler("c++"), *options, CSRC / "tests" / "pipeline_model.cpp", "-o", executable)
    lines = run(executable).splitlines()
    proven, planted = ([line for line in lines if ("no fault in" in line) == right] for right in (True, False))
    assert len(proven) >= 10 and len(planted) >= 19
    for kind in ("deadlock", "something else", "a load overwrites", "has exited"):  # each check finds some fault
        assert any(kind in line for line in planted), kind


def test_the_kernel_passes_barriers_in_the_order_that_the_model_searches():
    """All of its waits and arrivals at the ring's barriers are those of ring.h, which the model runs."""
    passes = re.compile(r"producer_(?:acquire|tail)|consumer_(?:wait|release)|turns_?\.(?:wait|arrive)")
    sources = [file for file in CSRC.iterdir() if file.suffix in (".h", ".cuh", ".cu")]
    calls = {file.name: passes.findall(file.read_text()) for file in sources}
    assert {name for name, found in calls.items() if found} == {"ring.h"}
    assert len(calls["ring.h"]) == 7


def test_example_of_the_readme(path, build_library, tmp_path):
    """It compiles by its first line's command, links, and returns the library's error for no device or no data."""
    (example,) = re.findall(r"```cpp\n(.*?)```", (CSRC / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    call = "two_sided_logsumexp(nullptr, nullptr, nullptr, 300, 200, 64, nullptr, nullptr, nullptr)"
    (tmp_path / "example.cpp").write_text(f'{example}\nint main() {{ std::printf("%d", {call}); }}\n')
    nvcc, *command = example.splitlines()[0].removeprefix("// ").split()
    folders = {"csrc": CSRC, "betaclip/lib": path.parent}
    assert nvcc == "nvcc" and folders.keys() < set(command)
    run(build_library.compiler(), *(folders.get(word, word) for word in command), cwd=tmp_path)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(path.parent)}
    assert run(tmp_path / "a.out", env=environment) == ("-1" if torch.cuda.is_available() else str(NO_DRIVER))
