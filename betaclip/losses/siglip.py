"""SigLIP's loss, linear in memory."""

from torch import Tensor, nn

from betaclip.kernels.similarity.operators import Backend
from betaclip.losses.formulas import GroupLike, Inputs, Options, sigmoid_loss
from betaclip.losses.inputs import one_text_per_image
from betaclip.losses.prefixes import Dims


class SigLipLoss(nn.Module):
    """SigLIP's loss for one text per image: β-CAL's sigmoid form at K = 1, divided by B, by the same kernel.

    Equivalent to:

        v, t = F.normalize(image_embeds.float(), dim=-1), F.normalize(text_embeds.float(), dim=-1)
        s, own = logit_scale * v @ t.T + logit_bias, torch.eye(B).bool()
        loss = F.softplus(torch.where(own, -s, s)).sum() / B

    in O(B·D) memory (arXiv 2303.15343).

    Args:
        backend: as for :func:`betaclip.kernels.similarity.similarity_logsumexp`.
        gather: ``"auto"``, False, True, ``"all_gather"`` or ``"ring"``: whether, and how, to contrast with the images
            and texts of all ranks; see :func:`betaclip.beta_cal_ce_loss`. B is then the number of all ranks' images.
        process_group: the ranks to gather from; None for the default group.
        reduction: ``"mean"``, or ``"none"`` for the loss of each image with all texts; ``"mean"`` is the mean of these.
        strict: on a GPU, raise an error where ``backend="auto"`` would take a slower backend than the fused one.
        dims: lengths of prefixes of the embeddings, such as ``(512, 256, 128)``, or a mapping of lengths to weights:
            the loss is the (weighted) sum of the losses of all prefixes, each normalised by itself (Matryoshka);
            :func:`betaclip.beta_cal_ce_loss` has the details. None for whole embeddings.

    Raises:
        ValueError: ``backend``, ``gather`` or ``reduction`` is unknown, or ``dims`` are malformed.

    Example:
        >>> import torch
        >>> from betaclip import SigLipLoss
        >>> image, text = torch.eye(4), torch.eye(4)  # 4 pairs, each unlike the others
        >>> for bias in (0.0, -10.0):
        ...     print(f"{SigLipLoss()(image, text, logit_scale=10.0, logit_bias=bias):.4f}")
        2.0795
        0.6933
    """

    def __init__(
        self,
        backend: Backend = "auto",
        gather: bool | str = "auto",
        process_group: GroupLike | None = None,
        reduction: str = "mean",
        strict: bool = False,
        dims: Dims | None = None,
    ) -> None:
        super().__init__()
        self.backend, self.gather, self.process_group = backend, gather, process_group
        self.reduction, self.strict, self.dims = reduction, strict, dims
        self.options().check("bce")

    def options(self) -> Options:
        """Collect the options of this module."""
        return Options(
            beta=0.0, backend=self.backend, gather=self.gather, process_group=self.process_group, divisor="rows",
            reduction=self.reduction, strict=self.strict, dims=self.dims,
        )  # fmt: skip

    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        weights: Tensor | None = None,
        extra_texts: Tensor | None = None,
        extra_mask: Tensor | None = None,
        text_ids: Tensor | None = None,
        extra_text_ids: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            image_embeds: (B, D) image embeddings, any norm, any floating dtype.
            text_embeds: (B, D) text embeddings; text i belongs to image i.
            logit_scale: () inverse temperature, after exp; may require a gradient.
            logit_bias: () added to every logit, may require a gradient; None for none. SigLIP starts at -10.
            weights: (B,) constant weights of the images. The loss is the weighted mean; with ``reduction="none"`` each
                row is multiplied by its weight.
            extra_texts: (E, D) embeddings of texts that belong to none of the images: negatives of all of them.
            extra_mask: (E,) bool, True = valid.
            text_ids: (B,) integers, equal for equal texts, negative for a text that equals no other. Texts that equal
                that of another image are not its negatives.
            extra_text_ids: (E,) the same for the extra texts.

        Returns:
            () float32 (float64 for float64 inputs), in nats per image; (B,) with ``reduction="none"``.

        Raises:
            ValueError: an argument is malformed or disagrees with another; the message names it.
            NotImplementedError: the named backend cannot serve these inputs; the message says why.
            RuntimeError: ``gather`` other than ``"auto"`` without an initialised process group.
        """
        image, text, weights, text_ids = one_text_per_image(image_embeds, text_embeds, weights, text_ids)
        inputs = Inputs(
            image, text, logit_scale, logit_bias=logit_bias, weights=weights, extra_texts=extra_texts,
            extra_mask=extra_mask, text_ids=text_ids, extra_text_ids=extra_text_ids,
        )  # fmt: skip
        loss = sigmoid_loss(inputs, self.options())
        return loss if self.reduction == "mean" else loss.squeeze(1)
