from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import needs_gloo, processes
from support.steps import OPTIMIZER, assert_same, config, create_step, double, parameters
from support.tiny import WORDS, tiny_batch, tiny_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from betaclip import BetaCALLoss
from betaclip.data.batches import Batch
from betaclip.data.padding import pad_as_published
from betaclip.losses.flair import multi_positive_loss, text_conditioned_loss
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.texts import RaggedTexts
from betaclip.process_group import ProcessGroup
from betaclip.training import parallel
from betaclip.training.config import GroupConfig, LockConfig, LoraConfig, LossConfig, TrainingConfig
from betaclip.training.freezing import freeze
from betaclip.training.objective import Objective
from betaclip.training.optimizers import create_optimizer
from betaclip.training.sampler import mix
from betaclip.training.step import TrainStep, other_pictures, texts_of_others


def test_cached_micro_batches_equal_the_whole_batch():
    batch = double(tiny_batch(7))
    results, rows = [], []
    for size in (None, 3, 1):
        model = tiny_model().double()
        train_step = create_step(model, config(micro_batch_size=size))
        rows.append(torch.stack([train_step(batch, step, 7) for step in range(2)]))
        results.append(parameters(model))
    assert train_step.columns == [
        "loss", "global_loss", "beta_cal_loss", "logit_scale", "pool_logit_scale", "norm_backbone", "norm_pool",
    ]  # fmt: skip
    assert (rows[0][0] != rows[0][1]).all()  # everything moves
    for result, row in zip(results[1:], rows[1:], strict=True):
        assert_same(result, results[0], 1e-12)
        torch.testing.assert_close(row, rows[0], atol=1e-6, rtol=0)  # the losses of a row are float32


def test_micro_batches_by_tokens_equal_the_whole_batch():
    """As many images at a time as their tokens allow, among them one that has too many."""
    batch = double(tiny_batch(9))
    results, rows, sizes = [], [], []
    for limit in (None, 29):
        model = tiny_model().double()
        train_step = create_step(model, config(chunk_tokens=limit))
        rows.append(train_step(batch, 0, 9))
        results.append(parameters(model))
    model.register_forward_pre_hook(lambda module, arguments: sizes.append(arguments[0:2]))
    train_step(batch, 1, 9)
    counts = [5 * len(images) + len(texts.tokens) for images, texts in sizes]
    assert len({len(images) for images, _ in sizes}) > 1 and sum(len(images) for images, _ in sizes) == 2 * 9
    assert all(count <= 29 or len(images) == 1 for count, (images, _) in zip(counts, sizes, strict=True))
    assert_same(results[1], results[0], 1e-12)
    torch.testing.assert_close(rows[1], rows[0], atol=1e-6, rtol=0)


def conditioned(**run) -> TrainingConfig:
    return replace(config(**run), loss=LossConfig(beta=0.2, conditioned_negatives=2, weights={"conditioned": 0.5}))


def test_micro_batches_by_tokens_have_the_same_other_pictures_in_both_passes():
    model, drawn = tiny_model(), []
    train_step = create_step(model, conditioned(chunk_tokens=45))
    model.register_forward_pre_hook(
        lambda module, given, options: drawn.append((len(given[0]), options["other_pictures"])), with_kwargs=True
    )
    train_step(tiny_batch(9), 4, 9)
    half = len(drawn) // 2
    assert half > 1 and drawn[:half] == drawn[half:] and len({tuple(others) for _, others in drawn}) > 1


