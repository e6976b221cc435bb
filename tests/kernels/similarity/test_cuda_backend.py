"""The binding of libbetaclip: finding the library, refusals and arguments. test_operators.py tests the results."""

import ctypes
import json
import math
import re
import shutil
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.paths import ROOT
from support.precision import HALF
from support.similarity import CHECKS, dense_logsumexp, operands, value_and_gradients

from betaclip.kernels import libbetaclip as binding
from betaclip.kernels.backends import resolve
from betaclip.kernels.similarity.contract import Operand
from betaclip.kernels.similarity.cuda_backend import Cuda
from betaclip.kernels.similarity.functional import similarity_logsumexp, similarity_softplus
from betaclip.kernels.similarity.operators import BACKENDS

HEADER = ROOT / "csrc" / "betaclip.h"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STRUCTURES = {
    "betaclip_operands": binding.Operands,
    "betaclip_chunk": binding.Chunk,
    "betaclip_logsumexp_gradient": binding.LogsumexpGradient,
}


@pytest.fixture
def installed(tmp_path, stand_in_library):
    """A folder as the build leaves it."""
    shutil.copy(stand_in_library._name, tmp_path / "libbetaclip.so")
    (tmp_path / "build.json").write_text(json.dumps({"architectures": ["cpu"]}))
    return tmp_path


def test_finds_the_library(installed):
    library, missing = binding.find(installed)
    assert library.betaclip_architectures() == b"cpu" and missing == ""


def test_says_why_there_is_no_library(installed, monkeypatch):
    (installed / "libbetaclip.so").write_text("not a library")
    assert re.fullmatch(r"the CUDA library does not load: .*libbetaclip\.so.*", binding.find(installed)[1])
    (installed / "libbetaclip.so").unlink()
    assert "No such file" in binding.find(installed)[1]
    (installed / "build.json").write_text(json.dumps({"missing": "no nvcc on PATH, and no CUDA_HOME"}))
    missing = "betaclip was installed without its CUDA library: no nvcc on PATH, and no CUDA_HOME"
    assert binding.find(installed) == (None, missing)
    (installed / "build.json").unlink()
    never = "the CUDA library was not built; pip install builds it where it finds nvcc"
    assert binding.find(installed) == (None, never)
    monkeypatch.setattr(binding, "_library", None)
    monkeypatch.setattr(binding, "_missing", missing)
    assert binding.status() == f"none ({missing})"
    assert missing in binding.not_supported_reasons(torch.device("cpu"))


def test_refuses_a_library_of_another_interface(installed, monkeypatch):
    monkeypatch.setattr(binding, "VERSION", 3)
    assert "expected version 3 of the interface, got 2" in binding.find(installed)[1]
    monkeypatch.setitem(binding._SIGNATURES, "betaclip_of_tomorrow", (ctypes.c_int, ()))
    assert "undefined symbol: betaclip_of_tomorrow" in binding.find(installed)[1]


def test_signatures_are_the_header_s():
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    prototypes = re.findall(r"BETACLIP_API ([^;(]+?)(betaclip_\w+)\(([^;]*)\);", text)
    assert {name for _, name, _ in prototypes} == binding._SIGNATURES.keys()
    pointers = {f"const {name} *": ctypes.POINTER(structure) for name, structure in STRUCTURES.items()}
    types = {"int": ctypes.c_int, "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "size_t": ctypes.c_size_t}
    types |= {f"{const}{kind} *": ctypes.c_void_p for kind in ("float", "void") for const in ("", "const ")}
    types |= {"const char *": ctypes.c_char_p, **pointers}
    for result, name, parameters in prototypes:
        parameters = [] if parameters == "void" else [" ".join(p.split()) for p in parameters.split(",")]
        arguments = tuple(types[re.sub(r"\w+$", "", parameter).strip()] for parameter in parameters)
        assert binding._SIGNATURES[name] == (types[result.strip()], arguments), name


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_structures_and_constants_are_the_header_s(tmp_path):
    """Sizes, offsets and constants agree with those that a C compiler gives."""
    fields = [(name, field) for name, structure in STRUCTURES.items() for field, _ in structure._fields_]
    values = [
        *(f"sizeof({name})" for name in STRUCTURES),
        *(f"offsetof({name}, {field})" for name, field in fields),
        *("BETACLIP_VERSION", "BETACLIP_BFLOAT16", "BETACLIP_FLOAT16"),
    ]
    lines = "".join(f'printf("%zu\\n", (size_t)({value}));\n' for value in values)
    program = tmp_path / "layout.c"
    program.write_text(f'#include "betaclip.h"\n#include <stdio.h>\nint main(void) {{\n{lines}return 0; }}\n')
    subprocess.run(["cc", f"-I{HEADER.parent}", program, "-o", tmp_path / "layout"], check=True)
    printed = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True).stdout.split()
    assert [int(number) for number in printed] == [
        *(ctypes.sizeof(structure) for structure in STRUCTURES.values()),
        *(getattr(STRUCTURES[name], field).offset for name, field in fields),
        *(binding.VERSION, binding.DTYPES[torch.bfloat16], binding.DTYPES[torch.float16]),
    ]


