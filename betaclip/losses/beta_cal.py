"""β-CAL, the contrastive loss of β-CLIP (arXiv 2512.12678), and CLIP's loss, linear in memory.

B images with K texts each; a text conditions its image, so there are N = B * K image embeddings v_i and text
embeddings t_j, S_ij = logit_scale * cos(v_i, t_j). Text j is a positive of image embedding i with weight
w_ij: ``alpha`` for its own, ``beta`` for the other texts of its image, 0 for every other image.

Targets touch only pairs within one image, so every sum splits: between images, statistics from
``betaclip.losses.contrast`` that know no targets; within an image, a (B, K, K) block of ordinary PyTorch, here.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from betaclip.kernels.similarity.operators import BACKENDS
from betaclip.losses.contrast import Texts, contrast_logsumexp, contrast_softplus
from betaclip.losses.inputs import (
    FORMS,
    PADDINGS,
    Batch,
    as_scalar,
    check_choice,
    check_gather,
    check_tensor,
    check_weight,
    image_of_row,
    prepare,
    weights_of_pairs,
)
from betaclip.losses.ranks import TRANSPORTS, Group, Ranks


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
    backend: str = "auto",
    gather: bool | str = False,
    process_group: Group | None = None,
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
        backend: of :func:`betaclip.kernels.similarity.operators.similarity_logsumexp`.
        gather: contrast with the images and texts of all ranks: True or ``"all_gather"``, or ``"ring"``
            (``betaclip.losses.ranks`` has the difference). The inputs are this rank's; numbers of images and texts may
            differ between ranks. Every rank returns the loss of the whole batch, and its gradients are W times the
            derivatives by what it holds: averaged over the W ranks, as DistributedDataParallel does, parameters'
            gradients are those of one process with the whole batch. All ranks must backpropagate the same multiple.
        process_group: of these ranks; None for the default group.

    Returns:
        () in accumulation dtype, nats: the mean over valid rows of each direction, then of both directions.
        0 if no text is valid.

    Raises:
        ValueError: an argument is malformed or disagrees with another; the message names it.
        NotImplementedError: the named backend cannot serve these inputs; the message says why.
        RuntimeError: ``gather`` without an initialised process group.
    """
    ranks = _ranks(gather, process_group)
    batch = prepare(image_embeds, text_embeds, logit_scale, mask, image_index, padding)
    weights = weights_of_pairs(batch, alpha, beta, pair_weights)
    group = batch.texts.group if padding == "ignore" else image_of_row(batch)
    texts = Texts(batch.texts.images, batch.texts.texts, group, batch.texts.slots)
    if batch.valid is not None:
        weights = weights * (batch.valid.unsqueeze(2) & batch.valid.unsqueeze(1))
    # (B, K) sums over the targets of each row. A row without any, such as one that is not valid, does not count.
    totals = [weights.sum(dim - 3).expand(texts.images, texts.texts) for dim in (2, 1)]
    counts = torch.stack([(total != 0).sum() for total in totals])
    if ranks is not None:
        counts = _meet(ranks, batch, None, counts)
    between_x, between_y, cosines = contrast_logsumexp(
        batch.image, batch.text, batch.scale, texts, batch.dtype, backend, ranks
    )
    between_x, between_y = (texts.to_slots(lse, -torch.inf) for lse in (between_x, between_y))
    logits = batch.scale * cosines
    contrasted = logits
    if batch.valid is not None and padding == "ignore":
        # Finite, so that an image without any text has finite gradients.
        least = torch.finfo(logits.dtype).min
        contrasted = logits.masked_fill(~(batch.valid.unsqueeze(2) & batch.valid.unsqueeze(1)), least)
    target = weights * logits
    image_to_text = _soft_cross_entropy(between_x, contrasted.logsumexp(2), target.sum(2), totals[0], counts[0])
    text_to_image = _soft_cross_entropy(between_y, contrasted.logsumexp(1), target.sum(1), totals[1], counts[1])
    return _over_ranks((image_to_text + text_to_image) / 2, ranks)


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
    backend: str = "auto",
    gather: bool | str = False,
    process_group: Group | None = None,
) -> Tensor:
    """Sigmoid form of β-CAL, without the (B·K)² similarity matrix.

    A pair of different images is a negative, a pair within an image a positive of weight w_ij (arXiv
    2512.12678; the released code has no ``alpha``, which is 1 there). Without mask, equivalent to:

        v, t = (F.normalize(e.float(), dim=-1).flatten(0, 1) for e in (image_embeds, text_embeds))
        s = logit_scale * v @ t.T + logit_bias
        w = torch.block_diag(*[beta + (alpha - beta) * torch.eye(K)] * B)
        same_image = torch.block_diag(*[torch.ones(K, K)] * B).bool()
        loss = torch.where(same_image, w * F.softplus(-s), F.softplus(s)).sum() / N**2

    in O(N·D + B·K²) memory, accumulated in float32 (float64 for float64 inputs); deterministic. For K = 1 it
    is 1 / N of SigLIP's loss, which divides by N.

    Args:
        logit_bias: () added to every logit, may require a gradient; None for none.
        padding: padded texts take part in nothing; the divisor is the square of the number of valid texts
            (``"ignore"``) or (B·K)² as in the released code (``"published"``).
        image_embeds, text_embeds, logit_scale, beta, alpha, mask, image_index, pair_weights, backend, gather,
        process_group: as for :func:`beta_cal_ce_loss`.

    Returns:
        () in accumulation dtype, nats. 0 if no text is valid.

    Raises:
        ValueError, NotImplementedError, RuntimeError: as for :func:`beta_cal_ce_loss`.
    """
    ranks = _ranks(gather, process_group)
    batch = prepare(image_embeds, text_embeds, logit_scale, mask, image_index, padding)
    bias = None if logit_bias is None else as_scalar("logit_bias", logit_bias, batch.image, batch.scale.dtype)
    weights = weights_of_pairs(batch, alpha, beta, pair_weights)
    count = torch.full((), batch.image.shape[0], dtype=torch.int64, device=batch.image.device)
    if batch.valid is not None and padding == "ignore":
        count = batch.valid.sum()
    if ranks is not None:
        (count,) = _meet(ranks, batch, bias, count[None])
    between, cosines = contrast_softplus(
        batch.image, batch.text, batch.scale, bias, batch.texts, batch.dtype, backend, ranks
    )
    logits = batch.scale * cosines
    if bias is not None:
        logits = logits + bias
    positives = weights * F.softplus(-logits)
    if batch.valid is not None:
        positives = positives * (batch.valid.unsqueeze(2) & batch.valid.unsqueeze(1))
    return _over_ranks((between + positives.sum()) / count.to(logits.dtype).clamp_min(1) ** 2, ranks)


