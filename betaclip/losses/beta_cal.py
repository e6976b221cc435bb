"""β-CAL, the contrastive loss of β-CLIP (arXiv 2512.12678), linear in memory.

B images with K texts each; a text conditions its image, so there are N = B * K image embeddings v_i and text
embeddings t_j, S_ij = logit_scale * cos(v_i, t_j). Text j is a positive of image embedding i with weight
w_ij: ``alpha`` for its own, ``beta`` for the other texts of its image, 0 for every other image.

Targets touch only pairs within one image, so every sum splits: between images, statistics that know no targets, from
``betaclip.kernels.similarity.operators``; within an image, a (B, K, K) block of ordinary PyTorch, here.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from betaclip.kernels.similarity.operators import Backend, contrast_logsumexp, contrast_softplus
from betaclip.losses.across_ranks import TRANSPORTS, AcrossRanks, Call, Wanted, over_ranks
from betaclip.losses.conditioned import prepare_conditioned, sigmoid_mean
from betaclip.losses.inputs import (
    DIVISORS,
    FORMS,
    PADDINGS,
    Batch,
    as_scalar,
    check_backend,
    check_choice,
    check_gather,
    check_weight,
    prepare,
    warn_if_beta_cancels,
    weights_of_pairs,
)
from betaclip.process_group import ProcessGroup

GroupLike = dist.ProcessGroup | DeviceMesh


P = ParamSpec("P")


def _eager_over_ranks(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let torch.compile break the graph around ``loss`` if it gathers: the host then reads what other ranks sent."""
    eager = torch.compiler.disable(loss, reason="a loss over several ranks runs eagerly")

    @functools.wraps(loss)
    def run(*args: P.args, **options: P.kwargs) -> Tensor:
        gather = options.get("gather", "auto")
        grouped = gather is not False and dist.is_available() and dist.is_initialized()
        if torch.compiler.is_compiling() and grouped and (gather != "auto" or dist.get_world_size() > 1):
            return eager(*args, **options)
        return loss(*args, **options)

    return run


