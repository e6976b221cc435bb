"""One update: forward and backward of a batch in micro-batches, gradient norms, AdamW, scales."""

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import nvtx
import torch
from torch import Tensor, nn

from betaclip.data.batches import Batch
from betaclip.data.padding import pad_as_published
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.texts import RaggedTexts
from betaclip.process_group import ProcessGroup
from betaclip.training.config import TrainingConfig
from betaclip.training.gradient_cache import cached_backward
from betaclip.training.micro_batches import token_bounds, tokens_per_image
from betaclip.training.objective import Objective, captions
from betaclip.training.optimizers import PARTS, clip_gradients, set_learning_rates
from betaclip.training.parallel import finish_gradients, no_sync
from betaclip.training.sampler import mix

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_range = partial(nvtx.annotate, domain="betaclip")


def other_pictures(images: int, count: int, seed: int) -> list[int]:
    """Draw ``count`` different numbers from 1 to images - 1; 0 stands for each that there is not."""
    random = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randperm(max(images - 1, 0), generator=random, device="cpu")[:count] + 1
    return drawn.tolist() + [0] * (count - len(drawn))


def texts_of_others(texts: RaggedTexts, slots: int, pictures: int, seed: int) -> Tensor:
    """For each of B images a random text of each of ``pictures`` others, (B, pictures) int64 numbers of slots, of which
    each image has ``slots``; -1 for each other that there is not, or that has no text."""
    images = torch.arange(texts.num_images, device="cpu")
    shifts = torch.tensor(other_pictures(len(images), pictures, seed), dtype=torch.int64, device="cpu")
    other = (images[:, None] + shifts) % max(len(images), 1)
    random, counts = torch.Generator("cpu").manual_seed(mix(seed, len(images))), texts.counts[other]
    text = (torch.rand(other.shape, generator=random, device="cpu") * counts).long()
    return torch.where((shifts > 0) & (text < counts), other * slots + text, -1)


