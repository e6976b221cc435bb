"""Evaluation by several ranks equals that by one, with parts of unequal sizes and pictures that cannot be read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support import colours

from betaclip.data.multiple_choice import Choice
from betaclip.data.scenes.dataset import scene
from betaclip.data.transforms import EvaluationTransform
from betaclip.evaluation.sharding import Sharding
from betaclip.evaluation.tasks.multiple_choice import choice_accuracy
from betaclip.evaluation.tasks.pointing import pointing
from betaclip.evaluation.tasks.retrieval import retrieval, retrieval_ranks
from betaclip.model.tokenizer import Tokenizer

RANKS = 3
distributed = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")


@pytest.mark.parametrize("total", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_parts_are_everything_once(total, count):
    parts = [Sharding(rank, count).part(total) for rank in range(count)]
    assert [i for part in parts for i in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_alone_without_a_group():
    assert Sharding.of_group() == Sharding(0, 1)


def _gather() -> None:
    sharding = Sharding.of_group()
    assert (sharding.rank, sharding.count) == (dist.get_rank(), 3)
    for dtype in (torch.float32, torch.float64, torch.int64, torch.bool):
        for sizes in ((2, 0, 5), (0, 0, 0), (1, 4, 1)):
            whole = torch.randint(0, 2, (sum(sizes), 3)).to(dtype)
            before = sum(sizes[: sharding.rank])
            found = sharding.gather(whole[before : before + sizes[sharding.rank]])
            assert found.dtype == dtype and torch.equal(found, whole)
    assert sharding.sum(torch.tensor([sharding.rank, 1])).tolist() == [3, 3]
    assert sharding.maximum(torch.tensor([float(sharding.rank), -torch.inf])).tolist() == [2, -torch.inf]


def _ranks() -> None:
    """Of scores with ties and NaN; the second of three ranks has no images."""
    sharding = Sharding.of_group()
    sizes = (4, 0, 3)
    scores = torch.randint(0, 4, (7, 15)).float()
    scores[torch.rand(7, 15) < 0.1] = torch.nan
    image_of_text = torch.cat((torch.arange(7), torch.randint(0, 7, (8,))))[torch.randperm(15)]
    before, own = sum(sizes[: sharding.rank]), sizes[sharding.rank]
    text_to_image, image_to_text = retrieval_ranks(
        lambda lo, hi: scores[before + lo : before + hi], own, image_of_text, sharding
    )
    truth = retrieval_ranks(lambda lo, hi: scores[lo:hi], 7, image_of_text)
    assert torch.equal(text_to_image, truth[0]) and torch.equal(image_to_text, truth[1][before : before + own])


def _measures(folder: str, measures: dict[str, Any]) -> None:
    """All of them by one process, and by all."""
    for name, measure in measures.items():
        alone, together = measure(Path(folder), Sharding()), measure(Path(folder), Sharding.of_group())
        assert together == pytest.approx(alone, abs=1e-12), name
        assert 0 < min(v for k, v in alone.items() if k in ("t2i_r1", "hard", "mass_in_box")) < 1, name


def _noise(seed: int, side: int = 32) -> Any:
    return np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)


def _retrieval(folder: Path, sharding: Sharding) -> dict[str, float]:
    """Seven files, of which the third and the last cannot be read."""
    names = ["red", "green blue", "blue", "red green", "blue blue red", "green", "red blue green green"]
    pictures = [(folder / f"{i}.png", [name, *names[: i % 3]]) for i, name in enumerate(names)]
    model = colours.ColourModel(sharpness=5)
    return retrieval(
        model, Tokenizer(), pictures, EvaluationTransform(32), conditioned=True, batch_size=2, sharding=sharding
    )


def _choices(folder: Path, sharding: Sharding) -> dict[str, float]:
    texts = ("red", "green", "blue", "red blue", "blue green")
    questions = [
        (name, Choice(folder / f"{i % 7}.png", (0, 0, 8 + i, 16), texts[i % 5], texts[i % 5 + 1 :] or texts[:2]))
        for i in range(11)
        for name in (("hard", "easy") if i % 2 else ("hard",))
    ]
    return choice_accuracy(colours.ColourModel(), Tokenizer(), questions, batch_size=3, sharding=sharding)


def _pointing(folder: Path, sharding: Sharding) -> dict[str, float]:
    shown = [
        replace(
            scene(0, i), image=_noise(i), phrases=["red", "blue", "green"][: i % 4], boxes=[(0, 0, 9, 20)] * (i % 4)
        )
        for i in range(5)
    ]
    return pointing(colours.ColourModel(), Tokenizer(), shown, batch_size=2, sharding=sharding)


@distributed
def test_three_ranks(tmp_path):
    for i in range(7):
        colours.save(tmp_path / f"{i}.png", _noise(i))
    colours.save_broken(tmp_path / "2.png")
    (tmp_path / "6.png").unlink()
    # Forked, for the time that importing would take; nothing here runs in threads that a fork would lose.
    mp.start_processes(_rank, (str(tmp_path),), RANKS, start_method="fork")


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    torch.manual_seed(0)  # the same samples everywhere, of which each rank takes its part
    _gather()
    _ranks()
    _measures(folder, {"retrieval": _retrieval, "choices": _choices, "pointing": _pointing})
    dist.barrier()  # gloo aborts a process whose peer leaves in the middle of its last call
    dist.destroy_process_group()