class BetaCALLoss(nn.Module):
    """β-CAL as a module: :func:`beta_cal_ce_loss` or :func:`beta_cal_bce_loss` with its options kept.

    Args:
        form: ``"ce"`` (softmax) or ``"bce"`` (sigmoid).
        beta: weight of the other texts of the same image; a tensor becomes a buffer, an ``nn.Parameter`` is learned
            (keep it >= 0, for example by a softplus: the loss takes it as it is).
        alpha: weight of the own text.
        padding: ``"ignore"`` or ``"published"``.
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"blockwise"`` or ``"reference"``.
        gather: contrast with the images and texts of all ranks of ``process_group``; True, ``"all_gather"`` or
            ``"ring"``. :func:`beta_cal_ce_loss` has what that means for gradients.

    Raises:
        ValueError: unknown form, padding, backend or way to gather; a negative weight.
    """

    def __init__(
        self,
        form: str = "ce",
        beta: Tensor | float = 0.5,
        alpha: float = 1.0,
        padding: str = "ignore",
        backend: str = "auto",
        gather: bool | str = False,
        process_group: Group | None = None,
    ) -> None:
        super().__init__()
        check_choice("form", form, FORMS)
        check_choice("padding", padding, PADDINGS)
        check_choice("backend", backend, ("auto", *BACKENDS))
        check_weight("alpha", alpha)
        check_weight("beta", beta)
        check_gather(gather)
        self.form, self.alpha, self.padding, self.backend = form, alpha, padding, backend
        self.gather, self.process_group = gather, process_group
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
    ) -> Tensor:
        """The loss, (). ``logit_bias`` is of the sigmoid form only: a softmax does not see it."""
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
        }
        if self.form == "ce":
            return beta_cal_ce_loss(image_embeds, text_embeds, logit_scale, **options)
        return beta_cal_bce_loss(image_embeds, text_embeds, logit_scale, logit_bias=logit_bias, **options)

    def extra_repr(self) -> str:
        beta = "learned" if isinstance(self.beta, nn.Parameter) else float(self.beta)
        options = f"form={self.form!r}, beta={beta}, alpha={self.alpha}"
        return f"{options}, padding={self.padding!r}, backend={self.backend!r}, gather={self.gather!r}"