class TrainStep:
    """One update of the model; called with each batch in turn.

    Nothing here waits for the device. An update whose losses or gradients are not finite is skipped on the device
    itself: the fused AdamW takes a flag for that (the protocol of PyTorch's gradient scaler), and all ranks have the
    same flag, because gradients and losses are averaged over them. The host learns of it when it reads the row.

    Args:
        wrapped: called in place of ``model``, to reduce gradients over ranks.
        steps: of the whole run, for the learning rates' schedules.
    """

    def __init__(
        self,
        model: BetaCLIP,
        wrapped: nn.Module,
        objective: Objective,
        optimizer: torch.optim.AdamW,
        config: TrainingConfig,
        process_group: ProcessGroup,
        steps: int,
    ) -> None:
        self.model, self.wrapped, self.objective, self.optimizer = model, wrapped, objective, optimizer
        self.config, self.process_group, self.steps = config, process_group, steps
        self._device, self._dtype = model.logit_scale.device, DTYPES[config.run.precision]
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=self._dtype == torch.float16)
        trained = {group["part"] for group in optimizer.param_groups}
        self._norms = [part for part in PARTS if part in trained]
        self.columns = [*objective.names, "logit_scale", "pool_logit_scale", *(f"norm_{part}" for part in self._norms)]
        # GradScaler finds its scale by overflowing, so gradients may be non-finite.
        self.must_be_finite = objective.names if self.scaler.is_enabled() else self.columns

    def __call__(self, batch: Batch, step: int, images: int) -> Tensor:
        """Update ``step`` = 0 ... from this rank's share of a batch of ``images`` over all ranks.

        Returns:
            (columns,) losses, averaged over ranks; scales; norms of gradients before clipping. On the device.
        """
        set_learning_rates(self.optimizer, step, self.steps, self.config.optimizer)
        losses = self._backward(batch, step, images)
        with _range("optimiser"):
            finish_gradients(self.wrapped, self.process_group)
            self.scaler.unscale_(self.optimizer)
            norms = clip_gradients(self.optimizer, self.config.optimizer)
            scales = [s.detach().exp() for s in (self.model.logit_scale, self.model.pool.logit_scale)]
            row = torch.stack([*self.process_group.mean_(losses), *scales, *(norms[part] for part in self._norms)])
            if not self.scaler.is_enabled():
                self.optimizer.found_inf = (~row.isfinite().all()).float()  # type: ignore[attr-defined]
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.model.clamp_scales_()
            self.optimizer.zero_grad()
        return row

    def _backward(self, batch: Batch, step: int, images: int) -> Tensor:
        """(losses,) unscaled, of this rank; gradients are accumulated."""
        if not len(batch.images):  # all of it was bad, but the other ranks wait for this one's share of the gradients
            size = self.model.image_size
            batch = Batch(batch.images.new_empty(0, 3, size, size), batch.texts, [], [])
        if self.objective.captions_only:
            batch = replace(batch, texts=captions(batch.texts))
        # Images that one loss contrasts have the same number of slots: those of the share, or of a micro-batch.
        cached = self.config.run.accumulation == "grad_cache"
        if cached:
            batch = self._padded(batch)
        micro_batches = self._micro_batches(batch, images)
        if not cached:
            micro_batches = [self._padded(micro_batch) for micro_batch in micro_batches]
        parts = self._with_options(micro_batches, max(1, batch.texts.max_texts_per_image) if cached else None, step)
        losses: list[Tensor] = []

        def forward(part: tuple[Batch, dict[str, Any]]) -> dict[str, Tensor]:
            micro_batch, options = part
            # Autocast ends before the next pass: while it lasts, it keeps the weights that it has cast.
            with self._autocast():
                return self.wrapped(micro_batch.to(self._device).images, micro_batch.texts, **options)

        def loss(out: dict[str, Tensor]) -> Tensor:
            with _range("loss"), self._autocast():
                found = self.objective(out)
            losses.append(torch.stack([found[name].detach().float() for name in self.objective.names]))
            return self.scaler.scale(found["loss"])

        if cached:
            with _range("forward and backward"):
                cached_backward(forward, parts, loss, no_sync=partial(no_sync, self.wrapped))
            return losses[0]
        for part in parts[:-1]:
            with no_sync(self.wrapped), _range("forward and backward"):
                (loss(forward(part)) / len(parts)).backward()
        with _range("forward and backward"):
            (loss(forward(parts[-1])) / len(parts)).backward()
        return torch.stack(losses).mean(0)

    def _padded(self, batch: Batch) -> Batch:
        if self.config.loss.padding == "ignore":
            return batch
        return replace(batch, texts=pad_as_published(batch.texts, self.model.end_token))

    def _micro_batches(self, batch: Batch, images: int) -> list[Batch]:
        """Parts with about the same number of images, or with at most ``chunk_tokens``. Each may be a collective, so
        that all ranks have the same number of parts whatever their shares hold; some parts may be empty."""
        run = self.config.run
        if run.chunk_tokens is None:
            largest_share = -(-images // self.process_group.size)
            count = -(-largest_share // (run.micro_batch_size or largest_share))
            bounds = [len(batch.paths) * i // count for i in range(count + 1)]
        else:
            rows, columns = self.model.patch_grid
            bounds = token_bounds(tokens_per_image(batch, rows * columns), run.chunk_tokens)
            count = int(self.process_group.max(torch.tensor(len(bounds), device="cpu")))
            bounds += [len(batch.paths)] * (count - len(bounds))
        return [batch.of_images(begin, end) for begin, end in pairwise(bounds)]

    def _with_options(
        self, micro_batches: list[Batch], slots: int | None, step: int
    ) -> list[tuple[Batch, dict[str, Any]]]:
        """Each with the options of its forward. What is drawn depends on nothing but the seed and the place in the run:
        a second pass and a resumed run draw the same.

        slots: the number of texts for which each image gets room; None for as many as the micro-batch needs.
        """
        pooled, scored = (self.objective.needs(output) for output in ("pooled_embeds", "scores"))
        most = max(len(micro_batch.images) for micro_batch in micro_batches)
        sampled = self.config.loss.sampled_pictures or max(0, most - 1)
        parts = []
        for i, part in enumerate(micro_batches):
            seed = mix(self.config.run.seed, step, self.process_group.rank, i)
            others = other_pictures(len(part.images), self.objective.conditioned_negatives, seed)
            room = slots or max(1, part.texts.max_texts_per_image)
            options = {"texts_per_image": room, "other_pictures": others, "pooled": pooled}
            if scored:
                options["other_texts"] = texts_of_others(part.texts, room, sampled, seed)
            parts.append((part, options))
        return parts

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)
