"""Both forms of β-CAL, from the arguments of its functions and modules.

Each is formed row by row: a statistic between images, a (B, K, K) block of ordinary PyTorch within them, and what
options add. The rows are then weighted and reduced, over ranks where several are contrasted.
"""

from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from betaclip.kernels.precision import unit_rows
from betaclip.kernels.similarity.operators import (
    Backend,
    RowLayout,
    contrast_logsumexp,
    contrast_softplus,
    keep_bytes,
    resolve_backend,
)
from betaclip.losses.across_ranks import TRANSPORTS, AcrossRanks, Call, Wanted, over_ranks, sum_over_ranks
from betaclip.losses.conditioned import prepare_conditioned, sigmoid_mean
from betaclip.losses.extra_texts import ExtraTexts, prepare_extra_texts
from betaclip.losses.inputs import (
    DIVISORS,
    FORMS,
    PADDINGS,
    REDUCTIONS,
    Batch,
    as_scalar,
    check_backend,
    check_choice,
    check_gather,
    check_weight,
    prepare,
    prepare_row_weights,
    prepare_text_ids,
    warn_if_beta_cancels,
    weights_of_pairs,
)
from betaclip.losses.prefixes import Dims, Prefixes
from betaclip.process_group import ProcessGroup

GroupLike = dist.ProcessGroup | DeviceMesh


class Options(NamedTuple):
    """The options of a loss: the arguments of :class:`betaclip.BetaCALLoss` by the same names."""

    beta: Tensor | float = 0.5
    alpha: float = 1.0
    padding: str = "ignore"
    backend: Backend = "auto"
    gather: bool | str = "auto"
    process_group: GroupLike | None = None
    divisor: str = "pairs"
    conditioned_weight: float = 1.0
    reduction: str = "mean"
    label_smoothing: float = 0.0
    strict: bool = False
    keep: int | str = "auto"
    dims: Dims | None = None

    def check(self, form: str) -> "Options":
        """Check and return these options.

        Raises:
            ValueError: one is malformed, or means nothing in this form.
        """
        check_choice("form", form, FORMS)
        check_choice("padding", self.padding, PADDINGS)
        check_choice("divisor", self.divisor, DIVISORS if form == "bce" else DIVISORS[:1])
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_backend(self.backend)
        check_gather(self.gather)
        keep_bytes(self.keep, torch.device("cpu"))
        Prefixes.of(self.dims)
        for name, weight in (
            ("alpha", self.alpha),
            ("beta", self.beta),
            ("conditioned_weight", self.conditioned_weight),
        ):
            check_weight(name, weight)
        smoothing = self.label_smoothing
        if not isinstance(smoothing, (int, float)) or not 0 <= smoothing <= (1 if form == "ce" else 0):
            expected = (
                "a number from 0 to 1" if form == "ce" else "0 in the sigmoid form, which has no target to smooth"
            )
            raise ValueError(f"label_smoothing: expected {expected}, got {smoothing!r}")
        return self


class Inputs(NamedTuple):
    """One batch; the arguments of :meth:`betaclip.BetaCALLoss.forward` by the same names."""

    image_embeds: Tensor
    text_embeds: Tensor
    logit_scale: Tensor | float
    mask: Tensor | None = None
    image_index: Tensor | None = None
    logit_bias: Tensor | float | None = None
    pair_weights: Tensor | None = None
    weights: Tensor | None = None
    conditioned_negatives: Tensor | None = None
    conditioned_mask: Tensor | None = None
    extra_texts: Tensor | None = None
    extra_mask: Tensor | None = None
    text_ids: Tensor | None = None
    extra_text_ids: Tensor | None = None


class Loss(Protocol):
    """A form under the name by which ranks tell losses apart."""

    def __call__(self, inputs: Inputs, options: Options, name: str = "BetaCALLoss") -> Tensor: ...


