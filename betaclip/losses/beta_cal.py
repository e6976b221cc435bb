"""β-CAL as a module."""

from torch import Tensor, nn

from betaclip.kernels.similarity.operators import Backend
from betaclip.losses.formulas import GroupLike, Inputs, Options, sigmoid_loss, softmax_loss
from betaclip.losses.prefixes import Dims


class BetaCALLoss(nn.Module):
    """β-CAL as a module: :func:`beta_cal_ce_loss` or :func:`beta_cal_bce_loss` with fixed options.

    Args:
        form: ``"ce"`` (softmax) or ``"bce"`` (sigmoid).
        beta: weight of the other texts of the same image. A tensor becomes a buffer; an ``nn.Parameter`` is learned
            (keep it >= 0, for example by a softplus: the loss does not clamp it).
        alpha: weight of the own text.
        padding: ``"ignore"`` leaves padded texts out; ``"published"`` counts them as the released code does.
        divisor: what the sigmoid form divides by: ``"pairs"`` (N², as in the released code) or ``"rows"`` (N, as in
            SigLIP). The softmax form is a mean over rows.
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"blockwise"`` or ``"reference"``.
        gather: ``"auto"``, False, True, ``"all_gather"`` or ``"ring"``: whether, and how, to contrast with the images
            and texts of all ranks; :func:`beta_cal_ce_loss` says what that means for gradients. ``"auto"`` does so
            wherever there are several ranks.
        process_group: the ranks to gather from, a ``ProcessGroup`` or a ``DeviceMesh`` of one dimension; None for the
            default group.
        conditioned_weight: weight of the term that ``conditioned_negatives`` add, in a batch that has them.
        reduction: ``"mean"``, or ``"none"`` for the loss of each text.
        label_smoothing: the share of each row's target in the softmax form that is spread over all texts, from 0 to 1;
            must be 0 with ``text_ids``.
        strict: on a GPU, raise an error where ``backend="auto"`` would take a slower backend than the fused one.
        keep: bytes of exponentials that the softmax form may keep from forward to backward, for 6·N²·D FLOP instead of
            8; ``"auto"``: 256 MiB on the CPU, 0 elsewhere. See :func:`beta_cal_ce_loss`. The sigmoid form keeps the
            cosines of batches of up to 724 texts on the CPU, at most 2 MiB, and nothing else.
        dims: lengths of prefixes of the embeddings, such as ``(512, 256, 128)``, or a mapping of lengths to weights:
            the loss is the (weighted) sum of the losses of all prefixes, each normalised by itself (Matryoshka);
            :func:`beta_cal_ce_loss` has the details. None for whole embeddings.

    Raises:
        ValueError: ``form``, ``padding``, ``backend``, ``gather``, ``divisor``, ``reduction`` or ``keep`` is unknown;
            ``divisor`` is given for the softmax form or ``label_smoothing`` for the sigmoid form; a weight is negative
            or not finite; ``dims`` are malformed.

    Example:
        >>> import torch
        >>> from betaclip import BetaCALLoss
        >>> image = torch.eye(6).view(3, 2, 6)  # 3 images, seen by 2 texts each
        >>> text = image.clone().requires_grad_()
        >>> loss = BetaCALLoss("ce", beta=0.5)(image, text, logit_scale=10.0)
        >>> print(f"{loss:.4f}")  # log(e^10 + 5) - 10 * 2/3: the other text is a third of the target
        3.3336
        >>> loss.backward()
        >>> text.grad.shape
        torch.Size([3, 2, 6])
    """

    def __init__(
        self,
        form: str = "ce",
        beta: Tensor | float = 0.5,
        alpha: float = 1.0,
        padding: str = "ignore",
        backend: Backend = "auto",
        gather: bool | str = "auto",
        process_group: GroupLike | None = None,
        divisor: str = "pairs",
        conditioned_weight: float = 1.0,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        strict: bool = False,
        keep: int | str = "auto",
        dims: Dims | None = None,
    ) -> None:
        super().__init__()
        self.form, self.alpha, self.padding, self.backend = form, alpha, padding, backend
        self.gather, self.process_group, self.divisor = gather, process_group, divisor
        self.conditioned_weight, self.reduction, self.label_smoothing = conditioned_weight, reduction, label_smoothing
        self.strict, self.keep, self.dims = strict, keep, dims
        if isinstance(beta, Tensor) and not isinstance(beta, nn.Parameter):
            self.register_buffer("beta", beta)
        else:
            self.beta = beta
        self.options().check(form)

    def options(self) -> Options:
        """Collect the options of this module."""
        return Options(**{name: getattr(self, name) for name in Options._fields})

    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor | float,
        *,
        mask: Tensor | None = None,
        image_index: Tensor | None = None,
        logit_bias: Tensor | float | None = None,
        pair_weights: Tensor | None = None,
        conditioned_negatives: Tensor | None = None,
        conditioned_mask: Tensor | None = None,
        weights: Tensor | None = None,
        extra_texts: Tensor | None = None,
        extra_mask: Tensor | None = None,
        text_ids: Tensor | None = None,
        extra_text_ids: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            image_embeds: (B, K, D) text-conditioned image embeddings, any norm, any floating dtype: [b, k] is image b
                as text k sees it. Or (N, D) with ``image_index``.
            text_embeds: text embeddings of the same shape.
            logit_scale: () inverse temperature, after exp; may require a gradient.
            mask: (B, K) bool, True = valid text; padded texts may hold anything.
            image_index: (N,) integer image of each row, sorted, for any number of texts per image.
            logit_bias: () added to every logit of the sigmoid form; the softmax form ignores it, as it would cancel.
            pair_weights: (K, K) or (B, K, K) weights of the pairs within an image, instead of ``alpha`` and ``beta``.
            conditioned_negatives: (B, K, J), or (N, J) with ``image_index``: the cosines of each text with the
                embeddings that it pools from J other pictures, negatives under the same text.
            conditioned_mask: bool of the same shape, True = valid.
            weights: (B, K), or (N,) with ``image_index``: constant weights of the texts.
            extra_texts: (E, D) embeddings of texts that belong to none of the images: negatives of all of them.
            extra_mask: (E,) bool, True = valid.
            text_ids: (B, K), or (N,) with ``image_index``: integers, equal for equal texts, negative for a text that
                equals no other. Texts that equal that of another image are not its negatives.
            extra_text_ids: (E,) the same for the extra texts.

        Returns:
            () float32 (float64 for float64 inputs), in nats; 0 if no text is valid. With ``reduction="none"`` (B, K),
            or (N,) with ``image_index``.

        Raises:
            ValueError: an argument is malformed or disagrees with another; the message names it.
            NotImplementedError: the named backend cannot serve these inputs; the message says why.
            RuntimeError: ``gather`` other than ``"auto"`` without an initialised process group.
        """
        inputs = Inputs(
            image_embeds, text_embeds, logit_scale, mask, image_index, logit_bias, pair_weights, weights,
            conditioned_negatives, conditioned_mask, extra_texts, extra_mask, text_ids, extra_text_ids,
        )  # fmt: skip
        return (softmax_loss if self.form == "ce" else sigmoid_loss)(inputs, self.options())

    def extra_repr(self) -> str:
        beta = "learned" if isinstance(self.beta, nn.Parameter) else float(self.beta)
        options = f"form={self.form!r}, beta={beta}, alpha={self.alpha}"
        options += f", label_smoothing={self.label_smoothing}" if self.form == "ce" else f", divisor={self.divisor!r}"
        options += f", reduction={self.reduction!r}" + ("" if self.dims is None else f", dims={self.dims!r}")
        return f"{options}, padding={self.padding!r}, backend={self.backend!r}, gather={self.gather!r}"