def beta_cal_ce_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    beta: Tensor | float = 0.5,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    image_index: Tensor | None = None,
    pair_weights: Tensor | None = None,
    padding: str = "ignore",
    backend: Backend = "auto",
    gather: bool | str = "auto",
    process_group: GroupLike | None = None,
    conditioned_negatives: Tensor | None = None,
    conditioned_mask: Tensor | None = None,
    conditioned_weight: float = 1.0,
) -> Tensor:
    """Softmax form of β-CAL, without the (B·K)² similarity matrix.

    Row i is compared with a target of weight ``alpha`` on its own text, ``beta`` on the other valid texts of
    its image and 0 elsewhere, normalised to sum to 1 (arXiv 2512.12678). Without mask, equivalent to:

        v, t = (F.normalize(e.float(), dim=-1).flatten(0, 1) for e in (image_embeds, text_embeds))
        s = logit_scale * v @ t.T
        w = torch.block_diag(*[beta + (alpha - beta) * torch.eye(K)] * B)
        loss = (F.cross_entropy(s, w / w.sum(1, keepdim=True))
              + F.cross_entropy(s.T, w.T / w.T.sum(1, keepdim=True))) / 2

    in O(N·D + B·K²) memory, accumulated in float32 (float64 for float64 inputs); deterministic.

    ``conditioned_negatives`` c, the cosines of a text with what it pools from other pictures, add
    ``conditioned_weight`` times the mean, over the texts that have one, of

        own = F.cosine_similarity(image_embeds, text_embeds, dim=-1)
        logits = logit_scale * torch.cat((own[..., None], c), -1)
        logits.logsumexp(-1) - logits[..., 0]

    which is log(1 + J) if the embeddings do not depend on the picture.

    Args:
        image_embeds: (B, K, D) text-conditioned image embeddings, any norm; or (N, D) with ``image_index``.
        text_embeds: text embeddings of the same shape.
        logit_scale: () inverse temperature, after exp; may require a gradient.
        beta: weight of the other texts of the same image; a float or a () tensor that may require a gradient.
        alpha: weight of the own text.
        mask: (B, K) bool, True = valid text.
        image_index: (N,) integer image of each row, sorted, for ragged batches: any number of texts per image. Four
            numbers are read back to the host, so this form does not compile into one graph.
        pair_weights: (K, K) or (B, K, K) weights w of the pairs within an image, instead of alpha and beta; K
            is the largest number of texts per image if the batch is ragged.
        padding: what a padded text does: nothing (``"ignore"``), or stay in the softmax denominators as in the
            released code (``"published"``).
        backend: as for :func:`betaclip.kernels.similarity.similarity_logsumexp`.
        gather: contrast with the images and texts of all ranks: True or ``"all_gather"``, which holds all texts on each
            rank, or ``"ring"``, which holds one rank's at a time (``betaclip.losses.across_ranks``). ``"auto"``: as
            True if a process group of several ranks is initialised, else as False, this rank alone. The inputs are
            this rank's; numbers of images and texts may differ between ranks. Every rank returns the loss of the whole
            batch. Its gradients are W times the derivatives by this rank's inputs, so that their average over the W
            ranks, as DistributedDataParallel takes it, is the gradient of one process with the whole batch. All ranks
            must call the loss, and backpropagate the same multiple of it.
        process_group: the ranks to gather from; None for the default group.
        conditioned_negatives: (B, K, J), or (N, J) with ``image_index``: the cosines of each text with the embeddings
            that it pools from J other pictures (:meth:`betaclip.TextConditionedPool.score`), of any floating dtype.
        conditioned_mask: bool of the same shape, True = valid; leave out pictures that have an equal text of their own.
        conditioned_weight: weight of the term that these negatives add.

    Returns:
        () in accumulation dtype, nats: the mean over valid rows of each direction, then of both directions.
        0 if no text is valid.

    Raises:
        ValueError: an argument is malformed or disagrees with another; the message names it.
        NotImplementedError: the named backend cannot serve these inputs; the message says why.
        RuntimeError: ``gather`` other than ``"auto"`` without an initialised process group.

    Example:
        >>> import torch
        >>> from betaclip import beta_cal_ce_loss
        >>> embeds = torch.eye(4).view(2, 2, 4)  # 2 images with 2 texts each, all unlike
        >>> for beta in (0.0, 1.0):
        ...     print(f"{beta_cal_ce_loss(embeds, embeds, 1.0, beta=beta):.4f}")
        0.7437
        1.2437
    """
    return softmax_loss(
        "BetaCALLoss", image_embeds, text_embeds, logit_scale, beta, alpha, mask, image_index, pair_weights, padding,
        backend, gather=gather, process_group=process_group, conditioned_negatives=conditioned_negatives,
        conditioned_mask=conditioned_mask, conditioned_weight=conditioned_weight,
    )  # fmt: skip


