"""CLIP's loss, linear in memory."""

from torch import Tensor, nn

from betaclip.kernels.similarity.operators import Backend
from betaclip.losses.formulas import GroupLike, Inputs, Options, softmax_loss
from betaclip.losses.inputs import one_text_per_image
from betaclip.losses.prefixes import Dims


class ClipLoss(nn.Module):
    """CLIP's loss for one text per image: β-CAL's softmax form at K = 1, by the same kernel.

    Equivalent to:

        v, t = F.normalize(image_embeds.float(), dim=-1), F.normalize(text_embeds.float(), dim=-1)
        s, own = logit_scale * v @ t.T, torch.arange(B)
        loss = (F.cross_entropy(s, own) + F.cross_entropy(s.T, own)) / 2

    in O(B·D) memory; ``reduction`` and ``label_smoothing`` are those of ``F.cross_entropy``.

    Args:
        backend: as for :func:`betaclip.kernels.similarity.similarity_logsumexp`.
        gather: ``"auto"``, False, True, ``"all_gather"`` or ``"ring"``: whether, and how, to contrast with the images
            and texts of all ranks; see :func:`betaclip.beta_cal_ce_loss`.
        process_group: the ranks to gather from; None for the default group.
        reduction: ``"mean"``, or ``"none"`` for the loss of each pair, the mean of its two directions.
        label_smoothing: the share of each row's target that is spread over all texts, from 0 to 1; must be 0 with
            ``text_ids``.
        strict: on a GPU, raise an error where ``backend="auto"`` would take a slower backend than the fused one.
        keep: bytes of exponentials that may be kept from forward to backward, for 6·B²·D FLOP instead of 8;
            ``"auto"``: 256 MiB on the CPU, 0 elsewhere. See :func:`betaclip.beta_cal_ce_loss`.
        dims: lengths of prefixes of the embeddings, such as ``(512, 256, 128)``, or a mapping of lengths to weights:
            the loss is the (weighted) sum of the losses of all prefixes, each normalised by itself (Matryoshka);
            :func:`betaclip.beta_cal_ce_loss` has the details. None for whole embeddings.

    Raises:
        ValueError: ``backend``, ``gather``, ``reduction`` or ``keep`` is unknown, ``label_smoothing`` out of range, or
            ``dims`` malformed.

    Example:
        >>> import torch
        >>> from betaclip import ClipLoss
        >>> image, text = torch.eye(4), torch.eye(4)  # 4 pairs, each unlike the others
        >>> print(f"{ClipLoss()(image, text, logit_scale=1.0):.4f}")  # log(e + 3) - 1
        0.7437
    """

    def __init__(
        self,
        backend: Backend = "auto",
        gather: bool | str = "auto",
        process_group: GroupLike | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        strict: bool = False,
        keep: int | str = "auto",
        dims: Dims | None = None,
    ) -> None:
        super().__init__()
        self.backend, self.gather, self.process_group = backend, gather, process_group
        self.reduction, self.label_smoothing, self.strict = reduction, label_smoothing, strict
        self.keep, self.dims = keep, dims
        self.options().check("ce")

    def options(self) -> Options:
        """Collect the options of this module."""
        return Options(
            beta=0.0, backend=self.backend, gather=self.gather, process_group=self.process_group,
            reduction=self.reduction, label_smoothing=self.label_smoothing, strict=self.strict,
            keep=self.keep, dims=self.dims,
        )  # fmt: skip

    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor | float,
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
            weights: (B,) constant weights of the pairs. The loss is the weighted mean; with ``reduction="none"`` each
                row is multiplied by its weight.
            extra_texts: (E, D) embeddings of texts that belong to none of the images: negatives of all of them.
            extra_mask: (E,) bool, True = valid.
            text_ids: (B,) integers, equal for equal texts, negative for a text that equals no other. Texts that equal
                that of another image are not its negatives.
            extra_text_ids: (E,) the same for the extra texts.

        Returns:
            () float32 (float64 for float64 inputs), in nats; (B,) with ``reduction="none"``.

        Raises:
            ValueError: an argument is malformed or disagrees with another; the message names it.
            NotImplementedError: the named backend cannot serve these inputs; the message says why.
            RuntimeError: ``gather`` other than ``"auto"`` without an initialised process group.
        """
        image, text, weights, text_ids = one_text_per_image(image_embeds, text_embeds, weights, text_ids)
        inputs = Inputs(
            image, text, logit_scale, weights=weights, extra_texts=extra_texts, extra_mask=extra_mask,
            text_ids=text_ids, extra_text_ids=extra_text_ids,
        )  # fmt: skip
        loss = softmax_loss(inputs, self.options(), "ClipLoss")
        return loss if self.reduction == "mean" else loss.squeeze(1)