@pytest.mark.parametrize("accumulation", ["grad_cache", "mean"])
def test_conditioned_negatives_of_micro_batches(accumulation):
    """The truth has one graph. Other pictures are of the same micro-batch, which may have too few of them, and the
    second pass of gradient caching has the same ones as the first."""
    batch, settings = double(tiny_batch(7)), conditioned(micro_batch_size=3, accumulation=accumulation)
    model, other = tiny_model().double(), tiny_model().double()
    train_step, drawn = create_step(model, settings), []
    model.register_forward_pre_hook(lambda *given: drawn.append(given[2]["other_pictures"]), with_kwargs=True)
    row = dict(zip(train_step.columns, train_step(batch, 4, 7), strict=True))
    passes = 2 if accumulation == "grad_cache" else 1
    assert drawn == drawn[:3] * passes and len(drawn) == 3 * passes
    bounds = [0, 2, 4, 7]
    outs = [
        other(batch.images[lo:hi], batch.texts.of_images(lo, hi), 3, shifts)
        for lo, hi, shifts in zip(bounds, bounds[1:], drawn, strict=False)
    ]
    objective = Objective(settings.loss)
    if accumulation == "grad_cache":
        whole = {name: torch.cat([out[name] for out in outs]) if t.dim() else t for name, t in outs[0].items()}
        losses = objective(whole)
    else:
        each = [objective(out) for out in outs]
        losses = {name: torch.stack([found[name] for found in each]).mean() for name in each[0]}
    losses["loss"].backward()
    for name in ("loss", "beta_cal_loss", "conditioned_loss", "leak"):
        assert row[name].item() == pytest.approx(losses[name].item(), abs=1e-6), name
    norm = torch.stack([p.grad.norm() for name, p in other.named_parameters() if name.startswith("pool.")]).norm()
    assert row["norm_pool"].item() == pytest.approx(norm.item())
    assert losses["conditioned_loss"] > 0


def test_other_pictures():
    """Different ones, from all of the batch, that change with the seed; 0 for those that there are not."""
    assert other_pictures(9, 3, seed=5) == other_pictures(9, 3, seed=5)
    drawn = [other_pictures(9, 3, seed) for seed in range(60)]
    assert all(len(set(one)) == 3 and set(one) <= set(range(1, 9)) for one in drawn)
    assert {number for one in drawn for number in one} == set(range(1, 9))
    assert sorted(other_pictures(3, 4, 0)) == [0, 0, 1, 2]
    assert [other_pictures(images, 2, 0) for images in (0, 1)] == [[0, 0], [0, 0]] and other_pictures(5, 0, 0) == []


def test_conditioned_negatives_depend_on_seed_and_step():
    batch, drawn = tiny_batch(6), []
    for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        model = tiny_model()
        train_step = create_step(model, conditioned(seed=seed))
        model.register_forward_pre_hook(
            lambda *given: drawn.append(tuple(given[2]["other_pictures"])), with_kwargs=True
        )
        state = torch.get_rng_state()
        train_step(batch, step, 6)
        assert torch.equal(torch.get_rng_state(), state)  # nor do they take random numbers from dropout
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3


def flair(sampled: int | None = None, **run: Any) -> TrainingConfig:
    """FLAIR's objective."""
    weights = {"multi_positive": 0.5, "text_conditioned": 0.5}
    loss = LossConfig(global_weight=0, beta_cal_weight=0, sampled_pictures=sampled, weights=weights)
    return replace(config(**run), loss=loss)


