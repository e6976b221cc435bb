"""The program runs, and its three ways to the same loss agree."""

import re

import pytest
from support.paths import ROOT
from support.programs import load_program

flair_cost = load_program(ROOT / "tools" / "flair_cost.py")


def test_all_ways_agree(monkeypatch, capsys):
    sizes = {"images": 3, "texts": 2, "patches": 5, "dim": 16, "heads": 2, "rounds": 1, "threads": 1}
    arguments = [f"--{name}={size}" for name, size in sizes.items()]
    monkeypatch.setattr(flair_cost.sys, "argv", ["flair_cost.py", "--device=cpu", *arguments])
    flair_cost.main()
    rows = re.findall(r"^(modules|one call|score) +([\d.]+) +([\d.]+) +\S+ +(\S+)$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in rows] == ["modules", "one call", "score"]
    errors = [float(error) for *_, error in rows]
    assert errors[0] == 0 and max(errors) < 1e-4
    assert all(float(time) > 0 for _, time, *_ in rows)


@pytest.mark.parametrize("images", [1, 4])
def test_each_image_has_one_text_of_each_other(images, monkeypatch):
    args = flair_cost.argparse.Namespace(
        images=images, texts=3, patches=2, dim=8, heads=2, dtype="float32", device=flair_cost.torch.device("cpu")
    )
    step = flair_cost.Step(args)
    owners = (step.chosen // 3).tolist()
    assert all(sorted(row) == sorted([i] * 2 + list(range(images))) for i, row in enumerate(owners))
    assert all(row[:3] == [i] * 3 and mask == [True] * 3 + [False] * (images - 1)
               for i, (row, mask) in enumerate(zip(owners, step.own.tolist(), strict=True)))  # fmt: skip
