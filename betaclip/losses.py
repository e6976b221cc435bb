"""β-CAL, the contrastive loss of β-CLIP (arXiv 2512.12678), and CLIP's loss, linear in memory.

B images with K texts each; a text conditions its image, so there are N = B * K image embeddings v_i and text
embeddings t_j, S_ij = logit_scale * cos(v_i, t_j). Text j is a positive of image embedding i with weight
w_ij: ``alpha`` for its own, ``beta`` for the other texts of its image, 0 for every other image.

Targets touch only pairs within one image, so every sum splits: between images, statistics from
``betaclip.contrast`` that know no targets; within an image, a (B, K, K) block of ordinary PyTorch, here.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from betaclip.contrast import Texts, contrast_logsumexp, contrast_softplus
from betaclip.kernels.operand import DTYPES, accumulation_dtype
from betaclip.kernels.similarity import BACKENDS
from betaclip.ranks import TRANSPORTS, Group, Ranks

FORMS = ("ce", "bce")
PADDINGS = ("ignore", "published")


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
        backend: of :func:`betaclip.kernels.similarity.similarity_logsumexp`.
        gather: contrast with the images and texts of all ranks: True or ``"all_gather"``, or ``"ring"``
            (``betaclip.ranks`` has the difference). The inputs are this rank's; numbers of images and texts may
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
    batch = _prepare(image_embeds, text_embeds, logit_scale, mask, image_index, padding)
    weights = _pair_weights(batch, alpha, beta, pair_weights)
    group = batch.texts.group if padding == "ignore" else _image_of_row(batch)
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
    batch = _prepare(image_embeds, text_embeds, logit_scale, mask, image_index, padding)
    bias = None if logit_bias is None else _scalar("logit_bias", logit_bias, batch.image, batch.scale.dtype)
    weights = _pair_weights(batch, alpha, beta, pair_weights)
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
        _check_choice("form", form, FORMS)
        _check_choice("padding", padding, PADDINGS)
        _check_choice("backend", backend, ("auto", *BACKENDS))
        _check_weight("alpha", alpha)
        _check_weight("beta", beta)
        _check_gather(gather)
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
        backend: of :func:`betaclip.kernels.similarity.similarity_logsumexp`.
        gather, process_group: as for :class:`BetaCALLoss`.
    """

    def __init__(
        self,
        backend: str = "auto",
        gather: bool | str = False,
        process_group: Group | None = None,
    ) -> None:
        super().__init__()
        _check_choice("backend", backend, ("auto", *BACKENDS))
        _check_gather(gather)
        self.backend, self.gather, self.process_group = backend, gather, process_group

    def forward(self, image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float) -> Tensor:
        """() from (B, D) image and text embeddings, any norm, and the () inverse temperature."""
        for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
            _check_tensor(name, embeds)
            if embeds.dim() != 2:
                raise ValueError(f"{name}: expected (B, D), got shape {tuple(embeds.shape)}")
        if text_embeds.shape != image_embeds.shape:
            expected, got = tuple(image_embeds.shape), tuple(text_embeds.shape)
            raise ValueError(f"text_embeds: expected shape {expected} as image_embeds, got {got}")
        return beta_cal_ce_loss(
            image_embeds.unsqueeze(1), text_embeds.unsqueeze(1), logit_scale, beta=0.0, backend=self.backend,
            gather=self.gather, process_group=self.process_group,
        )  # fmt: skip


class _Batch(NamedTuple):
    """Checked inputs. image, text: (N, D); scale: () in accumulation dtype; valid: (B, K) bool or None (all)."""

    image: Tensor
    text: Tensor
    scale: Tensor
    texts: Texts
    valid: Tensor | None
    dtype: torch.dtype


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
    _check_gather(gather)
    if not (dist.is_available() and dist.is_initialized()):
        reason = "no process group is initialised (torch.distributed.init_process_group, under torchrun)"
        raise RuntimeError(f"gather={gather!r}: {reason}")
    return Ranks(TRANSPORTS[0] if isinstance(gather, bool) else gather, process_group)


def _meet(ranks: Ranks, batch: _Batch, bias: Tensor | None, counts: Tensor) -> Tensor:
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


def _prepare(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    mask: Tensor | None,
    image_index: Tensor | None,
    padding: str,
) -> _Batch:
    _check_choice("padding", padding, PADDINGS)
    if padding == "published" and image_index is not None:
        raise ValueError("padding: expected 'ignore' with image_index (a ragged batch has no padding), got 'published'")
    _check_embeddings(image_embeds, text_embeds, mask, image_index)
    dtype = torch.promote_types(image_embeds.dtype, text_embeds.dtype)
    device_type = image_embeds.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    scale = _scalar("logit_scale", logit_scale, image_embeds, accumulation_dtype(dtype))
    if image_index is not None:
        texts = _ragged(image_index)
        assert texts.slots is not None
        return _Batch(image_embeds, text_embeds, scale, texts, texts.slots >= 0, dtype)
    images, count, _ = image_embeds.shape
    group = torch.arange(images, dtype=torch.int32, device=image_embeds.device).repeat_interleave(count)
    if mask is not None:
        group = torch.where(mask.flatten(), group, -1)
    texts = Texts(images, count, group, None)
    return _Batch(image_embeds.flatten(0, 1), text_embeds.flatten(0, 1), scale, texts, mask, dtype)