def _eager_over_ranks(loss: Loss) -> Loss:
    """Let torch.compile break the graph around ``loss`` if it gathers: the host then reads what other ranks sent."""

    def run(inputs: Inputs, options: Options, name: str = "BetaCALLoss") -> Tensor:
        grouped = options.gather is not False and dist.is_available() and dist.is_initialized()
        if torch.compiler.is_compiling() and grouped and (options.gather != "auto" or dist.get_world_size() > 1):
            # Made here rather than once: it imports torch._dynamo, which takes longer than all else of betaclip.
            eager = torch.compiler.disable(loss, reason="a loss over several ranks runs eagerly")
            loss_of_ranks: Tensor = eager(inputs, options, name)
            return loss_of_ranks
        return loss(inputs, options, name)

    return run


@_eager_over_ranks
def softmax_loss(inputs: Inputs, options: Options, name: str = "BetaCALLoss") -> Tensor:
    """:func:`betaclip.beta_cal_ce_loss`."""
    options.check("ce")
    group = gathering_group(options.gather, options.process_group)
    batch, extra_ids = _prepare(inputs, options, group)
    targets = weights_of_pairs(batch, options.alpha, options.beta, inputs.pair_weights)
    weights = prepare_row_weights(batch, inputs.weights, options.padding)
    conditioned = prepare_conditioned(batch, inputs.conditioned_negatives, inputs.conditioned_mask)
    layout = batch.layout if options.padding == "ignore" else batch.all_rows()
    extra = prepare_extra_texts(batch, layout, inputs.extra_texts, inputs.extra_mask, extra_ids)
    valid_pairs = batch.valid_pairs()
    if valid_pairs is not None:
        targets = targets * valid_pairs
    # (2 or 1, B or 1, K, K), for rows of image embeddings and for rows of texts, like all that follows; logits have an
    # axis of prefixes before. A row without any target, such as one that is not valid, does not count.
    targets = targets if targets.dim() == 3 else targets.unsqueeze(0)
    targets = targets.unsqueeze(0) if inputs.pair_weights is None else torch.stack((targets, targets.mT))
    totals = targets.sum(3)
    counted = totals != 0
    shares = targets / torch.where(counted, totals, 1).unsqueeze(3)
    counted = counted.expand(2, layout.images, layout.texts_per_image)
    call = Call(
        name, "ce", options.padding, False, conditioned=conditioned is not None, reduction=options.reduction,
        smoothed=options.label_smoothing > 0, weighted=weights is not None, extra=extra is not None,
        text_ids=inputs.text_ids is not None,
    )  # fmt: skip
    backend = partial(_backend, options, group, batch, call)
    between_x, between_y, cosines = contrast_logsumexp(
        batch.image, batch.text, batch.scale, layout, batch.dtype, backend(batch.text), options.keep,
        batch.prefixes.contrasted,
    )  # fmt: skip
    between = torch.stack([layout.to_slots(rows, -torch.inf) for rows in (between_x, between_y)], 1)
    logits = batch.scale * cosines
    logits = torch.stack((logits, logits.mT), 1)
    contrasted = [logits, between.unsqueeze(4)]
    excluded = None if valid_pairs is None or options.padding != "ignore" else ~valid_pairs
    if excluded is not None:
        # The smallest finite number, so that an image without any text has finite gradients.
        contrasted[0] = logits.masked_fill(excluded, torch.finfo(logits.dtype).min)
    if extra is not None:
        of_extra = layout.to_slots(extra.logsumexp(batch, layout, backend(extra.text), options.keep), -torch.inf)
        contrasted.append(torch.stack((of_extra, torch.full_like(of_extra, -torch.inf)), 1).unsqueeze(4))
    within = torch.cat(contrasted, 4).log_softmax(4)[..., : layout.texts_per_image]
    if excluded is not None:
        within = within.masked_fill(excluded, 0)
    rows = -(shares * within).sum(4)
    if options.label_smoothing:
        uniform = _logits_of_means(batch, layout, extra, group)
        rows = rows + options.label_smoothing * ((shares * logits).sum(4) - uniform)
    rows = torch.where(counted, batch.prefixes.sum(rows), 0)
    if conditioned is not None:
        terms, exist = conditioned.softmax_terms(cosines[-1].diagonal(dim1=1, dim2=2), batch.scale)
        terms = batch.prefixes.weights[-1] * terms
        rows, counted = torch.cat((rows, terms.unsqueeze(0))), torch.cat((counted, exist.unsqueeze(0)))
    if inputs.pair_weights is None:
        warn_if_beta_cancels(inputs.image_embeds, batch, options.beta)
    if weights is not None:
        rows, counted = weights * rows, weights * counted
    if options.reduction == "none":
        return batch.as_given((rows[0] + rows[1]) / 2 + options.conditioned_weight * rows[2:].sum(0))
    means = _mean(*over_ranks(rows.sum((1, 2)), counted.sum((1, 2)), group))
    mean = means[:2].mean()
    return mean if conditioned is None else mean + options.conditioned_weight * means[2]


