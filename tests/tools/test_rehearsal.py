"""The dress rehearsal: both recipes, from annotations to an exported model, with small towers."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from support.paths import ROOT
from support.programs import load_program
from support.tiny import START

from betaclip import train
from betaclip.checkpoint import checkpoint_path, load_checkpoint
from betaclip.data.phrases.cache import PhraseCache
from betaclip.model.weights import read_weights
from betaclip.published import load_published
from betaclip.training.log import read_metrics

pytestmark = pytest.mark.slow
PROGRAM = load_program(ROOT / "tools" / "rehearsal.py")


class Rehearsed(NamedTuple):
    folder: Path
    output: str


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    folder, output = tmp_path_factory.mktemp("rehearsal"), io.StringIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork may wait for ever for threads that the process before it had
    try:
        with redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "write_curves", lambda *_: None)  # takes longer than the rest of a run
            PROGRAM.main(["--tower", "small", "--folder", str(folder)], start=START)
    finally:
        torch.set_num_threads(threads)
    return Rehearsed(folder, output.getvalue())


def test_phrases_are_spacys(rehearsed: Rehearsed) -> None:
    phrases = PhraseCache(rehearsed.folder / "phrases.bin")
    assert phrases.extractor.startswith("spacy") and phrases.style == "published"


@pytest.mark.parametrize("form", PROGRAM.FORMS)
def test_resumed_run(rehearsed: Rehearsed, form: str) -> None:
    """Two updates before the kill and two after it, with the recipe's settings."""
    run = rehearsed.folder / "runs" / form
    assert f"resuming from {checkpoint_path(run, PROGRAM.BEFORE_KILL)}\n" in rehearsed.output
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["step"] == PROGRAM.UPDATES and last["skipped"] == 0
    assert re.search(rf"^{form}: global_loss {last['global_loss']:.3g}, ", rehearsed.output, re.MULTILINE)
    # The loss is of 4 images at a time, which random towers cannot tell apart.
    assert last["global_loss"] == pytest.approx(torch.tensor(4.0).log().item(), rel=0.2)
    model, openai = load_checkpoint(run), read_weights(rehearsed.folder / "openai.pt")
    assert model.config.quick_gelu and model.context_length == 248 and model.config.pool_heads == 8
    moved = (model.clip.visual.conv1.weight - openai["visual.conv1.weight"].float()).abs().max()
    assert 0 < moved < 1e-4  # by learning rates up to 1e-5


@pytest.mark.parametrize("form", PROGRAM.FORMS)
def test_evaluated(rehearsed: Rehearsed, form: str) -> None:
    results = json.loads((rehearsed.folder / "runs" / form / "results.json").read_text())
    for name, left_out in (("urban1k", 0), ("dci", 0), ("sharegpt4v_1k", 1000 - PROGRAM.ITEMS)):
        counts = [results[name][f"retrieval/{key}"] for key in ("images", "texts", "left_out")]
        assert counts == [PROGRAM.ITEMS, PROGRAM.ITEMS, left_out]
    for subset in ("hard", "medium", "easy", "trivial", "color"):
        assert results["fg_ovd"][f"choices/{subset}_questions"] == PROGRAM.ITEMS


@pytest.mark.parametrize("form", PROGRAM.FORMS)
def test_exported(rehearsed: Rehearsed, form: str) -> None:
    """The file holds the run's weights in the published layout, and is evaluated alike."""
    file, run = rehearsed.folder / f"{form}.safetensors", rehearsed.folder / "runs" / form
    assert {"positional_embedding_res", "visual.blocks.0.attn.qkv.weight"} <= load_file(file).keys()
    trained, again = load_checkpoint(run).state_dict(), load_published(file).state_dict()
    assert trained.keys() == again.keys() and all(torch.equal(trained[name], again[name]) for name in trained)
    assert json.loads(file.with_suffix(".json").read_text()) == json.loads((run / "results.json").read_text())