@_eager_over_ranks
def softmax_loss(
    name: str,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    beta: Tensor | float,
    alpha: float,
    mask: Tensor | None,
    image_index: Tensor | None,
    pair_weights: Tensor | None,
    padding: str,
    backend: Backend,
    *,
    gather: bool | str,
    process_group: GroupLike | None,
    conditioned_negatives: Tensor | None = None,
    conditioned_mask: Tensor | None = None,
    conditioned_weight: float = 1.0,
) -> Tensor:
    """:func:`beta_cal_ce_loss` under the name by which ranks tell losses apart."""
    group = gathering_group(gather, process_group)
    batch = prepare(image_embeds, text_embeds, logit_scale, mask, image_index, padding)
    weights = weights_of_pairs(batch, alpha, beta, pair_weights)
    conditioned = prepare_conditioned(batch, conditioned_negatives, conditioned_mask)
    check_weight("conditioned_weight", conditioned_weight)
    layout = batch.layout if padding == "ignore" else batch.all_rows()
    valid_pairs = batch.valid_pairs()
    if valid_pairs is not None:
        weights = weights * valid_pairs
    # (B, K) sums over the targets of each row. A row without any, such as one that is not valid, does not count.
    totals = [weights.sum(dim - 3).expand(layout.images, layout.texts_per_image) for dim in (2, 1)]
    counts = [(total != 0).sum() for total in totals]
    between_x, between_y, cosines = contrast_logsumexp(
        batch.image, batch.text, batch.scale, layout, batch.dtype,
        _backend(backend, gather, group, batch, Call(name, "ce", padding, False, conditioned=conditioned is not None)),
    )  # fmt: skip
    between_x, between_y = (layout.to_slots(lse, -torch.inf) for lse in (between_x, between_y))
    logits = batch.scale * cosines
    contrasted = logits
    if valid_pairs is not None and padding == "ignore":
        # The smallest finite number, so that an image without any text has finite gradients.
        contrasted = logits.masked_fill(~valid_pairs, torch.finfo(logits.dtype).min)
    target = weights * logits
    losses = [
        _soft_cross_entropy(between_x, contrasted.logsumexp(2), target.sum(2), totals[0]),
        _soft_cross_entropy(between_y, contrasted.logsumexp(1), target.sum(1), totals[1]),
    ]
    if conditioned is not None:
        loss, count = conditioned.softmax_terms(cosines.diagonal(dim1=1, dim2=2), batch.scale)
        losses.append(loss)
        counts.append(count)
    sums, numbers = over_ranks(torch.stack(losses), torch.stack(counts), group)
    if pair_weights is None:
        warn_if_beta_cancels(image_embeds, batch, beta)
    means = sums / numbers.clamp_min(1)
    return means[:2].sum() / 2 + conditioned_weight * means[2:].sum()


