"""One update: forward and backward of a batch in micro-batches, gradient norms, AdamW, scales."""

from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise

import nvtx
import torch
from torch import Tensor, nn

from betaclip.data.batches import Batch
from betaclip.model.beta_clip import BetaCLIP
from betaclip.process_group import ProcessGroup
from betaclip.training.config import TrainingConfig
from betaclip.training.gradient_cache import cached_backward
from betaclip.training.objective import Objective, captions
from betaclip.training.optimizers import clip_gradients, set_learning_rates
from betaclip.training.parallel import finish_gradients, no_sync

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSSES = ("loss", "global_loss", "beta_cal_loss")

_range = partial(nvtx.annotate, domain="betaclip")


def create_objective(config: TrainingConfig, process_group: ProcessGroup) -> Objective:
    loss, several = config.loss, process_group.size > 1
    ways: dict[str, bool | str] = {"auto": True, "all_gather": "all_gather", "ring": "ring", "false": False}
    gather = several and ways[loss.gather]
    return Objective(
        loss.form, loss.beta, loss.alpha, loss.global_weight, loss.beta_cal_weight,
        gather=gather, gather_global=gather or several, backend=loss.backend,
    )  # fmt: skip


def freeze_unused(model: BetaCLIP, objective: Objective) -> None:
    """What no loss reaches must not wait for a gradient, nor be decayed."""
    if not objective.beta_cal_weight:
        model.pool.requires_grad_(False)
    if not objective.global_weight:
        model.logit_scale.requires_grad_(False)


class TrainStep:
    """Called with each batch in turn.

    Nothing here waits for the device. An update whose losses or gradients are not finite is left out on the device
    itself: the fused AdamW takes a flag for that (PyTorch's gradient scaler's own protocol), and all ranks have the
    same flag, because gradients and losses are averaged over them. The host learns of it when it reads the row.

    wrapped: what to call in place of ``model``, for gradients to be reduced over ranks.
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
        self._device = model.logit_scale.device
        dtype = DTYPES[config.run.precision]
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=dtype == torch.float16)
        self._dtype = dtype
        weights = {"global_loss": objective.global_weight, "beta_cal_loss": objective.beta_cal_weight}
        self._losses = [name for name in LOSSES if weights.get(name, 1)]
        trained = {group["part"] for group in optimizer.param_groups}
        self._norms = [part for part in ("backbone", "pool") if part in trained]
        self.columns = [*self._losses, "logit_scale", "pool_logit_scale", *(f"norm_{part}" for part in self._norms)]
        # The gradient scaler looks for its scale by trying: gradients that overflow are its daily business.
        self.must_be_finite = self._losses if self.scaler.is_enabled() else self.columns

    def __call__(self, batch: Batch, step: int, images: int) -> Tensor:
        """Update ``step`` = 0 ... from this rank's part of a batch of ``images`` over all ranks.

        Returns:
            (columns,) losses, averaged over ranks; scales; norms of gradients before clipping. On the device.
        """
        set_learning_rates(self.optimizer, step, self.steps, self.config.optimizer)
        losses = self._backward(batch, images)
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

    def _backward(self, batch: Batch, images: int) -> Tensor:
        """(losses,) unscaled, of this rank; gradients are accumulated."""
        if not len(batch.images):  # all of it was bad, and the other ranks wait for this one's part of the gradients
            size = self.model.image_size
            batch = Batch(batch.images.new_empty(0, 3, size, size), batch.texts, [], [])
        if not self.objective.beta_cal_weight:
            batch = Batch(batch.images, captions(batch.texts), batch.paths, batch.bad)
        micro_batches = self._micro_batches(batch, images)
        width = max(1, batch.texts.max_texts_per_image)
        seen: list[Tensor] = []

        def forward(micro_batch: Batch) -> dict[str, Tensor]:
            with self._autocast():  # left before the next pass: it keeps the weights that it has cast
                return self.wrapped(micro_batch.to(self._device).images, micro_batch.texts, width)

        def loss(out: dict[str, Tensor]) -> Tensor:
            with _range("loss"), self._autocast():
                losses = self.objective(out)
            seen.append(torch.stack([losses[name].detach().float() for name in self._losses]))
            return self.scaler.scale(losses["loss"])

        if self.config.run.accumulation == "grad_cache":
            with _range("forward and backward"):
                cached_backward(forward, micro_batches, loss, no_sync=partial(no_sync, self.wrapped))
            return seen[0]
        for micro_batch in micro_batches[:-1]:
            with no_sync(self.wrapped), _range("forward and backward"):
                (loss(forward(micro_batch)) / len(micro_batches)).backward()
        with _range("forward and backward"):
            (loss(forward(micro_batches[-1])) / len(micro_batches)).backward()
        return torch.stack(seen).mean(0)

    def _micro_batches(self, batch: Batch, images: int) -> list[Batch]:
        """Parts of about the same number of images. As many on every rank, for each may be a collective, whatever bad
        data has taken from a rank's part; some may be empty."""
        count = -(-self._most(images) // (self.config.run.micro_batch_size or self._most(images)))
        bounds = [len(batch.paths) * i // count for i in range(count + 1)]
        return [batch.of_images(begin, end) for begin, end in pairwise(bounds)]

    def _most(self, images: int) -> int:
        """Images of the rank that has the most."""
        return -(-images // self.process_group.size)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)