@_eager_over_ranks
def sigmoid_loss(inputs: Inputs, options: Options, name: str = "BetaCALLoss") -> Tensor:
    """:func:`betaclip.beta_cal_bce_loss`."""
    options.check("bce")
    group = gathering_group(options.gather, options.process_group)
    batch, extra_ids = _prepare(inputs, options, group)
    layout, given_bias = batch.layout, inputs.logit_bias
    bias = None if given_bias is None else as_scalar("logit_bias", given_bias, batch.image, batch.scale.dtype)
    targets = weights_of_pairs(batch, options.alpha, options.beta, inputs.pair_weights)
    weights = prepare_row_weights(batch, inputs.weights, options.padding)
    conditioned = prepare_conditioned(batch, inputs.conditioned_negatives, inputs.conditioned_mask)
    extra = prepare_extra_texts(batch, layout, inputs.extra_texts, inputs.extra_mask, extra_ids)
    call = Call(
        name, "bce", options.padding, bias is not None, options.divisor, conditioned is not None, options.reduction,
        weighted=weights is not None, extra=extra is not None,
        text_ids=inputs.text_ids is not None,
    )  # fmt: skip
    backend = partial(_backend, options, group, batch, call, bias=bias)
    prefixes, reduce = batch.prefixes, options.reduction == "mean"
    row_weights = _weights_of_rows(batch, weights)
    between, cosines = contrast_softplus(
        batch.image, batch.text, batch.scale, bias, layout, batch.dtype, backend(batch.text), reduce, row_weights,
        prefixes.contrasted,
    )  # fmt: skip
    if extra is not None:
        between = between + extra.softplus(batch, bias, reduce, row_weights, backend(extra.text))
    logits = batch.scale * cosines
    if bias is not None:
        logits = logits + bias
    valid_pairs = batch.valid_pairs()
    if valid_pairs is not None:
        targets = targets * valid_pairs
    # softplus(-logits), which F.softplus rounds beyond 20
    within = prefixes.sum(-(targets * F.logsigmoid(logits)).sum(-1))
    if conditioned is not None:
        of_conditioned = conditioned.softplus_sums(batch.scale, bias)
        within = within + options.conditioned_weight * prefixes.weights[-1] * of_conditioned
    counted = (
        layout.image_id >= 0 if options.padding == "ignore" else torch.ones_like(layout.image_id, dtype=torch.bool)
    )
    count = counted.sum()
    if not reduce:
        rows = layout.to_slots(prefixes.sum(between), 0) + within
        if options.divisor == "pairs":
            rows = rows / (count if group is None else group.sum(count)).clamp_min(1)
        return batch.as_given(rows if weights is None else weights * rows)
    if weights is None:
        total, count = over_ranks(between + within.sum(), count, group)
        return sigmoid_mean(total, count, options.divisor)
    numbers = torch.stack((weights.sum(), count))
    total, numbers = over_ranks(between + (weights * within).sum(), numbers, group)
    weight, count = numbers.unbind()
    return _mean(total, weight if options.divisor == "rows" else weight * count)