def _check_embeddings(
    image_embeds: Tensor, text_embeds: Tensor, mask: Tensor | None, image_index: Tensor | None
) -> None:
    layout = "(B, K, D), or (N, D) with image_index" if image_index is None else "(N, D) with image_index"
    for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        _check_tensor(name, embeds)
        if embeds.dtype not in DTYPES:
            raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {embeds.dtype}")
        if embeds.dim() != (3 if image_index is None else 2):
            raise ValueError(f"{name}: expected {layout}, got shape {tuple(embeds.shape)}")
    if text_embeds.shape != image_embeds.shape:
        expected, got = tuple(image_embeds.shape), tuple(text_embeds.shape)
        raise ValueError(f"text_embeds: expected shape {expected} as image_embeds, got {got}")
    rows = image_embeds.shape[:-1]
    for name, value, shape in (("mask", mask, rows), ("image_index", image_index, rows)):
        if value is None:
            continue
        _check_tensor(name, value)
        if name == "mask" and image_index is not None:
            raise ValueError("mask: expected None with image_index (leave padded rows out instead), got a tensor")
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
        if name == "mask" and value.dtype != torch.bool:
            raise ValueError(f"mask: expected dtype torch.bool (True = valid), got {value.dtype}")
        if name == "image_index" and value.dtype not in (
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
        ):
            raise ValueError(f"image_index: expected an integer dtype, got {value.dtype}")
    for name, value in (("text_embeds", text_embeds), ("mask", mask), ("image_index", image_index)):
        if value is not None and value.device != image_embeds.device:
            raise ValueError(f"{name}: expected device {image_embeds.device} as image_embeds, got {value.device}")


def _ragged(image_index: Tensor) -> Texts:
    """Slots of a ragged batch. Reads four numbers back to the host: the check, and the slots' shape."""
    index = image_index.to(torch.int64)
    rows = torch.arange(len(index), device=index.device)
    if len(index) == 0:
        return Texts(0, 0, index.to(torch.int32), index.view(0, 0))
    position = rows - torch.searchsorted(index, index)
    image = (position == 0).cumsum(0) - 1
    unsorted, least, images, texts = torch.stack(
        ((index[1:] < index[:-1]).any().to(torch.int64), index.min(), image[-1] + 1, position.max() + 1)
    ).tolist()
    if unsorted:
        raise ValueError("image_index: expected sorted values, rows of one image next to each other, got unsorted ones")
    if least < 0:
        raise ValueError(f"image_index: expected values >= 0, got {least}")
    slots = torch.full((images, texts), -1, dtype=torch.int64, device=index.device)
    slots[image, position] = rows
    return Texts(images, texts, image.to(torch.int32), slots)


def _image_of_row(batch: _Batch) -> Tensor:
    """(N,) int32 image of each row, padded rows included."""
    if batch.texts.slots is not None:
        return batch.texts.group
    rows = torch.arange(batch.texts.images, dtype=torch.int32, device=batch.image.device)
    return rows.repeat_interleave(batch.texts.texts)


def _pair_weights(batch: _Batch, alpha: float, beta: Tensor | float, pair_weights: Tensor | None) -> Tensor:
    """(K, K) or (B, K, K) weights in accumulation dtype."""
    images, texts, like = batch.texts.images, batch.texts.texts, batch.scale
    if pair_weights is not None:
        _check_tensor("pair_weights", pair_weights)
        shapes = ((texts, texts), (images, texts, texts))
        if tuple(pair_weights.shape) not in shapes:
            raise ValueError(
                f"pair_weights: expected shape {shapes[0]} or {shapes[1]}, got {tuple(pair_weights.shape)}"
            )
        if pair_weights.is_complex():
            raise ValueError(f"pair_weights: expected real weights, got {pair_weights.dtype}")
        if pair_weights.device != like.device:
            raise ValueError(f"pair_weights: expected device {like.device}, got {pair_weights.device}")
        return pair_weights.to(like.dtype)
    _check_weight("alpha", alpha)
    _check_weight("beta", beta)
    own = torch.eye(texts, dtype=like.dtype, device=like.device)
    return alpha * own + _scalar("beta", beta, like, like.dtype) * (1 - own)


def _scalar(name: str, value: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """() on the device of ``like``; a one-element tensor counts as a scalar, as in SigLIP's models."""
    if isinstance(value, int | float):
        return torch.full((), float(value), dtype=dtype, device=like.device)  # unlike torch.tensor, no copy to wait for
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point scalar, got {value.dtype} of shape {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {value.device}")
    return value.reshape(()).to(dtype)


def _check_gather(gather: object) -> None:
    if not isinstance(gather, bool) and gather not in TRANSPORTS:
        raise ValueError(f"gather: expected a bool, {' or '.join(map(repr, TRANSPORTS))}, got {gather!r}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_weight(name: str, value: Tensor | float) -> None:
    """Numbers are checked, and constant tensors on the CPU; others are taken as they are, without reading them."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.requires_grad or value.numel() != 1 or torch.compiler.is_compiling():
            return
        value = float(value)
    if not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite weight >= 0, got {value!r}")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if hasattr(value, "device_mesh"):
        raise ValueError(
            f"{name}: expected this rank's own tensor, got a DTensor (pass its to_local(), and gather=True)"
        )