class ClipLoss(nn.Module):
    """CLIP's loss of one text per image: β-CAL's softmax form at K = 1, the same kernel.

    Equivalent to:

        v, t = F.normalize(image_embeds.float(), dim=-1), F.normalize(text_embeds.float(), dim=-1)
        s, own = logit_scale * v @ t.T, torch.arange(B)
        loss = (F.cross_entropy(s, own) + F.cross_entropy(s.T, own)) / 2

    in O(B·D) memory.

    Args:
        backend: of :func:`betaclip.kernels.similarity.operators.similarity_logsumexp`.
        gather, process_group: as for :class:`BetaCALLoss`.
    """

    def __init__(
        self,
        backend: str = "auto",
        gather: bool | str = False,
        process_group: Group | None = None,
    ) -> None:
        super().__init__()
        check_choice("backend", backend, ("auto", *BACKENDS))
        check_gather(gather)
        self.backend, self.gather, self.process_group = backend, gather, process_group

    def forward(self, image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float) -> Tensor:
        """() from (B, D) image and text embeddings, any norm, and the () inverse temperature."""
        for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
            check_tensor(name, embeds)
            if embeds.dim() != 2:
                raise ValueError(f"{name}: expected (B, D), got shape {tuple(embeds.shape)}")
        if text_embeds.shape != image_embeds.shape:
            expected, got = tuple(image_embeds.shape), tuple(text_embeds.shape)
            raise ValueError(f"text_embeds: expected shape {expected} as image_embeds, got {got}")
        return beta_cal_ce_loss(
            image_embeds.unsqueeze(1), text_embeds.unsqueeze(1), logit_scale, beta=0.0, backend=self.backend,
            gather=self.gather, process_group=self.process_group,
        )  # fmt: skip


def _soft_cross_entropy(between: Tensor, within: Tensor, target: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """() mean over the rows that count of logsumexp - sum_j q_ij S_ij; of the mean over the rows of all ranks, the part
    of this rank's. All but ``count`` are (B, K); target: sum_j w_ij S_ij."""
    rows = total != 0
    loss = torch.logaddexp(between, within) - target / torch.where(rows, total, 1)
    return torch.where(rows, loss, 0).sum() / count.clamp_min(1)


def _ranks(gather: bool | str, process_group: Group | None) -> Ranks | None:
    if gather is False:
        if process_group is not None:
            raise ValueError("process_group: expected None without gather, got a group")
        return None
    check_gather(gather)
    if not (dist.is_available() and dist.is_initialized()):
        reason = "no process group is initialised (torch.distributed.init_process_group, under torchrun)"
        raise RuntimeError(f"gather={gather!r}: {reason}")
    return Ranks(TRANSPORTS[0] if isinstance(gather, bool) else gather, process_group)


def _meet(ranks: Ranks, batch: Batch, bias: Tensor | None, counts: Tensor) -> Tensor:
    """:meth:`Ranks.meet` with what gradients this rank will want."""
    wanted = [t is not None and t.requires_grad for t in (batch.text, batch.image, batch.scale, bias)]
    rows, dim = batch.image.shape
    return ranks.meet(rows, dim, batch.dtype, (any(wanted) and torch.is_grad_enabled(), wanted[0]), counts)


def _over_ranks(share: Tensor, ranks: Ranks | None) -> Tensor:
    """The sum of all ranks' shares, with W times the gradient of this rank's: an average over ranks undoes that."""
    if ranks is None:
        return share
    scaled = ranks.count * share
    return scaled + (ranks.sum(share) - scaled.detach())
