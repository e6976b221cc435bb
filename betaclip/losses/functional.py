"""β-CAL, the contrastive loss of β-CLIP (arXiv 2512.12678), linear in memory.

B images with K texts each; a text conditions its image, so there are N = B * K image embeddings v_i and text
embeddings t_j, S_ij = logit_scale * cos(v_i, t_j). Text j is a positive of image embedding i with weight
w_ij: ``alpha`` for its own, ``beta`` for the other texts of its image, 0 for every other image.

Targets touch only pairs within one image, so every sum splits: between images, statistics that know no targets, from
``betaclip.kernels.similarity.operators``; within an image, a (B, K, K) block of ordinary PyTorch, here.
"""

from torch import Tensor

from betaclip.kernels.similarity.operators import Backend
from betaclip.losses.formulas import GroupLike, Inputs, Options, sigmoid_loss, softmax_loss
from betaclip.losses.prefixes import Dims


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
    weights: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    strict: bool = False,
    extra_texts: Tensor | None = None,
    extra_mask: Tensor | None = None,
    text_ids: Tensor | None = None,
    extra_text_ids: Tensor | None = None,
    keep: int | str = "auto",
    dims: Dims | None = None,
) -> Tensor:
    """Softmax form of β-CAL, without the (B·K)² similarity matrix.

    Row i is compared with a target of weight ``alpha`` on its own text, ``beta`` on the other valid texts of
    its image and 0 elsewhere, normalised to sum to 1 (arXiv 2512.12678). Without mask, equivalent to:

        v, t = (F.normalize(e.float(), dim=-1).flatten(0, 1) for e in (image_embeds, text_embeds))
        s = logit_scale * v @ t.T
        w = torch.block_diag(*[beta + (alpha - beta) * torch.eye(K)] * B)
        loss = (F.cross_entropy(s, w / w.sum(1, keepdim=True))
              + F.cross_entropy(s.T, w.T / w.T.sum(1, keepdim=True))) / 2

    in O(N·D + B·K²) memory and what ``keep`` allows, accumulated in float32 (float64 for float64 inputs);
    deterministic.

    ``conditioned_negatives`` c, the cosines of a text with what it pools from other pictures, add
    ``conditioned_weight`` times the mean, over the texts that have one, of

        own = F.cosine_similarity(image_embeds, text_embeds, dim=-1)
        logits = logit_scale * torch.cat((own[..., None], c), -1)
        logits.logsumexp(-1) - logits[..., 0]

    which is log(1 + J) if the embeddings do not depend on the picture.

    ``label_smoothing`` ε gives every text of the batch the same share of a row's target, without an N² target: the mean
    of a row's logits is its logit with the mean text. Equivalent to ``F.cross_entropy(…, label_smoothing=ε)``, or to

        target = (1 - ε) * (w * s).sum(1) / w.sum(1) + ε * logit_scale * v @ t.mean(0)
        rows = s.logsumexp(1) - target

    and likewise for ``s.T``.

    ``extra_texts`` are further negatives of every image embedding, columns that belong to no image: in the loss of rows
    ``s`` becomes ``torch.cat((s, logit_scale * v @ F.normalize(extra_texts, dim=-1).T), 1)`` and ``w`` gets E columns
    of 0. This takes 8·N·E·D FLOP (6 if they need no gradient) and O((N + E)·D) memory. The loss of columns stays as it
    is.

    With ``text_ids``, pairs of different images whose texts are equal are left out of the denominators, since they are
    not negatives; ``s.logsumexp(1)`` becomes

        ids, same_image = text_ids.flatten(), torch.block_diag(*[torch.ones(K, K)] * B).bool()
        s.masked_fill((ids[:, None] == ids) & (ids >= 0) & ~same_image, -torch.inf).logsumexp(1)

    With ``weights`` u both directions are weighted means, ``(u * rows).sum() / u.sum()``.

    ``dims`` train embeddings that can be cut to fewer numbers (Matryoshka, arXiv 2205.13147). Equivalent to:

        loss = sum(beta_cal_ce_loss(image_embeds[..., :d], text_embeds[..., :d], ...) for d in dims)

    where each prefix is normalised by itself. The backends ``"blockwise"`` and ``"triton"`` form it in one pass:
    products of a shorter prefix are partial sums of a longer one's, and each slice of the embeddings receives one
    product as its gradient, so that all products together are those of the longest prefix. ``"cuda"`` takes a pass for
    each prefix.

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
        padding: ``"ignore"`` leaves padded texts out; with ``"published"`` they stay in the softmax denominators, as in
            the released code.
        backend: as for :func:`betaclip.kernels.similarity.similarity_logsumexp`.
        gather: how to contrast with the images and texts of all ranks: True or ``"all_gather"`` holds all texts on each
            rank, ``"ring"`` one rank's at a time (``betaclip.losses.across_ranks``), and False contrasts this rank's
            alone. ``"auto"`` is True if a process group of several ranks is initialised, else False. The inputs are
            this rank's; numbers of images and texts may differ between ranks. Every rank returns the loss of the whole
            batch. Its gradients are W times the derivatives by this rank's inputs, so that their average over the W
            ranks, as DistributedDataParallel takes it, is the gradient of one process with the whole batch. All ranks
            must call the loss, and backpropagate the same multiple of it.
        process_group: the ranks to gather from; None for the default group.
        conditioned_negatives: (B, K, J), or (N, J) with ``image_index``: the cosines of each text with the embeddings
            that it pools from J other pictures (:meth:`betaclip.TextConditionedPool.score`), of any floating dtype.
        conditioned_mask: bool of the same shape, True = valid; leave out pictures that have an equal text of their own.
        conditioned_weight: weight of the term that these negatives add.
        weights: (B, K), or (N,) with ``image_index``: constants, each the weight of a row and of a column.
        reduction: ``"mean"``; or ``"none"`` for the loss of each text, the mean of its two directions times its weight.
            Any function of these may be differentiated. Over several ranks, each gets the losses of its own texts, and
            the gradients are those of the sum over ranks of whatever each computes from them.
        label_smoothing: ε from 0 to 1, the part of each row's target that all texts share; 0 with ``text_ids``, whose
            pairs have no logit.
        strict: on a GPU, raise a NotImplementedError where ``backend="auto"`` would leave the work to a slower backend
            than the fused one; the message says why. :func:`betaclip.backend_runs` counts what has run.
        extra_texts: (E, D) embeddings of texts that belong to none of the images, any norm, such as hard captions, or
            texts of earlier batches (detached). Over several ranks, the extra texts of each rank are negatives on all
            ranks. Every rank must pass them, of any number: (0, D) for none.
        extra_mask: (E,) bool, True = valid; the others take part in nothing and may hold anything.
        text_ids: (B, K), or (N,) with ``image_index``: any integers, equal for equal texts, also on different ranks,
            such as hashes of their words; negative for a text that equals no other.
        extra_text_ids: (E,) the same for the extra texts; without them these equal no other.
        keep: how many bytes of exponentials may be kept from forward to backward. If all fit, 4·N² bytes (8·N² in
            float64), the loss takes 6·N²·D FLOP instead of 8; otherwise as many blocks are kept as fit. Gradients have
            the same bits whatever is kept. ``"auto"``: 256 MiB on the CPU, 0 elsewhere. Only the backend
            ``"blockwise"`` on a single rank keeps any. ``extra_texts`` have a budget of the same size.
        dims: lengths of prefixes of the embeddings, none longer than D, in any order; None for whole embeddings. A
            sequence such as ``(512, 256, 128)`` gives each loss the weight 1; a mapping such as
            ``{512: 1.0, 256: 0.5, 128: 0.25}`` gives each its own. From sentence-transformers' ``MatryoshkaLoss``:
            ``dict(zip(matryoshka_dims, matryoshka_weights))``. All prefixes have the same ``logit_scale``. Conditioned
            negatives, which are cosines of whole embeddings, join the loss of the longest prefix.

    Returns:
        () in accumulation dtype, nats: the (weighted) mean over valid rows of each direction, then of both directions.
        0 if no text is valid. With ``reduction="none"`` (B, K), or (N,) with ``image_index``; 0 for padded texts.

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
        >>> options = {"beta": 0.0, "logit_scale": 1.0}
        >>> for row in beta_cal_ce_loss(embeds, embeds, **options, reduction="none").tolist():
        ...     print([round(loss, 4) for loss in row])
        [0.7437, 0.7437]
        [0.7437, 0.7437]
        >>> print(f"{beta_cal_ce_loss(embeds, embeds, **options, label_smoothing=0.1):.4f}")
        0.8187
        >>> print(f"{beta_cal_ce_loss(embeds, embeds, **options, extra_texts=-embeds[0]):.4f}")
        0.8723
        >>> same = torch.zeros(2, 2, dtype=torch.int64)  # all texts are equal: log(e + 1) - 1
        >>> print(f"{beta_cal_ce_loss(embeds, embeds, **options, text_ids=same):.4f}")
        0.3133
        >>> print(f"{beta_cal_ce_loss(embeds[..., :3], embeds[..., :3], **options):.4f}")
        0.9043
        >>> print(f"{beta_cal_ce_loss(embeds, embeds, **options, dims={4: 1.0, 3: 0.5}):.4f}")  # 0.7437 + 0.5 * 0.9043
        1.1958
    """
    inputs = Inputs(
        image_embeds, text_embeds, logit_scale, mask=mask, image_index=image_index, pair_weights=pair_weights,
        weights=weights, conditioned_negatives=conditioned_negatives, conditioned_mask=conditioned_mask,
        extra_texts=extra_texts, extra_mask=extra_mask,
        text_ids=text_ids, extra_text_ids=extra_text_ids,
    )  # fmt: skip
    options = Options(
        beta=beta, alpha=alpha, padding=padding, backend=backend, gather=gather, process_group=process_group,
        conditioned_weight=conditioned_weight, reduction=reduction, label_smoothing=label_smoothing,
        strict=strict, keep=keep, dims=dims,
    )  # fmt: skip
    return softmax_loss(inputs, options)


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
    weights: Tensor | None = None,
    reduction: str = "mean",
    strict: bool = False,
    extra_texts: Tensor | None = None,
    extra_mask: Tensor | None = None,
    text_ids: Tensor | None = None,
    extra_text_ids: Tensor | None = None,
    dims: Dims | None = None,
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

    ``extra_texts`` are further negatives of every image embedding. They add the sum of

        F.softplus(logit_scale * v @ F.normalize(extra_texts, dim=-1).T + logit_bias)

    and nothing to N, for 6·N·E·D FLOP (4 if they need no gradient).

    With ``text_ids``, pairs of different images whose texts are equal are left out of the sum.

    A row is the loss of one image embedding with all texts: their mean (``divisor="pairs"``) or their sum
    (``"rows"``). ``reduction="none"`` returns rows; with ``weights`` u the loss is ``(u * rows).sum() / u.sum()``:

        rows = torch.where(same_image, w * F.softplus(-s), F.softplus(s)).sum(1) / (N if divisor == "pairs" else 1)

    Args:
        logit_bias: () added to every logit of all prefixes, may require a gradient; None for none.
        padding: padded texts are left out in either case; N is the number of valid texts (``"ignore"``), or B·K as in
            the released code (``"published"``).
        divisor: ``"pairs"``, N² as in the released code; or ``"rows"``, N as in SigLIP. Gradients of the former are so
            small that float16 inputs lose many of them, unless a gradient scaler multiplies the loss.
        weights: (B, K), or (N,) with ``image_index``: constants, each the weight of a row.
        image_embeds, text_embeds, logit_scale, beta, alpha, mask, image_index, pair_weights, backend, gather,
        process_group, conditioned_negatives, conditioned_mask, conditioned_weight, reduction, strict, extra_texts,
        extra_mask, text_ids, extra_text_ids, dims: as for :func:`beta_cal_ce_loss`. A mean is formed together
        with its gradient; the rows of ``reduction="none"`` form their logits again in the backward (8·N²·D FLOP
        instead of 6).

    Returns:
        () in accumulation dtype, nats. 0 if no text is valid. With ``reduction="none"`` (B, K), or (N,) with
        ``image_index``; 0 for padded texts.

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
        >>> rows = beta_cal_bce_loss(embeds, embeds, 10.0, logit_bias=-5.0, beta=0.0, reduction="none")
        >>> print(f"{rows.sum() / 4:.4f}")
        0.0050
    """
    inputs = Inputs(
        image_embeds, text_embeds, logit_scale, mask=mask, image_index=image_index, logit_bias=logit_bias,
        pair_weights=pair_weights, weights=weights, conditioned_negatives=conditioned_negatives,
        conditioned_mask=conditioned_mask, extra_texts=extra_texts, extra_mask=extra_mask,
        text_ids=text_ids, extra_text_ids=extra_text_ids,
    )  # fmt: skip
    options = Options(
        beta=beta, alpha=alpha, padding=padding, backend=backend, gather=gather, process_group=process_group,
        divisor=divisor, conditioned_weight=conditioned_weight, reduction=reduction, strict=strict,
        dims=dims,
    )  # fmt: skip
    return sigmoid_loss(inputs, options)