@_eager_over_ranks
def beta_cal_bce_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    beta: Tensor | float = 0.5,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    image_index: Tensor | None = None,
    pair_weights: Tensor | None = None,
    padding: str = "ignore",
    divisor: str = "pairs",
    backend: Backend = "auto",
    gather: bool | str = "auto",
    process_group: GroupLike | None = None,
    conditioned_negatives: Tensor | None = None,
    conditioned_mask: Tensor | None = None,
    conditioned_weight: float = 1.0,
) -> Tensor:
    """Sigmoid form of β-CAL, without the (B·K)² similarity matrix.

    A pair of different images is a negative, a pair within an image a positive of weight w_ij (arXiv
    2512.12678; the released code has no ``alpha``, which is 1 there). Without mask, equivalent to:

        v, t = (F.normalize(e.float(), dim=-1).flatten(0, 1) for e in (image_embeds, text_embeds))
        s = logit_scale * v @ t.T + logit_bias
        w = torch.block_diag(*[beta + (alpha - beta) * torch.eye(K)] * B)
        same_image = torch.block_diag(*[torch.ones(K, K)] * B).bool()
        loss = torch.where(same_image, w * F.softplus(-s), F.softplus(s)).sum() / N**2

    in O(N·D + B·K²) memory, accumulated in float32 (float64 for float64 inputs); deterministic. For K = 1 and
    ``divisor="rows"`` it is SigLIP's loss, which divides by N.

    ``conditioned_negatives`` c, the cosines of a text with what it pools from other pictures, are further negatives:
    they add ``conditioned_weight * F.softplus(logit_scale * c + logit_bias).sum()`` to the sum, and nothing to N.

    Args:
        logit_bias: () added to every logit, may require a gradient; None for none.
        padding: padded texts take part in nothing; N counts valid texts (``"ignore"``), or is B·K as in the released
            code (``"published"``).
        divisor: ``"pairs"``, N² as in the released code; or ``"rows"``, N as in SigLIP. Gradients of the former are so
            small that float16 inputs lose many of them, unless a gradient scaler multiplies the loss.
        image_embeds, text_embeds, logit_scale, beta, alpha, mask, image_index, pair_weights, backend, gather,
        process_group, conditioned_negatives, conditioned_mask, conditioned_weight: as for :func:`beta_cal_ce_loss`.

    Returns:
        () in accumulation dtype, nats. 0 if no text is valid.

    Raises:
        ValueError, NotImplementedError, RuntimeError: as for :func:`beta_cal_ce_loss`.

    Example:
        >>> import torch
        >>> from betaclip import beta_cal_bce_loss
        >>> embeds = torch.eye(4).view(2, 2, 4)  # 2 images with 2 texts each, all unlike
        >>> for bias in (0.0, -5.0):
        ...     print(f"{beta_cal_bce_loss(embeds, embeds, 10.0, logit_bias=bias, beta=0.0):.4f}")
        0.3466
        0.0050
    """
    check_choice("divisor", divisor, DIVISORS)
    group = gathering_group(gather, process_group)
    batch = prepare(image_embeds, text_embeds, logit_scale, mask, image_index, padding)
    bias = None if logit_bias is None else as_scalar("logit_bias", logit_bias, batch.image, batch.scale.dtype)
    weights = weights_of_pairs(batch, alpha, beta, pair_weights)
    conditioned = prepare_conditioned(batch, conditioned_negatives, conditioned_mask)
    check_weight("conditioned_weight", conditioned_weight)
    call = Call("BetaCALLoss", "bce", padding, bias is not None, divisor, conditioned is not None)
    count = torch.full((), batch.image.shape[0], dtype=torch.int64, device=batch.image.device)
    if batch.valid is not None and padding == "ignore":
        count = batch.valid.sum()
    between, cosines = contrast_softplus(
        batch.image, batch.text, batch.scale, bias, batch.layout, batch.dtype,
        _backend(backend, gather, group, batch, call, bias),
    )  # fmt: skip
    logits = batch.scale * cosines
    if bias is not None:
        logits = logits + bias
    positives = weights * -F.logsigmoid(logits)  # softplus(-logits); F.softplus leaves out e^-20 beyond 20
    valid_pairs = batch.valid_pairs()
    if valid_pairs is not None:
        positives = positives * valid_pairs
    total = between + positives.sum()
    if conditioned is not None:
        total = total + conditioned_weight * conditioned.softplus_sum(batch.scale, bias)
    return sigmoid_mean(*over_ranks(total, count, group), divisor)


