"""The terms of the training objective. A new term is a class in a file of its own, and a line in LOSS_TERMS."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from betaclip.losses.beta_cal import BetaCALLoss
from betaclip.losses.conditioned import conditioned_loss
from betaclip.losses.detached import detached_clip_loss
from betaclip.losses.flair import multi_positive_loss, text_conditioned_loss
from betaclip.losses.functional import beta_cal_ce_loss
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup
from betaclip.training.config import LossConfig
from betaclip.training.text_queue import TextQueue

_GATHER: dict[str, bool | str] = {"auto": True, "all_gather": "all_gather", "ring": "ring", "local": False}


class LossTerm(Protocol):
    """Computes an unweighted loss, (), from the outputs of a BetaCLIP.

    needs: names of the outputs that it reads. A part of the model behind outputs that no term needs is frozen.
    captions_only: it reads the first text of each image only. If all terms do, no other text is encoded.
    """

    needs: frozenset[str]
    captions_only: bool

    def __call__(self, out: dict[str, Tensor]) -> Tensor: ...


@runtime_checkable
class Measures(Protocol):
    """A loss term that also measures something, which is logged beside the losses.

    metrics: the names of the values. measure: the values, () each, from the outputs of a BetaCLIP.
    """

    metrics: tuple[str, ...]

    def measure(self, out: dict[str, Tensor]) -> dict[str, Tensor]: ...


@runtime_checkable
class Remembers(Protocol):
    """A loss term that keeps something between updates, which is saved in checkpoints.

    state: tensors by name, the same on every rank; a collective. restore: takes a state, also that of another number of
    ranks.
    """

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None: ...


class GlobalLoss:
    """CLIP's loss between whole images (CLS) and captions, always over all ranks."""

    needs = frozenset({"image_embeds", "text_embeds", "text_ids", "mask", "logit_scale"})
    captions_only = True

    def __init__(self, config: LossConfig, several_ranks: bool) -> None:
        self.backend, self.strict = config.backend, config.strict
        self.gather = several_ranks and (_GATHER[config.gather] or True)
        self.detached = several_ranks and config.gather_global == "published"
        self.left_out = config.equal_texts == "left_out"

    def __call__(self, out: dict[str, Tensor]) -> Tensor:
        if self.detached:
            return detached_clip_loss(
                out["image_embeds"], out["text_embeds"][:, 0], out["logit_scale"], ProcessGroup.of(),
                mask=out["mask"][:, 0], backend=self.backend, strict=self.strict,
            )  # fmt: skip
        # K = 1 with a mask, which ClipLoss does not take: an image may have no text at all.
        return beta_cal_ce_loss(
            out["image_embeds"].unsqueeze(1), out["text_embeds"][:, :1], out["logit_scale"], beta=0.0,
            mask=out["mask"][:, :1], text_ids=out["text_ids"][:, :1] if self.left_out else None,
            backend=self.backend, gather=self.gather, strict=self.strict,
        )  # fmt: skip


class BetaCALTerm:
    """β-CAL between text-conditioned images and all texts, the sigmoid form with the model's bias if it has one."""

    captions_only = False

    def __init__(self, config: LossConfig, several_ranks: bool) -> None:
        gather = several_ranks and _GATHER[config.gather]
        outputs = {"pooled_embeds", "text_embeds", "text_ids", "mask", "pool_logit_scale"}
        # In the softmax form a bias cancels.
        self.needs = frozenset(outputs | {"logit_bias"} if config.form == "bce" else outputs)
        self.left_out = config.equal_texts == "left_out"
        self.loss = BetaCALLoss(
            config.form, config.beta, config.alpha, padding=config.padding, backend=config.backend, gather=gather,
            strict=config.strict,
        )  # fmt: skip
        group = ProcessGroup.of() if several_ranks else SINGLE_PROCESS
        self.queue = TextQueue(config.text_queue, group) if config.text_queue else None

    def __call__(self, out: dict[str, Tensor]) -> Tensor:
        texts, mask = out["text_embeds"], out["mask"]
        options = {} if self.queue is None else self.queue.given(texts, with_ids=self.left_out)
        if self.left_out:
            options["text_ids"] = out["text_ids"]
        loss: Tensor = self.loss(
            out["pooled_embeds"], texts, out["pool_logit_scale"], mask=mask, logit_bias=out.get("logit_bias"), **options
        )
        if self.queue is not None:
            self.queue.add(texts, mask, out["text_ids"])
        return loss

    def state(self) -> dict[str, Tensor]:
        return {} if self.queue is None else self.queue.state()

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        if self.queue is not None and state:
            self.queue.restore(state, device)


