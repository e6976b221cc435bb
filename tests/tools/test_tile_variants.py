"""Variants of tiles differ from what the tables say in one thing, and are measured beside it."""

import csv
from dataclasses import fields

import pytest
import torch
from support.paths import ROOT
from support.programs import load_program

from betaclip.kernels.architecture import Tile, choose
from betaclip.kernels.attention_pool.tiles import BACKWARD, FORWARD, PRODUCTS
from betaclip.kernels.similarity.tiles import CHUNK_ROWS, TILES

PROGRAM = load_program(ROOT / "tools" / "tile_variants.py")
CUDA = torch.device("cuda")
ARCHITECTURES = sorted({name for name, _ in TILES} - {"interpreter"})


def differences(tile, other):
    return [field.name for field in fields(Tile) if getattr(tile, field.name) != getattr(other, field.name)]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize(
    "table", [TILES, FORWARD, BACKWARD, PRODUCTS], ids=["similarity", "forward", "backward", "products"]
)
def test_tiles_differ_in_what_they_are_called_by(table, target, itemsize):
    chosen = choose(table, target, itemsize)
    variants = PROGRAM.tile_variants(chosen)
    for name, tile in variants.items():
        field, value = name.split()
        assert differences(chosen, tile) == [field] and str(getattr(tile, field)) == value
        assert min(tile.block_m, tile.block_n, tile.block_d) >= 16 and min(tile.num_warps, tile.num_stages) >= 1
    assert len(set(variants.values())) == len(variants) >= 9


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_backends_of_a_gpu(monkeypatch, target):
    pytest.importorskip("triton")
    monkeypatch.setattr(PROGRAM, "architecture", lambda device: target)
    losses, pools = PROGRAM.loss_variants(CUDA, 2), PROGRAM.pool_variants(CUDA, 2)
    for variants in (losses, pools):
        assert len(set(variants.values())) == len(variants)
    chosen = choose(CHUNK_ROWS, target, 2)
    assert losses[f"triton, chunk {2 * chosen}"].chunk_rows == 2 * chosen
    assert losses["cuda, chunk 4096"].chunk_rows == 4096
    assert list(losses)[-2:] == ["betaclip/cuda", "betaclip/triton"] and list(pools)[-1] == "betaclip/triton"
    assert {type(x).__name__ for x in losses.values()} == {"Triton", "Cuda"}
    assert losses["betaclip/triton"].tile is None and pools["betaclip/triton"].forward_tile is None
    tile = choose(FORWARD, target, 2)
    wider = pools[f"forward, block_n {2 * tile.block_n}"]
    assert differences(tile, wider.forward_tile) == ["block_n"] and wider.backward_tile is None
    assert pools["scratch 256 MiB"].scratch_bytes == 2**28


@pytest.mark.parametrize("argv", [("loss", "--forms", "bce", "--dim", "16"), ("pooling", "--dim", "16")])
def test_smoke_run(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.setattr("common.session.draw", lambda *_: "drawn")
    given = ["--smoke", "--device", "cpu", "--output", str(tmp_path)]
    assert PROGRAM.main([*argv, *given]) == 0
    assert "Fastest variant, forward+backward:\n" in (shown := capsys.readouterr().out) and "drawn" in shown
    (file,) = tmp_path.glob(f"cpu-*-tiles-{argv[0]}.csv")
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    backends = {"loss": PROGRAM.loss_variants, "pooling": PROGRAM.pool_variants}[argv[0]](torch.device("cpu"), 4)
    assert {row["implementation"] for row in rows} == set(backends) and all(row["status"] == "ok" for row in rows)
    assert all(float(row["gradient_error"]) < 1e-5 for row in rows if row["phase"] == "forward+backward")
    assert {row.get("path", "folds") for row in rows} == {"folds"}
    assert rows[0]["command"].startswith(f"python tools/tile_variants.py {argv[0]} ")


def row(implementation, ms, phase="forward+backward", status="ok"):
    return {
        "form": "ce", "n": "9216", "implementation": implementation, "phase": phase, "status": status,
        "time_ms_p50": ms,
    }  # fmt: skip


def test_outcome():
    rows = [
        row("a", "8"), row("b", "9"), row("c", "1", "forward"), row("d", "", status="failed: OutOfResources"),
        row("betaclip/triton", "10"),
    ]  # fmt: skip
    assert PROGRAM.outcome(rows)[1:] == ["ce, N = 9216:   betaclip/triton 10 ms   a -20%"]
    assert PROGRAM.outcome(rows[-1:])[1:] == ["ce, N = 9216:   betaclip/triton 10 ms   betaclip/triton +0%"]
    assert PROGRAM.outcome([]) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["loss", "--sizes", "100"], "--sizes: expected multiples of 36, got 100"),
        (["loss", "--device", "meta"], "--device: expected cpu or cuda, got meta"),
        (["pooling", "--batch", "0"], "--batch: expected at least 1, got 0"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit):
        PROGRAM.arguments(argv)
    assert message in capsys.readouterr().err


def test_names_its_operations():
    with pytest.raises(SystemExit, match="expected loss or pooling first, got nothing"):
        PROGRAM.main([])