class BetaCALLoss(nn.Module):
    """β-CAL as a module: :func:`beta_cal_ce_loss` or :func:`beta_cal_bce_loss` with its options kept.

    Args:
        form: ``"ce"`` (softmax) or ``"bce"`` (sigmoid).
        beta: weight of the other texts of the same image. A tensor becomes a buffer; an ``nn.Parameter`` is learned
            (keep it >= 0, for example by a softplus: the loss does not clamp it).
        alpha: weight of the own text.
        padding: what padded texts do: ``"ignore"``, nothing; ``"published"``, as in the released code.
        divisor: of the sigmoid form, ``"pairs"`` (N², as in the released code) or ``"rows"`` (N, as in SigLIP); the
            softmax form is a mean over rows.
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"blockwise"`` or ``"reference"``.
        gather: ``"auto"``, False, True, ``"all_gather"`` or ``"ring"``: whether, and how, to contrast with the images
            and texts of all ranks; :func:`beta_cal_ce_loss` says what that means for gradients. ``"auto"`` does so
            wherever there are several ranks.
        process_group: the ranks to gather from, a ``ProcessGroup`` or a ``DeviceMesh`` of one dimension; None for the
            default group.
        conditioned_weight: weight of what ``conditioned_negatives`` add, in a batch that has them.

    Raises:
        ValueError: ``form``, ``padding``, ``backend``, ``gather`` or ``divisor`` is unknown, or the last is given for
            the softmax form; a weight is negative or not finite.

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
    ) -> None:
        super().__init__()
        check_choice("form", form, FORMS)
        check_choice("padding", padding, PADDINGS)
        check_choice("divisor", divisor, DIVISORS if form == "bce" else DIVISORS[:1])
        check_backend(backend)
        check_weight("alpha", alpha)
        check_weight("beta", beta)
        check_weight("conditioned_weight", conditioned_weight)
        check_gather(gather)
        self.form, self.alpha, self.padding, self.backend = form, alpha, padding, backend
        self.gather, self.process_group, self.divisor = gather, process_group, divisor
        self.conditioned_weight = conditioned_weight
        if isinstance(beta, Tensor) and not isinstance(beta, nn.Parameter):
            self.register_buffer("beta", beta)
        else:
            self.beta = beta

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

        Returns:
            () float32 (float64 for float64 inputs), in nats; 0 if no text is valid.

        Raises:
            ValueError: an argument is malformed or disagrees with another; the message names it.
            NotImplementedError: the named backend cannot serve these inputs; the message says why.
            RuntimeError: ``gather`` other than ``"auto"`` without an initialised process group.
        """
        options: Any = {
            "beta": self.beta,
            "alpha": self.alpha,
            "mask": mask,
            "image_index": image_index,
            "pair_weights": pair_weights,
            "padding": self.padding,
            "backend": self.backend,
            "gather": self.gather,
            "process_group": self.process_group,
            "conditioned_negatives": conditioned_negatives,
            "conditioned_mask": conditioned_mask,
            "conditioned_weight": self.conditioned_weight,
        }
        if self.form == "ce":
            return beta_cal_ce_loss(image_embeds, text_embeds, logit_scale, **options)
        return beta_cal_bce_loss(
            image_embeds, text_embeds, logit_scale, logit_bias=logit_bias, divisor=self.divisor, **options
        )

    def extra_repr(self) -> str:
        beta = "learned" if isinstance(self.beta, nn.Parameter) else float(self.beta)
        options = f"form={self.form!r}, beta={beta}, alpha={self.alpha}"
        options += "" if self.form == "ce" else f", divisor={self.divisor!r}"
        return f"{options}, padding={self.padding!r}, backend={self.backend!r}, gather={self.gather!r}"


def _soft_cross_entropy(between: Tensor, within: Tensor, target: Tensor, total: Tensor) -> Tensor:
    """() sum of logsumexp - sum_j q_ij S_ij over the rows that have a target. All arguments are (B, K); target is
    sum_j w_ij S_ij and total sum_j w_ij."""
    rows = total != 0
    loss = torch.logaddexp(between, within) - target / torch.where(rows, total, 1)
    return torch.where(rows, loss, 0).sum()


def gathering_group(gather: bool | str, process_group: GroupLike | None) -> ProcessGroup | None:
    """The ranks whose texts are contrasted; None for this rank alone."""
    if gather is False:
        if process_group is not None:
            raise ValueError("process_group: expected None without gather, got a group")
        return None
    check_gather(gather)
    if not (dist.is_available() and dist.is_initialized()):
        if gather == "auto":
            return None
        reason = "no process group is initialised (torch.distributed.init_process_group, under torchrun)"
        raise RuntimeError(f"gather={gather!r}: {reason}")
    group = ProcessGroup.of(process_group)
    return None if gather == "auto" and group.size == 1 else group


def _backend(
    backend: Backend,
    gather: bool | str,
    group: ProcessGroup | None,
    batch: Batch,
    call: Call,
    bias: Tensor | None = None,
) -> Backend:
    if group is None:
        return backend
    wanted = [t is not None and t.requires_grad for t in (batch.text, batch.image, batch.scale, bias)]
    transport = gather if isinstance(gather, str) and gather in TRANSPORTS else TRANSPORTS[0]
    return AcrossRanks(backend, transport, group, Wanted(any(wanted) and torch.is_grad_enabled(), wanted[0]), call)