def _prepare(inputs: Inputs, options: Options, group: ProcessGroup | None) -> tuple[Batch, Tensor | None]:
    """The batch, and the ids of the extra texts."""
    batch = prepare(
        inputs.image_embeds, inputs.text_embeds, inputs.logit_scale, inputs.mask, inputs.image_index, options.padding,
        options.dims,
    )  # fmt: skip
    ids = inputs.text_ids, inputs.extra_texts, inputs.extra_text_ids
    if options.label_smoothing and inputs.text_ids is not None:
        expected = "0 with text_ids, which leave pairs without a logit to share the target"
        raise ValueError(f"label_smoothing: expected {expected}, got {options.label_smoothing!r}")
    return prepare_text_ids(batch, *ids, group is not None)


def _weights_of_rows(batch: Batch, weights: Tensor | None) -> Tensor | None:
    """(P, N) the weights of each prefix's rows in the sigmoid form's sum, from (B, K); None if all are 1."""
    layout, of_prefixes = batch.layout, batch.prefixes.weights
    if weights is None and all(weight == 1 for weight in of_prefixes):
        return None
    rows = torch.ones_like(batch.image[:, 0], dtype=batch.scale.dtype) if weights is None else layout.to_rows(weights)
    return torch.stack([weight * rows for weight in of_prefixes])


def _logits_of_means(batch: Batch, layout: RowLayout, extra: ExtraTexts | None, group: ProcessGroup | None) -> Tensor:
    """(P, 2, B, K) the mean of each row's logits, image to text and text to image: those with the mean embedding."""
    taken, split = layout.image_id >= 0, batch.prefixes.split
    images, texts = split(batch.image), split(batch.text)
    further = [None] * len(images) if extra is None else split(extra.text)
    number = torch.stack((taken.sum() + (0 if extra is None else extra.valid.sum()), taken.sum()))
    if group is not None:
        number = group.sum(number)
    logits: list[Tensor] = []
    for image, text, more in zip(images, texts, further, strict=True):
        unit = [unit_rows(t.to(batch.scale.dtype).masked_fill(~taken.unsqueeze(1), 0)) for t in (image, text)]
        of_texts = unit[1].sum(0) if more is None else unit[1].sum(0) + unit_rows(more).sum(0)
        total = torch.stack((of_texts, unit[0].sum(0)))
        if group is not None:
            total = sum_over_ranks(total, batch.scale, group)
        means = total / number.clamp_min(1).unsqueeze(1)
        # Element by element, since autocast would make a product of matrices half precision.
        products = [(rows * mean).sum(1) for rows, mean in zip(unit, means, strict=True)]
        logits.append(layout.to_slots(batch.scale * torch.stack(products), 0))
    return torch.stack(logits)


def _mean(total: Tensor, number: Tensor) -> Tensor:
    """total / number, 0 where there is nothing."""
    return total / torch.where(number != 0, number, 1)


def gathering_group(gather: bool | str, process_group: GroupLike | None) -> ProcessGroup | None:
    """The ranks whose texts are contrasted; None for this rank alone."""
    if gather is False:
        if process_group is not None:
            raise ValueError("process_group: expected None without gather (it is False), got a group")
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if gather == "auto":
            return None
        advice = "call torch.distributed.init_process_group, or leave gather at 'auto'"
        raise RuntimeError(f"gather={gather!r}: no process group is initialised; {advice}")
    group = ProcessGroup.of(process_group)
    return None if gather == "auto" and group.size == 1 else group


def _backend(
    options: Options,
    group: ProcessGroup | None,
    batch: Batch,
    call: Call,
    columns: Tensor,
    bias: Tensor | None = None,
) -> Backend:
    """The backend between the rows of this batch and the columns of all ranks, of which ``columns`` are this rank's."""
    operation = {"ce": "similarity_logsumexp", "bce": "similarity_softplus"}[call.form]
    backend = resolve_backend(operation, options.backend, batch.image, batch.text, batch.dtype, options.strict)
    if group is None:
        return backend
    wanted = [t is not None and t.requires_grad for t in (columns, batch.image, batch.scale, bias)]
    transport = options.gather if isinstance(options.gather, str) and options.gather in TRANSPORTS else TRANSPORTS[0]
    wants = Wanted(any(wanted) and torch.is_grad_enabled(), wanted[0])
    return AcrossRanks(backend, transport, group, wants, call)