def test_reasons(monkeypatch):
    monkeypatch.setattr(binding, "_missing", "")
    half = torch.zeros(3, 1024, dtype=torch.bfloat16)
    on_cpu = "needs an NVIDIA GPU, the tensors are on cpu"
    assert BACKENDS["cuda"](half, half) == [on_cpu]
    assert BACKENDS["cuda"](half.float(), half.float()) == [
        on_cpu,
        "multiplies bfloat16 and float16, not torch.float32",
    ]
    deep = torch.zeros(3, 1025, dtype=torch.bfloat16)
    assert BACKENDS["cuda"](deep, deep) == [on_cpu, "serves D from 1 to 1024, not 1025"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=8, minor=0))
    assert binding.not_supported_reasons(torch.device("cuda", 1)) == [
        "needs compute capability 9.0 (Hopper), cuda:1 has 8.0"
    ]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    assert binding.not_supported_reasons(torch.device("cuda", 1)) == []


def test_is_served_only_by_name(cuda_on_cpu, monkeypatch):
    x = torch.zeros(3, 8, dtype=torch.float16)
    monkeypatch.delenv("BETACLIP_BACKEND", raising=False)
    assert resolve("similarity_softplus", "auto", BACKENDS, x, x) == "blockwise"
    assert resolve("similarity_softplus", "cuda", BACKENDS, x, x) == "cuda"
    with pytest.raises(NotImplementedError, match="cuda: never chosen by 'auto': so far it has run on two GPUs"):
        resolve("similarity_softplus", "auto", {"cuda": BACKENDS["cuda"]}, x, x)
    monkeypatch.setenv("BETACLIP_BACKEND", "cuda")
    assert resolve("similarity_softplus", "auto", BACKENDS, x, x) == "cuda"


def test_launches_on_the_device_and_stream_that_are_current(monkeypatch):
    events = []

    @contextmanager
    def guard(device):
        events.append(("enter", device))
        yield
        events.append(("exit", device))

    def streams(device):
        return SimpleNamespace(cuda_stream={"cuda:1": 71}[str(device)])

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "current_stream", streams)
    monkeypatch.setattr(binding, "_library", SimpleNamespace(function=lambda *args: events.append(args)))
    device = torch.device("cuda:1")
    binding.launch("function", device, 3, None)
    assert events == [("enter", device), (3, None, 71), ("exit", device)]


def test_stream_is_handed_over(cuda_on_cpu, monkeypatch):
    @contextmanager
    def current(device):
        yield 0x5A5A

    monkeypatch.setattr(binding, "current", current)
    x, y, _, _ = operands(5, 6, 8, torch.float16)
    sides, scale = [Operand(rows.cpu(), None, None, rows.dtype) for rows in (x, y)], torch.tensor(2.0)
    stream = ctypes.c_void_p.in_dll(cuda_on_cpu, "stand_in_stream")
    incoming = [torch.ones(5), torch.ones(6)]
    for operation in (
        lambda: Cuda().similarity_logsumexp_fwd(*sides, scale),
        lambda: Cuda().similarity_logsumexp_bwd(*sides, scale, *incoming, *incoming, True, True),
        lambda: Cuda().similarity_softplus_fwd(*sides, scale, None),
        lambda: Cuda().similarity_softplus_fwd_bwd(*sides, scale, None, incoming[0], True, True),
    ):
        stream.value = 0
        operation()
        assert stream.value == 0x5A5A