@pytest.mark.parametrize("sampled", [None, 1, 5])
@pytest.mark.parametrize("micro_batch_size", [3, 6])
def test_flair_draws_again_what_it_drew(micro_batch_size, sampled):
    """One loss over all micro-batches, each with texts of its own pictures: the gradients of one graph."""
    batch, model = double(tiny_batch(6)), tiny_model(init_logit_bias=-4.0).double()
    train_step = create_step(model, flair(sampled, micro_batch_size=micro_batch_size))
    row = dict(zip(train_step.columns, train_step(batch, 1, 6).tolist(), strict=True))
    other = tiny_model(init_logit_bias=-4.0).double()
    other.logit_bias.requires_grad_()
    count = sampled or micro_batch_size - 1
    outs = []
    for i, begin in enumerate(range(0, 6, micro_batch_size)):
        part = batch.of_images(begin, begin + micro_batch_size)
        drawn = texts_of_others(part.texts, 3, count, mix(0, 1, 0, i))
        outs.append(other(part.images, part.texts, 3, other_texts=drawn))
        assert outs[-1]["scores"].shape == (micro_batch_size, 3 + count)
    out = {name: torch.cat([o[name] for o in outs]) if t.dim() else t for name, t in outs[0].items()}
    given = {"logit_bias": out["logit_bias"]}
    first = multi_positive_loss(
        out["image_embeds"], out["text_embeds"], out["logit_scale"], mask=out["mask"], gather=False, **given
    )
    own = torch.zeros_like(out["scores_mask"])
    own[:, :3] = True
    second = text_conditioned_loss(out["scores"], own, out["logit_scale"], mask=out["scores_mask"], **given)
    ((first + second) / 2).backward()
    assert row["multi_positive_loss"] == pytest.approx(first.item())
    assert row["text_conditioned_loss"] == pytest.approx(second.item())
    assert row["loss"] == pytest.approx((first + second).item() / 2)
    gradients = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert "logit_bias" in {name.rpartition(".")[2] for name in gradients} and "pool.logit_scale" not in gradients
    for part in ("pool", "backbone"):
        norms = [g.norm() for name, g in gradients.items() if name.startswith("pool.") == (part == "pool")]
        assert row[f"norm_{part}"] == pytest.approx(torch.stack(norms).norm().item())


