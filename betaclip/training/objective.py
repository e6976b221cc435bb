"""The objective: CLIP's loss of the captions and β-CAL of all texts, from what a BetaCLIP returns."""

from typing import Literal

import torch
from torch import Tensor, nn

from betaclip.losses.beta_cal import BetaCALLoss, beta_cal_ce_loss
from betaclip.model.texts import RaggedTexts


class Objective(nn.Module):
    """Sum of the two losses by weight. One whose weight is 0 is not computed.

    Args:
        form, beta, alpha, gather: of :class:`betaclip.BetaCALLoss`.
        global_weight: of CLIP's loss between whole images (CLS) and captions.
        beta_cal_weight: of β-CAL between text-conditioned images and all texts.
        gather_global: the same of CLIP's loss.
        backend: of both.

    Raises:
        ValueError: both weights are 0, or one is negative.
    """

    def __init__(
        self,
        form: Literal["ce", "bce"] = "ce",
        beta: float = 0.5,
        alpha: float = 1.0,
        global_weight: float = 1.0,
        beta_cal_weight: float = 1.0,
        gather: bool | str = False,
        gather_global: bool | str = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if min(global_weight, beta_cal_weight) < 0 or global_weight == beta_cal_weight == 0:
            raise ValueError(
                f"global_weight, beta_cal_weight: expected two numbers >= 0, not both 0, "
                f"got {global_weight} and {beta_cal_weight}"
            )
        self.global_weight, self.beta_cal_weight = global_weight, beta_cal_weight
        self.gather_global, self.backend = gather_global, backend
        self.beta_cal = BetaCALLoss(form, beta, alpha, backend=backend, gather=gather)

    def forward(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss``, and unweighted ``global_loss`` and ``beta_cal_loss``, all (), of the outputs of a BetaCLIP."""
        losses, terms = {}, []
        if self.global_weight:
            # At K = 1 and with a mask, which ClipLoss has not: an image may be without any text.
            losses["global_loss"] = beta_cal_ce_loss(
                out["image_embeds"].unsqueeze(1), out["text_embeds"][:, :1], out["logit_scale"], beta=0.0,
                mask=out["mask"][:, :1], backend=self.backend, gather=self.gather_global,
            )  # fmt: skip
            terms.append(self.global_weight * losses["global_loss"])
        if self.beta_cal_weight:
            losses["beta_cal_loss"] = self.beta_cal(
                out["pooled_embeds"], out["text_embeds"], out["pool_logit_scale"], mask=out["mask"]
            )
            terms.append(self.beta_cal_weight * losses["beta_cal_loss"])
        return {"loss": torch.stack(terms).sum(), **losses}


def captions(texts: RaggedTexts) -> RaggedTexts:
    """The first text of each image: all that the global loss looks at."""
    first = texts.image_index.diff(prepend=torch.tensor([-1])) > 0
    tokens = texts.tokens[first.repeat_interleave(texts.lengths)]
    return RaggedTexts(tokens, texts.lengths[first], texts.image_index[first], texts.num_images)