def test_refusals_raise_with_the_library_s_text(cuda_on_cpu, monkeypatch):
    x = torch.ones(5, 8, dtype=torch.float16)
    whole = binding.workspace
    monkeypatch.setattr(binding, "workspace", lambda *args: whole(*args)[:-1])
    for operation in (similarity_logsumexp, similarity_softplus):
        with pytest.raises(RuntimeError, match=r"betaclip_\w+_forward: the workspace is too small \(error -9\)"):
            operation(x, x, torch.tensor(1.0), backend="cuda")


def test_vectors_with_gaps_are_refused():
    with pytest.raises(ValueError, match=r"expected a contiguous tensor, got strides \(2,\) of shape \(3,\)"):
        binding.pointer(torch.zeros(6)[::2])


@pytest.mark.parametrize("least, greatest, scale", [(9.0, 11.0, 3.0), (1e-2, 1e2, 1.0), (1e15, 1e15, 1.0)])
def test_rows_of_any_norms(least, greatest, scale, cuda):
    """Statistics of all rows, or of those that meet no long one, leave the range of one shift: a second pass."""
    n, m, d = (70, 45, 16) if DEVICE == "cpu" else (1300, 700, 72)
    x, y, x_image_id, y_image_id = operands(n, m, d)
    x, y = (
        (
            F.normalize(rows, dim=1)
            * torch.logspace(math.log10(least), math.log10(greatest), len(rows)).to(rows)[:, None]
        )
        for rows in (x, y)
    )
    x, y = x.bfloat16(), y.bfloat16()

    def ours(x, y):
        return torch.cat(
            similarity_logsumexp(x, y, torch.tensor(scale, device=DEVICE), x_image_id, y_image_id, backend="cuda")
        )

    def dense(x, y):
        return dense_logsumexp(x, y, scale, x_image_id, y_image_id)

    weight = torch.rand(n + m, dtype=torch.float64, device=DEVICE)
    (lse, *gradients), (truth, *exact) = (
        value_and_gradients(ours, weight, x, y),
        value_and_gradients(dense, weight, x.double(), y.double()),
    )
    torch.testing.assert_close(lse.double(), truth, rtol=1e-5, atol=1e-4)
    for gradient, expected in zip(gradients, exact, strict=True):
        assert (gradient - expected).norm() <= 1e-2 * expected.norm()


LOST = {  # some of a range; a thread has rows 8 apart, a warp 16
    "all": lambda i: i >= 0,
    "none": lambda i: i < 0,
    "one": lambda i: i == 41,
    "first": lambda i: i % 16 < 8,
    "second": lambda i: i % 16 >= 8,
}