def test_texts_of_others():
    """One for each other image that has any, each of its texts in turn, none of the image's own."""
    texts = tiny_batch(5).texts  # 1, 2, 3, 1, 2 texts
    drawn = torch.stack([texts_of_others(texts, 3, 4, seed) for seed in range(40)])
    assert drawn.shape == (40, 5, 4) and torch.equal(drawn[7], texts_of_others(texts, 3, 4, 7))
    for image in range(5):
        others = drawn[:, image] // 3
        assert all(sorted(one) == [j for j in range(5) if j != image] for one in others.tolist())
    exist = {3 * b + k for b, count in enumerate(texts.counts.tolist()) for k in range(count)}
    assert set(drawn.flatten().tolist()) == exist
    assert (texts_of_others(texts, 3, 6, 0) < 0).sum(1).tolist() == [2] * 5
    some = RaggedTexts.of([[[1]], [], [[2], [3]]])
    assert [sorted(row) for row in (texts_of_others(some, 2, 2, 0) // 2).tolist()][1] == [0, 2]
    assert (texts_of_others(some, 2, 2, 0)[[0, 2]] < 0).sum(1).tolist() == [1, 1]
    assert [texts_of_others(RaggedTexts.of([[[1]]] * n), 1, 2, 0).tolist() for n in (0, 1)] == [[], [[-1, -1]]]


def test_flair_step_without_images():
    """A rank whose share was bad still takes part, with gradients of zero."""
    batch, model = tiny_batch(0), tiny_model(init_logit_bias=-4.0)
    train_step = create_step(model, flair())
    row = dict(zip(train_step.columns, train_step(batch, 0, 1).tolist(), strict=True))
    assert row["loss"] == 0 and row["norm_pool"] == 0


def test_accumulation_is_the_mean_of_losses():
    batch = double(tiny_batch(6))
    model = tiny_model().double()
    row = create_step(model, config(micro_batch_size=3, accumulation="mean"))(batch, 0, 6)
    losses, other = [], tiny_model().double()
    objective = Objective(config().loss)
    for begin in (0, 3):
        part = batch.of_images(begin, begin + 3)
        loss = objective(other(part.images, part.texts))["loss"]
        (loss / 2).backward()
        losses.append(loss.item())
    assert row[0].item() == pytest.approx(sum(losses) / 2)
    norm = torch.stack([p.grad.norm() for n, p in other.named_parameters() if not n.startswith("pool.")]).norm()
    assert row[5].item() == pytest.approx(norm.item())


@pytest.mark.parametrize("form", ["ce", "bce"])
@pytest.mark.parametrize(("accumulation", "bounds"), [("mean", [0, 2, 4, 6]), ("grad_cache", [0, 6])])
def test_published_padding(form, accumulation, bounds):
    """Texts are padded to those of the images that one loss contrasts: of a micro-batch, or of all."""
    batch, losses = double(tiny_batch(6)), []
    other = tiny_model().double()
    for begin, end in pairwise(bounds):
        part = batch.of_images(begin, end)
        out = other(part.images, pad_as_published(part.texts, WORDS - 1))
        assert not out["mask"].all() and out["text_embeds"].any(-1).all()
        embeds = out["pooled_embeds"], out["text_embeds"], out["pool_logit_scale"]
        losses.append(BetaCALLoss(form, padding="published")(*embeds, mask=out["mask"]))
    torch.stack(losses).mean().backward()
    settings = config(micro_batch_size=2, accumulation=accumulation)
    loss = LossConfig(form, global_weight=0.0, padding="published")
    rows = []
    for one in (loss, replace(loss, padding="ignore")):
        train_step = create_step(tiny_model().double(), replace(settings, loss=one))
        rows.append(dict(zip(train_step.columns, train_step(batch, 0, 6).tolist(), strict=True)))
    assert rows[0]["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    norm = torch.stack([p.grad.norm() for name, p in other.named_parameters() if name.startswith("pool.")]).norm()
    assert rows[0]["norm_pool"] == pytest.approx(norm.item(), rel=1e-6)
    assert rows[1]["loss"] != pytest.approx(rows[0]["loss"], rel=0.01)


def test_global_loss_alone():
    """Only captions are encoded, and the pooling block stays as it is."""
    batch = tiny_batch(5)
    model = tiny_model()
    before = parameters(model)
    train_step = create_step(model, replace(config(), loss=LossConfig(beta_cal_weight=0.0)))
    encoded = []
    model.register_forward_pre_hook(lambda module, arguments: encoded.append(arguments[1]))
    train_step(batch, 0, 5)
    assert train_step.columns == ["loss", "global_loss", "logit_scale", "pool_logit_scale", "norm_backbone"]
    assert len(encoded[0].lengths) == 5 < len(batch.texts.lengths)
    changed = {name for name, p in parameters(model).items() if not torch.equal(p, before[name])}
    assert changed and not any(name.startswith("pool.") for name in changed)


def test_beta_cal_alone():
    model = tiny_model()
    before = model.logit_scale.item()
    train_step = create_step(model, replace(config(), loss=LossConfig(global_weight=0.0)))
    train_step(tiny_batch(5), 0, 5)
    assert "global_loss" not in train_step.columns and model.logit_scale.item() == before


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_bias_of_the_sigmoid_form(micro_batch_size):
    """It is added to β-CAL's logits and trained."""
    batch, model = tiny_batch(5), tiny_model(init_logit_bias=-2.0)
    loss = LossConfig("bce")
    with torch.no_grad():
        out = model(batch.images, batch.texts)
        embeds = out["pooled_embeds"], out["text_embeds"], out["pool_logit_scale"]
        truth = BetaCALLoss("bce")(*embeds, mask=out["mask"], logit_bias=-2.0).item()
        assert abs(truth - BetaCALLoss("bce")(*embeds, mask=out["mask"]).item()) > 0.01
    train_step = create_step(model, replace(config(micro_batch_size=micro_batch_size), loss=loss))
    row = dict(zip(train_step.columns, train_step(batch, 0, 5).tolist(), strict=True))
    assert row["beta_cal_loss"] == pytest.approx(truth, rel=1e-5)
    assert model.logit_bias is not None and model.logit_bias.item() != -2.0


@pytest.mark.parametrize("loss", [LossConfig("ce"), LossConfig("bce", beta_cal_weight=0.0)], ids=["ce", "global"])
def test_bias_that_no_loss_needs(loss):
    """It is frozen, and changes nothing."""
    batch, model = tiny_batch(5), tiny_model(init_logit_bias=-2.0)
    train_step = create_step(model, replace(config(), loss=loss))
    row = train_step(batch, 0, 5)
    assert model.logit_bias is not None and model.logit_bias.item() == -2.0
    assert torch.equal(row, create_step(tiny_model(), replace(config(), loss=loss))(batch, 0, 5))


def test_scales_are_clamped():
    model = tiny_model()
    train_step = create_step(
        model, replace(config(), optimizer=replace(OPTIMIZER, backbone=GroupConfig(9.0, 9.0, warmup=0)))
    )
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
    for step in range(3):
        row = train_step(tiny_batch(5), step, 5)
    assert 1 <= row[3].item() <= 100.001 and 0 <= model.logit_scale.item() <= 4.6052


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_update_that_is_not_finite_is_left_out(precision):
    """Parameters, moments and their step count stay; the next train_step is as if it had not been."""
    model, other = tiny_model(), tiny_model()
    train_step, truth = (create_step(m, config(precision=precision)) for m in (model, other))
    if precision == "fp16":
        for u in (train_step, truth):
            u.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    bad = tiny_batch(5)
    bad.images[2, 0, 0, 0] = torch.nan
    rows = [train_step(tiny_batch(5), 0, 5), train_step(bad, 1, 5), train_step(tiny_batch(5), 1, 5)]
    assert rows[0].isfinite().all() and rows[1][0].isnan() and rows[2].isfinite().all()
    for step in range(2):
        truth(tiny_batch(5), step, 5)
    # The scaler halves its scale after the bad one, which changes the rounding of numbers near 0.
    assert_same(parameters(model), parameters(other), 0 if precision == "fp32" else 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision(precision):
    """Near float32's losses and norms, with parameters that stay float32."""
    truth = create_step(tiny_model(), config())(tiny_batch(6), 0, 6)
    model = tiny_model()
    train_step = create_step(model, config(precision=precision, micro_batch_size=4))
    if precision == "fp16":
        assert train_step.scaler.is_enabled()
        train_step.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)  # the usual 2¹⁶ may overflow in a first step
    row = train_step(tiny_batch(6), 0, 6)
    torch.testing.assert_close(row, truth, atol=0, rtol=0.1 if precision == "bf16" else 0.02)
    assert not torch.equal(row[:3], truth[:3])
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def create_step_of_rank(model: BetaCLIP, settings: TrainingConfig) -> TrainStep:
    group, objective = ProcessGroup.of(), Objective(settings.loss, several_ranks=True)
    freeze(model, settings, objective)
    wrapped = parallel.wrap(model, settings.run.parallel, group)
    return TrainStep(model, wrapped, objective, create_optimizer(model, settings.optimizer), settings, group, 10)


def ranks_equal_one_process(how: str, cases: list[str]) -> None:
    for case in cases:
        rank_equals_one_process(how, case)
        dist.barrier()


def rank_equals_one_process(how: str, case: str) -> None:
    """Two updates of a batch of 7 on 2 ranks, of which one may have nothing left, against one process."""
    group, whole = ProcessGroup.of(), double(tiny_batch(7))
    share = group.shard_range(7)
    part = whole.of_images(share.start, share.stop)
    if case == "empty":  # all of the second rank's part was bad
        whole = whole.of_images(0, 3)
        if group.rank == 1:
            part = Batch(torch.empty(0, 3, 0, 0, dtype=torch.float64), whole.texts.of_images(0, 0), [], [])
    options = {"init_logit_bias": -2.0} if "bias" in case else {}
    loss = LossConfig("bce" if case == "bias in bce" else "ce")
    model = tiny_model(**options).double()
    # By tokens, one rank has more micro-batches than the other.
    cached = {"micro_batch_size": 2}
    run = {"cached": cached, "locked": cached, "adapters": cached, "tokens": {"chunk_tokens": 20}}.get(case, {})
    trained = {
        "locked": {"lock": LockConfig(image=True, text=True, text_unlocked_layers=2, text_freeze_layer_norm=False)},
        "adapters": {"lora": LoraConfig(rank=2)},
    }.get(case, {})
    settings = replace(config(parallel=how, **run), loss=loss, **trained)
    train_step = create_step_of_rank(model, settings)
    rows = [train_step(part, step, 7) for step in range(2)]
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if group.is_first:
        one = tiny_model(**options).double()
        alone = create_step(one, replace(config(), loss=loss, **trained))
        truth = [alone(whole, step, 7) for step in range(2)]
        assert_same(state, one.state_dict(), 1e-11)
        torch.testing.assert_close(torch.stack(rows), torch.stack(truth), atol=2e-6, rtol=0)


@needs_gloo
@pytest.mark.parametrize(
    "how, cases",
    [
        ("ddp", ["whole", "cached", "tokens", "locked", "adapters", "empty", "bias in bce", "bias in ce"]),
        ("fsdp", ["cached", "tokens", "locked", "adapters", "empty", "bias in bce"]),
    ],
)
def test_ranks_equal_one_process(tmp_path, how, cases):
    processes(2, ranks_equal_one_process, tmp_path, how, cases)


def losses_of_each_rank_are_averaged() -> None:
    whole, settings = double(tiny_batch(7)), config()
    settings = replace(settings, loss=replace(settings.loss, gather="local"))
    parts = [whole.of_images(0, 3), whole.of_images(3, 7)]
    train_step = create_step_of_rank(tiny_model().double(), settings)
    row = dict(zip(train_step.columns, train_step(parts[ProcessGroup.of().rank], 0, 7).tolist(), strict=True))
    alone, one = Objective(config().loss), tiny_model().double()
    of_parts = [alone(one(part.images, part.texts))["beta_cal_loss"].item() for part in parts]
    assert row["beta_cal_loss"] == pytest.approx(sum(of_parts) / 2)
    assert row["global_loss"] == pytest.approx(alone(one(whole.images, whole.texts))["global_loss"].item())
    conditioned_negatives_of_all_ranks(whole, parts)
    settings = replace(settings, loss=replace(settings.loss, gather_global="published", beta_cal_weight=0.0))
    rows = []
    for loss in (settings.loss, replace(settings.loss, gather_global="auto")):
        train_step = create_step_of_rank(tiny_model().double(), replace(settings, loss=loss))
        rows.append(
            dict(zip(train_step.columns, train_step(parts[ProcessGroup.of().rank], 0, 7).tolist(), strict=True))
        )
    assert rows[0]["global_loss"] == pytest.approx(rows[1]["global_loss"], rel=1e-6)
    assert 0.1 < rows[0]["norm_backbone"] / rows[1]["norm_backbone"] < 0.8


def conditioned_negatives_of_all_ranks(whole: Batch, parts: list[Batch]) -> None:
    """One loss over the texts of all ranks, each with other pictures of its own rank."""
    settings, rank = conditioned(), ProcessGroup.of().rank
    train_step = create_step_of_rank(tiny_model().double(), settings)
    row = dict(zip(train_step.columns, train_step(parts[rank], 1, 7).tolist(), strict=True))
    one, drawn = tiny_model().double(), [other_pictures(n, 2, mix(0, 1, r, 0)) for r, n in enumerate((3, 4))]
    outs = [one(part.images, part.texts, 3, shifts) for part, shifts in zip(parts, drawn, strict=True)]
    out = {name: torch.cat([o[name] for o in outs]) if t.dim() else t for name, t in outs[0].items()}
    losses = Objective(settings.loss)(out)
    losses["loss"].backward()
    assert row["loss"] == pytest.approx(losses["loss"].item())
    assert row["conditioned_loss"] == pytest.approx(losses["conditioned_loss"].item())
    norm = torch.stack([p.grad.norm() for name, p in one.named_parameters() if name.startswith("pool.")]).norm()
    assert row["norm_pool"] == pytest.approx(norm.item())


@needs_gloo
def test_losses_of_each_rank_are_averaged(tmp_path):
    """β-CAL of the rank's own images as published, while the global loss is of all, in one of two ways."""
    processes(2, losses_of_each_rank_are_averaged, tmp_path)
