"""The benchmark of training steps measures what it says: one loss everywhere, realistic texts, FLOP, rows."""

import importlib
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from support.paths import ROOT
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "benchmarks"))

harness, smoke, steps, train_step = map(importlib.import_module, ("harness", "smoke", "steps", "train_step"))
comparison = importlib.import_module("comparison")


from betaclip.model.beta_clip import ModelConfig, create_model  # noqa: E402

IMAGES, TEXTS = 3, 9


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model(ModelConfig(context_length=248)).double()


@pytest.fixture(scope="module")
def batch(model):
    return steps.made_up_step_batch(model, IMAGES, TEXTS, torch.float64)


def test_texts_are_those_of_training():
    captions = steps.json.loads((ROOT / "benchmarks" / "captions.json").read_text(encoding="utf-8"))["captions"]
    for caption in captions:
        texts = steps.texts_of_caption(caption, 36, random.Random(0))
        assert len(texts) == len(set(texts)) == 36
        assert texts[0] == ". ".join(texts[1:6])
        assert all(sentence in caption for sentence in texts[1:6])
        assert all(len(phrase.split()) <= 14 and phrase in caption for phrase in texts[6:])
    with pytest.raises(ValueError, match="texts: expected at most"):
        steps.texts_of_caption("One sentence. Another", 36, random.Random(0))


def test_repeated_captions_are_in_other_words(model):
    """An image that repeats a caption has its lengths, but shares no more than the tokens around every text."""
    texts = steps.made_up_step_batch(model, 13, 2, torch.float32).texts
    first, again = (texts.of_images(i, i + 1) for i in (0, 12))
    assert not set(first.tokens.tolist()) & set(again.tokens.tolist()) - {49406, 49407}
    assert texts.max_texts_per_image == 2 and texts.num_images == 13


def test_padded(model, batch):
    captions, phrases = steps.padded(batch.texts)
    assert captions.shape[:2] == (IMAGES, 6) and phrases.shape[:2] == (IMAGES, TEXTS - 6)
    rows = [row for image in range(IMAGES) for block in (captions, phrases) for row in block[image]]
    for row, tokens in zip(rows, batch.texts.tokens.split(batch.texts.lengths.tolist()), strict=True):
        assert torch.equal(row[: len(tokens)], tokens) and not row[len(tokens) :].any()
    assert phrases[:, :, -1].any() and captions[:, :, -1].any()  # no longer than the longest


@pytest.mark.parametrize("part", steps.PARTS)
def test_all_compute_the_same(part, model, batch):
    one = torch.ones((), dtype=torch.float64)
    values = [
        comparison.phase_run(*steps.call(build(model), part, batch), one, comparison.PHASES[0])()
        for build in steps.step_implementations().values()
    ]
    assert all(bool(gradient.any()) for gradient in values[0][1:])
    for value in values[1:]:
        for a, b in zip(value, values[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_every_trained_parameter_is_in_the_step(model, batch):
    _, leaves = steps.call(steps.OurStep(model), "step", batch)
    assert {id(p) for p in leaves} == {id(p) for p in model.parameters() if p.requires_grad}


def test_tokens(model, batch):
    ours, published = steps.OurStep(model), steps.PublishedStep(model, checkpointed=True)
    assert published.tokens(batch) == sum(block.numel() for block in steps.padded(batch.texts))
    texts = [t.tolist() for t in batch.texts.tokens.split(batch.texts.lengths.tolist())]
    assert ours.tokens(batch) == len({tuple(text[: i + 1]) for text in texts for i in range(len(text))})


def test_flop_of_transformers():
    """Of one block of each kind, counted; padding and what is not wanted of the last block left aside."""
    width, tokens = 64, 10
    block = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0, batch_first=True)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        block(torch.randn(3, tokens, width))
    assert counter.get_total_flops() == 3 * steps.transformer_flop(width, 1, torch.full((tokens,), tokens))


def test_least_flop_of_a_step_is_that_of_its_parts(model, batch):
    for phase, factor in (("forward", 1), ("forward+backward", 3)):
        parts = [steps.least_flop(model, part, phase, batch) for part in steps.PARTS[1:]]
        assert steps.least_flop(model, "step", phase, batch) == sum(parts)
        vision = 3 * steps.transformer_flop(128, 4, torch.full((37,), 37))
        assert steps.least_flop(model, "vision", phase, batch) == factor * vision


@pytest.mark.parametrize("most", [0, 1, 2, 5, 16, 100, 1000])
def test_largest(most):
    assert most - most // 16 <= train_step.largest(lambda n: n <= most) <= most


def test_step_fits(model, monkeypatch):
    step = steps.OurStep(model)
    fits = lambda images: train_step.step_fits(step, 2, torch.float64, images)  # noqa: E731
    assert fits(1)
    made = train_step.made_up_step_batch

    def limited(model, images, texts, dtype):
        if images > 3:
            raise torch.OutOfMemoryError("out of memory")
        if images == 3:
            raise ValueError("broken")
        return made(model, images, texts, dtype)

    monkeypatch.setattr(train_step, "made_up_step_batch", limited)
    assert fits(2) and not fits(4)
    with pytest.raises(RuntimeError, match="3 images: failed: ValueError: broken"):
        fits(3)


def test_difference():
    pairs = [(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0])), (torch.tensor([1.0]), torch.tensor([5.0]))]
    assert train_step.difference(pairs) == pytest.approx(1.0)


def test_rates():
    row = train_step.StepMeasurement(SimpleNamespace(images=6), time_ms_p50=500.0)
    rated = train_step.with_rates(row, 1500.0)
    assert (rated.images_per_s, rated.speedup) == (12.0, 3.0)
    assert train_step.with_rates(row, None).speedup is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--images", "0"], "--images: expected at least 1, got 0"),
        (["--texts", "1"], "--texts: expected at least 2, got 1"),
        (["--largest"], "--largest: expected a GPU"),
        (["--implementations", "nobody"], "expected some of published"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit):
        train_step.arguments(["--device", "cpu", *argv])
    assert message in capsys.readouterr().err


def test_smoke_run(tmp_path):
    rows, shown = smoke.smoke_run("train_step.py", tmp_path)
    (figure,) = tmp_path.glob("*-train-step.png")
    assert figure.read_bytes()[:4] == b"\x89PNG"
    expected = {
        (part, name, phase)
        for part in steps.PARTS
        for name in steps.step_implementations()
        for phase in comparison.PHASES
    }
    assert {(row["form"], row["implementation"], row["phase"]) for row in rows} == expected
    for row in rows:
        assert row["status"] == "ok" and row["implementation"] in shown
        smoke.assert_timed(row)
        assert float(row["images_per_s"]) > 0 < float(row["speedup"])
        if row["implementation"] != train_step.BASELINE:
            assert float(row["loss_difference"]) < 1e-5
        if row["form"] in ("step", "text"):
            assert int(row["tokens_computed"]) > 0 < int(row["tokens_existing"])
