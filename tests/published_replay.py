"""Replays a record of the released training loop with the trainer's own update."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from betaclip.data.batches import CAPTION, PHRASE, SENTENCE, Batch
from betaclip.model.texts import RaggedTexts
from betaclip.process_group import SINGLE_PROCESS
from betaclip.published import load_published
from betaclip.training.config import GroupConfig, LossConfig, OptimizerConfig, RunConfig, TrainingConfig
from betaclip.training.freezing import freeze
from betaclip.training.objective import Objective
from betaclip.training.optimizers import create_optimizer
from betaclip.training.step import TrainStep

COLUMNS = ("global_loss", "beta_cal_loss", "logit_scale", "pool_logit_scale")


def replay(path: str | Path, form: str) -> Tensor:
    """Train on the batches of a record, from its weights and at its learning rates, in float32 on the CPU.

    The trainer gets the texts that exist; it pads them itself.

    Args:
        path: a safetensors file. Its tensors are ``state.NAME``, the initial weights in the published layout; for each
            update I, ``batch.I.images`` (B, 3, H, W), the tokens ``batch.I.captions_and_sentences`` (B, S, L) and
            ``batch.I.phrases`` (B, P, L'), ``batch.I.caption_and_sentence_mask`` (B, S) and ``batch.I.phrase_mask``
            (B, P), True for a text; ``lr.backbone`` and ``lr.pool`` (updates,). Its metadata have ``head_width``.
        form: of β-CAL, "ce" or "bce".

    Returns:
        (updates, 4) float64 before each update: global loss, β-CAL, and the inverse temperatures of both.
    """
    with safe_open(path, framework="pt") as file:
        head_width = int(file.metadata()["head_width"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, for it is no dictionary
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, f"{folder}/weights.safetensors")
        model = load_published(f"{folder}/weights.safetensors", head_width=head_width)
    model.train()
    rates = torch.stack((tensors["lr.backbone"], tensors["lr.pool"]), 1).tolist()
    batches = [read_batch(tensors, update) for update in range(len(rates))]
    config = TrainingConfig(
        loss=LossConfig(form, padding="published"),  # type: ignore[arg-type]
        run=RunConfig(batch_size=len(batches[0].images), accumulation="mean"),
    )
    objective = Objective(config.loss)
    freeze(model, config, objective)
    optimizer = create_optimizer(model, config.optimizer)
    step = TrainStep(model, model, objective, optimizer, config, SINGLE_PROCESS, len(rates))
    columns = [step.columns.index(name) for name in COLUMNS]
    curve = []
    for update, (batch, (backbone, pool)) in enumerate(zip(batches, rates, strict=True)):
        constant = OptimizerConfig(GroupConfig(backbone, backbone, warmup=0), GroupConfig(pool, pool, warmup=0))
        step.config = replace(config, optimizer=constant)
        curve.append(step(batch, update, len(batch.images))[columns])
    return torch.stack(curve).double()


def read_batch(tensors: Mapping[str, Tensor], update: int) -> Batch:
    """The batch of an update with the texts that exist, each up to and including its end token."""
    images = tensors[f"batch.{update}.images"]
    texts: list[list[Tensor]] = [[] for _ in images]
    levels: list[list[int]] = [[] for _ in images]
    for block, mask, level in (
        ("captions_and_sentences", "caption_and_sentence_mask", SENTENCE),
        ("phrases", "phrase_mask", PHRASE),
    ):
        for image, (rows, valid) in enumerate(
            zip(tensors[f"batch.{update}.{block}"], tensors[f"batch.{update}.{mask}"], strict=True)
        ):
            texts[image] += [text_of(row) for row in rows[valid]]
            levels[image] += [level] * int(valid.sum())
    for one in levels:
        one[0] = CAPTION
    return Batch(images, RaggedTexts.of(texts, levels), [f"{update}/{i}" for i in range(len(images))], [])


def text_of(row: Tensor) -> Tensor:
    """The tokens of a row up to the first of its largest, where the released text tower reads it."""
    return row[: int(row.argmax()) + 1]
