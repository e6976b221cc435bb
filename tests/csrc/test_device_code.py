"""Passes over products as nvcc compiled them for the device, on the CPU: csrc/tests/device_passes.cu.

The emulation in csrc/tests runs the same sources, but as the host's compiler translates them.
"""

import struct
from itertools import product

import numpy as np
import pytest
from support import ptx
from support.paths import ROOT
from support.programs import load_program

TILE, BAND, CONSUMERS, CLUSTER = 128, 8, 2, 2  # csrc/tiles.h
GROUPS, JOB = "QQi4xq", "2q6i2Q2q6q3Q"  # the structures' fields
SCALE, REFERENCE = 100.0, 27.0  # of unit rows


@pytest.fixture(scope="module")
def kernels():
    build = load_program(ROOT / "csrc" / "build_library.py")
    if reason := build.reason_not_to_build():
        pytest.skip(reason)
    return ptx.parse(build.build("device_passes.ptx").read_text())


class Device:
    """A device with two multiprocessors that has logits in place of rows. Its memory: arrays, one behind the other."""

    def __init__(self, kernels, logits, x_group, y_group):
        self.kernels, self.counts = kernels, logits.shape
        self.memory, self.end = np.zeros(2**20, np.uint8), 256
        self.tiles = [-(-count // TILE) for count in self.counts]
        self.strip_tiles = -(-self.tiles[0] // CLUSTER)
        products = np.zeros((CLUSTER * self.strip_tiles * TILE, self.tiles[1] * TILE), "f4")
        products[: self.counts[0], : self.counts[1]] = logits / SCALE
        self.products, self.scale = self.put(products), self.put(np.array([SCALE], "f4"))
        self.groups = [
            struct.pack(GROUPS, self.put(group.astype("i4")), 0, absent, len(group))
            for absent, group in enumerate((x_group, y_group))
        ]
        self.part_counts = CONSUMERS, CONSUMERS * CLUSTER  # one range, two strips
        self.parts = [self.put(np.zeros(shape, "f4")) for shape in zip(self.part_counts, self.counts, strict=True)]

    def put(self, values):
        place = self.end
        assert place + values.nbytes <= len(self.memory)
        self.memory[place : place + values.nbytes] = np.frombuffer(values.tobytes(), np.uint8)
        self.end = -(-(place + values.nbytes) // 256) * 256
        return place

    def get(self, place, size, dtype):
        return self.memory[place : place + size].view(dtype).copy()

    def consume(self, name, *parameters, lost=(0, 0, 0), bytes_of_sum=4):
        shared = 4 * TILE * 8 + (BAND + 4) * TILE * bytes_of_sum
        terms = b"".join(self.groups) + struct.pack(f"{len(parameters)}Q", *parameters)
        grid = *self.tiles, CLUSTER, 1, self.strip_tiles, self.tiles[1]
        job = struct.pack(JOB, 0, 0, *grid, *self.parts, *self.counts, *[0] * 6, *lost)
        for program, which in product(range(CLUSTER), range(CONSUMERS)):
            arguments = [
                terms,
                job,
                struct.pack("Q", self.products),
                struct.pack("i", program),
                struct.pack("i", which),
            ]
            ptx.launch(self.kernels[name], (1,), TILE, arguments, self.memory, shared)

    def log_sum_exps(self):
        """Run what betaclip_logsumexp_forward launches.

        Returns:
            lse_x and lse_y; which rows and which columns the first pass lost.
        """
        reference, any_lost = (self.put(np.array([v], "f4")) for v in (REFERENCE, 0))
        lost = [self.put(np.full(4 * count, 2**32 - 1, "u4")) for count in self.tiles]
        lse = [self.put(np.full(count, np.nan, "f4")) for count in self.counts]
        sides = [
            group + struct.pack("QqQQ", *rest)
            for group, *rest in zip(self.groups, self.parts, self.part_counts, lost, lse, strict=True)
        ]

        def merge(name, *parameters):
            (kernel,) = (kernel for mangled, kernel in self.kernels.items() if name in mangled)
            arguments = [*sides, *(struct.pack("Q", place) for place in parameters)]
            ptx.launch(kernel, (max(self.tiles), 2), TILE, arguments, self.memory)

        self.consume("first_pass", self.scale, reference)
        merge("merge_first_kernel", reference, any_lost)
        bits = [self.get(place, 16 * count, "u1") for place, count in zip(lost, self.tiles, strict=True)]
        were_lost = [np.unpackbits(b, bitorder="little").astype(bool) for b in bits]
        self.consume("second_pass", self.scale, lost=(any_lost, *lost), bytes_of_sum=8)
        merge("merge_second_kernel")
        return *(self.get(place, 4 * count, "f4") for place, count in zip(lse, self.counts, strict=True)), *were_lost

    def softplus(self):
        """Row sums of softplus as betaclip_softplus_forward launches it, without a bias."""
        self.consume("softplus_pass", self.scale, 0, 0)
        return self.get(self.parts[0], 4 * CONSUMERS * self.counts[0], "f4").reshape(CONSUMERS, -1).sum(0)


def logits(n, m, rows=(), cols=()):
    """Some of which nothing is lost but these rows and columns."""
    values = np.random.default_rng(0).uniform(20, 40, (n, m))
    values[list(rows)] -= 130
    values[:, list(cols)] = -100
    return values


SECOND = [i for i in range(45) if i % 16 >= 8]  # of the rows that a thread has, 8 apart: the second ones
CASES = {
    "every row and column": (np.full((45, 71), -100.0), range(45), range(71)),
    "second rows": (logits(45, 30, SECOND), SECOND, []),
    "first rows": (logits(45, 30, set(range(45)) - set(SECOND)), set(range(45)) - set(SECOND), []),
    "columns": (logits(30, 45, [], SECOND), [], SECOND),
    "rows and columns of some tiles": (
        logits(300, 140, [0, 9, 127, 137, 299], [3, 139]),
        [0, 9, 127, 137, 299],
        [3, 139],
    ),
    "none": (logits(45, 30), [], []),
}


@pytest.mark.parametrize("case", CASES)
def test_log_sum_exps(case, kernels):
    """What a first pass loses comes right in the second, whatever else is lost; nothing else changes."""
    values, rows, cols = CASES[case]
    n, m = values.shape
    lse_x, lse_y, lost_x, lost_y = Device(kernels, values, np.full(n, 1), np.full(m, 2)).log_sum_exps()
    assert set(lost_x.nonzero()[0]) == set(rows) and set(lost_y.nonzero()[0]) == set(cols)
    np.testing.assert_allclose(lse_x, np.logaddexp.reduce(values, 1), rtol=0, atol=2e-5)
    np.testing.assert_allclose(lse_y, np.logaddexp.reduce(values, 0), rtol=0, atol=2e-5)


def test_rows_without_pairs(kernels):
    """Those of the other side's group are lost and those of none are not; both have -inf, and others what is theirs."""
    values = logits(45, 71, SECOND)
    x_group, y_group = np.full(45, 1), np.full(71, 2)
    x_group[[3, 8]], x_group[[4, 9]], y_group[[5, 14]] = 2, -1, -1
    kept = np.where((x_group[:, None] == y_group) | (x_group[:, None] < 0) | (y_group < 0), -np.inf, values)
    lse_x, lse_y, lost_x, lost_y = Device(kernels, values, x_group, y_group).log_sum_exps()
    assert set(lost_x.nonzero()[0]) == {3, *SECOND} - {9} and not lost_y.any()
    np.testing.assert_allclose(lse_x, np.logaddexp.reduce(kept, 1), rtol=0, atol=2e-5)
    np.testing.assert_allclose(lse_y, np.logaddexp.reduce(kept, 0), rtol=0, atol=2e-5)


def test_softplus(kernels):
    """Row sums keep their relative accuracy where 1 + exp(S) rounds to 1, and where 32 factors of 2 are multiplied."""
    logit = np.concatenate((np.linspace(-60, 60, 20), np.linspace(-6, 6, 24), [0.0, 0.0]))
    x_group = np.full(46, 1)
    x_group[45] = 2
    sums = Device(kernels, np.tile(logit[:, None], 150), x_group, np.full(150, 2)).softplus()
    errors = np.abs(sums / (150 * np.logaddexp(0, logit)) - 1)
    assert (errors < 6e-7 + 2e-7 * np.abs(logit))[:45].all()  # a logit's own rounding grows with it
    assert sums[45] == 0
