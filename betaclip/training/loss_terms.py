"""The terms of the training objective. A new term is a class in a file of its own, and a line in LOSS_TERMS."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from betaclip.losses.beta_cal import BetaCALLoss, beta_cal_ce_loss
from betaclip.losses.conditioned import conditioned_loss
from betaclip.losses.detached import detached_clip_loss
from betaclip.process_group import ProcessGroup
from betaclip.training.config import LossConfig

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


class GlobalLoss:
    """CLIP's loss between whole images (CLS) and captions, always over all ranks."""

    needs = frozenset({"image_embeds", "text_embeds", "mask", "logit_scale"})
    captions_only = True

    def __init__(self, config: LossConfig, several_ranks: bool) -> None:
        self.backend = config.backend
        self.gather = several_ranks and (_GATHER[config.gather] or True)
        self.detached = several_ranks and config.gather_global == "published"

    def __call__(self, out: dict[str, Tensor]) -> Tensor:
        if self.detached:
            return detached_clip_loss(
                out["image_embeds"], out["text_embeds"][:, 0], out["logit_scale"], ProcessGroup.of(),
                mask=out["mask"][:, 0], backend=self.backend,
            )  # fmt: skip
        # K = 1 with a mask, which ClipLoss does not take: an image may have no text at all.
        return beta_cal_ce_loss(
            out["image_embeds"].unsqueeze(1), out["text_embeds"][:, :1], out["logit_scale"], beta=0.0,
            mask=out["mask"][:, :1], backend=self.backend, gather=self.gather,
        )  # fmt: skip


class BetaCALTerm:
    """β-CAL between text-conditioned images and all texts, the sigmoid form with the model's bias if it has one."""

    captions_only = False

    def __init__(self, config: LossConfig, several_ranks: bool) -> None:
        gather = several_ranks and _GATHER[config.gather]
        outputs = {"pooled_embeds", "text_embeds", "mask", "pool_logit_scale"}
        # In the softmax form a bias cancels.
        self.needs = frozenset(outputs | {"logit_bias"} if config.form == "bce" else outputs)
        self.loss = BetaCALLoss(
            config.form, config.beta, config.alpha, padding=config.padding, backend=config.backend, gather=gather
        )

    def __call__(self, out: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.loss(
            out["pooled_embeds"], out["text_embeds"], out["pool_logit_scale"],
            mask=out["mask"], logit_bias=out.get("logit_bias"),
        )  # fmt: skip
        return loss


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


# By name: a term's weight is loss.NAME_weight or loss.weights' NAME, its value is logged as NAME_loss. Made from the
# settings and whether there are several ranks.
LOSS_TERMS: dict[str, Callable[[LossConfig, bool], LossTerm]] = {
    "global": GlobalLoss,
    "beta_cal": BetaCALTerm,
    "conditioned": ConditionedTerm,
}