class ConditionedTerm:
    """Other pictures under the same text as negatives: what they add to β-CAL in its form, as a term of its own.

    The metric ``leak`` is the share of texts that are nearer than all different ones of the batch to the embedding that
    they pool from a picture that is not theirs.
    """

    captions_only = False
    metrics = ("leak",)

    def __init__(self, config: LossConfig, several_ranks: bool) -> None:
        outputs = {"pooled_embeds", "text_embeds", "mask", "pool_logit_scale", "conditioned_negatives"}
        outputs |= {"conditioned_mask", "conditioned_leak"}
        self.needs = frozenset(outputs | {"logit_bias"} if config.form == "bce" else outputs)
        self.form, self.padding = config.form, config.padding
        self.group = ProcessGroup.of() if several_ranks and config.gather != "local" else None

    def __call__(self, out: dict[str, Tensor]) -> Tensor:
        return conditioned_loss(
            out["pooled_embeds"], out["text_embeds"], out["pool_logit_scale"],
            out["conditioned_negatives"], out["conditioned_mask"],
            form=self.form, mask=out["mask"], logit_bias=out.get("logit_bias"), padding=self.padding, group=self.group,
        )  # fmt: skip

    def measure(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        asked = out["conditioned_mask"][:, :, :1].sum()
        return {"leak": out["conditioned_leak"].sum() / asked.clamp_min(1)}


class MultiPositiveTerm:
    """FLAIR's sigmoid loss between whole images (CLS) and all texts, those of the image being positives."""

    needs = frozenset({"image_embeds", "text_embeds", "mask", "logit_scale", "logit_bias"})
    captions_only = False

    def __init__(self, config: LossConfig, several_ranks: bool) -> None:
        gather = several_ranks and _GATHER[config.gather]
        self.options: Any = {"backend": config.backend, "strict": config.strict, "gather": gather}

    def __call__(self, out: dict[str, Tensor]) -> Tensor:
        return multi_positive_loss(
            out["image_embeds"], out["text_embeds"], out["logit_scale"],
            logit_bias=out.get("logit_bias"), mask=out["mask"], **self.options,
        )  # fmt: skip


class TextConditionedTerm:
    """FLAIR's sigmoid loss of pictures with their own texts and with one text of each of some other pictures, each from
    its cosine with what it pools from the picture."""

    needs = frozenset({"scores", "scores_mask", "mask", "logit_scale", "logit_bias"})
    captions_only = False

    def __init__(self, config: LossConfig, several_ranks: bool) -> None:
        self.group = ProcessGroup.of() if several_ranks and config.gather != "local" else None

    def __call__(self, out: dict[str, Tensor]) -> Tensor:
        scores = out["scores"]
        own = (torch.arange(scores.shape[1], device=scores.device) < out["mask"].shape[1]).expand(scores.shape)
        return text_conditioned_loss(
            scores, own, out["logit_scale"],
            logit_bias=out.get("logit_bias"), mask=out["scores_mask"], group=self.group,
        )  # fmt: skip


# By name: a term's weight is loss.NAME_weight or loss.weights' NAME, its value is logged as NAME_loss. Made from the
# settings and whether there are several ranks.
LOSS_TERMS: dict[str, Callable[[LossConfig, bool], LossTerm]] = {
    "global": GlobalLoss,
    "beta_cal": BetaCALTerm,
    "conditioned": ConditionedTerm,
    "multi_positive": MultiPositiveTerm,
    "text_conditioned": TextConditionedTerm,
}