@pytest.mark.parametrize("n, m, d", [(45, 71, 16), pytest.param(300, 200, 64, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "rows, cols",
    [("all", "all"), ("first", "none"), ("second", "none"), ("one", "none"), ("none", "second"), ("second", "one")],
)
def test_rows_far_below_what_norms_allow(rows, cols, n, m, d, cuda):
    """The second pass does these rows and columns, of which all logits are near -60 or -80, and no others. Some rows
    have no pair: those of no image, and some of image 2."""
    lost_x, lost_y = (LOST[which](torch.arange(count)) for which, count in ((rows, n), (cols, m)))
    x, y = (0.002 * torch.randn(count, d) for count in (n, m))
    x[:, :2] += torch.where(lost_x[:, None], torch.tensor([-0.8, 0.6]), torch.tensor([0.6, 0.8]))
    y[:, :2] += torch.where(lost_y[:, None], torch.tensor([0.0, -1.0]), torch.tensor([0.96, 0.28]))
    x_image_id, y_image_id = torch.full((n,), 1), torch.full((m,), 2)
    x_image_id[[3, 10]], x_image_id[[4, 11]], y_image_id[[5, 12]] = 2, -1, -1
    x, y, *ids = (t.to(DEVICE) for t in (x.bfloat16(), y.bfloat16(), x_image_id, y_image_id))

    def ours(x, y):
        return torch.cat(similarity_logsumexp(x, y, torch.tensor(100.0, device=DEVICE), *ids, backend="cuda"))

    def dense(x, y):
        return dense_logsumexp(x, y, 100.0, *ids)

    weight = torch.rand(n + m, dtype=torch.float64, device=DEVICE)
    lse, *gradients = value_and_gradients(ours, weight, x, y)
    truth, *exact = value_and_gradients(dense, weight, x.double(), y.double())
    has_pair = truth.isfinite()
    assert torch.equal(
        has_pair.nonzero().ravel().cpu(),
        torch.tensor([i for i in range(n + m) if i not in (3, 4, 10, 11, n + 5, n + 12)]),
    )
    assert torch.equal((truth < -30)[has_pair], torch.cat((lost_x, lost_y)).to(DEVICE)[has_pair])
    torch.testing.assert_close(lse.double(), truth, rtol=1e-5, atol=1e-4)
    for gradient, expected in zip(gradients, exact, strict=True):
        assert (gradient - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.gpu
@CHECKS
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("d", [8, 72, 512, 1000, 1024])
@pytest.mark.parametrize("n, m", [(8, 1000), (72, 8), (512, 1024), (1000, 72), (1024, 512), (1, 4099), (4099, 1)])
def test_odd_shapes_on_gpu(check, dtype, n, m, d, cuda):
    check("cuda", dtype, 20.0, n, m, d, True)


CUDA = Cuda()


def everything(x, y, scale, bias, x_image_id, y_image_id, backend=CUDA):
    """The results of all four functions of the backend."""
    sides = Operand(x, x_image_id, None, x.dtype), Operand(y, y_image_id, None, y.dtype)
    lse = backend.similarity_logsumexp_fwd(*sides, scale)
    incoming = [torch.linspace(0.5, 1.5, len(t), device=t.device) for t in lse]
    gradients = backend.similarity_logsumexp_bwd(*sides, scale, *lse, *incoming, True, True)
    rows = backend.similarity_softplus_fwd(*sides, scale, bias)
    return [*lse, *gradients, rows, *backend.similarity_softplus_fwd_bwd(*sides, scale, bias, incoming[0], True, True)]


def case(n, m, d, device=DEVICE):
    """Arguments of :func:`everything`."""
    x, y, x_image_id, y_image_id = (t.to(device) for t in operands(n, m, d, torch.bfloat16))
    scale, bias = (torch.tensor(v, device=device) for v in (20.0, -2.0))
    return [x, y, scale, bias, x_image_id.int(), y_image_id.int()]


@pytest.mark.gpu
def test_cuda_graph(cuda):
    """A replay reads all inputs anew, scale and bias included; several chunks of dS."""
    static, other = case(1100, 700, 264), case(1100, 700, 264)
    other[2].fill_(7.0)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # libraries allocate at their first call
        everything(*static, Cuda(512))
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(*static, Cuda(512))
    for inputs in (case(1100, 700, 264), other):
        for argument, value in zip(static, inputs, strict=True):
            argument.copy_(value)
        graph.replay()
        for ours, truth in zip(captured, everything(*inputs, Cuda(512)), strict=True):
            assert torch.equal(ours, truth)


@pytest.mark.gpu
def test_two_streams(cuda):
    """Work that overlaps shares no workspace."""
    inputs = [case(1500, 2100, 512), case(2300, 900, 512)]
    truths = [everything(*arguments) for arguments in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results = []
    for _ in range(10):
        for stream, arguments in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(everything(*arguments))
    torch.cuda.synchronize()
    for index, result in enumerate(results):
        for ours, truth in zip(result, truths[index % 2], strict=True):
            assert torch.equal(ours, truth)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_current(cuda):
    arguments = case(300, 500, 72, "cuda:0")
    truth = everything(*arguments)
    with torch.cuda.device(0):
        ours = everything(*(t.to("cuda:1") for t in arguments))
    for a, b in zip(ours, truth, strict=True):
        assert a.device.index == 1 and torch.equal(a.cpu(), b.cpu())
