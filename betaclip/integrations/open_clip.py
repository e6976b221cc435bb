"""open_clip's losses by betaclip's kernels, and image, patch and text embeddings of open_clip's models.

``ClipLoss`` and ``SigLipLoss`` take the arguments of open_clip's own, in their constructors and calls, so that
open_clip's trainer runs with them; ``BetaCALLoss`` adds β-CAL's. Values are open_clip's up to rounding, with two
differences on several ranks, whatever the flags:

* Each rank returns the loss of the whole batch. open_clip's is that of the rank's own images with ``local_loss`` and in
  ``SigLipLoss``; its mean over ranks is the same.
* Averaged by DistributedDataParallel, gradients are those of one process with the whole batch. With open_clip's default
  flags, neither ``local_loss`` nor ``gather_with_grad``, those of the towers are 1/W of that on W ranks.

Features are normalised here too. Those of open_clip's models are normalised already, so neither values nor the
gradients of parameters change.
"""

from typing import Any

import torch.distributed as dist
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from betaclip.integrations.embeddings import Embeddings
from betaclip.kernels.similarity.operators import Backend
from betaclip.losses import beta_cal, clip, siglip
from betaclip.losses.across_ranks import TRANSPORTS
from betaclip.losses.inputs import check_choice

_TRANSPORTS = {None: "all_gather", "gather": "all_gather", "reduce": "all_gather", "bidir": "ring", "shift": "ring"}


class ClipLoss(nn.Module):
    """open_clip's ``ClipLoss`` in memory linear in the batch.

    Args:
        local_loss, gather_with_grad, cache_labels: accepted; they change nothing, as the module's docstring says.
        rank, world_size: of the default process group. With ``world_size=1`` the loss is of this rank's batch alone.
        use_horovod: must be False.
        transport: ``"all_gather"`` or ``"ring"``: how texts move between ranks, see :func:`betaclip.beta_cal_ce_loss`.
        backend: as for :class:`betaclip.ClipLoss`.

    Raises:
        ValueError: ``rank`` and ``world_size`` are not those of the process group; ``transport`` or ``backend`` is
            unknown.
        NotImplementedError: ``use_horovod``.

    Example:
        >>> import open_clip, torch
        >>> from betaclip.integrations.open_clip import ClipLoss
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 32), dim=-1)
        >>> out = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(14.3)}
        >>> ours, theirs = (loss(**out, output_dict=True) for loss in (ClipLoss(), open_clip.ClipLoss()))
        >>> torch.allclose(ours["contrastive_loss"], theirs["contrastive_loss"])
        True
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        transport: str = "all_gather",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.loss = clip.ClipLoss(backend, _gather(rank, world_size, transport, use_horovod))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of one batch.

        Args:
            image_features, text_features: (B, D).
            logit_scale: () inverse temperature, after exp.
            logit_bias: cancels in the softmax; its gradient is 0.
            output_dict: return ``{"contrastive_loss": loss}``.

        Returns:
            () float32, or float64 for float64 features.
        """
        return _result(self.loss(image_features, text_features, logit_scale), logit_bias, output_dict)


class SigLipLoss(nn.Module):
    """open_clip's ``SigLipLoss`` in memory linear in the batch.

    Args:
        cache_labels: accepted; it changes nothing.
        rank, world_size: as for :class:`ClipLoss`.
        dist_impl: ``"bidir"`` and ``"shift"`` send texts round a ring, ``"gather"``, ``"reduce"`` and None gather them.
        backend: as for :class:`betaclip.SigLipLoss`.

    Raises:
        ValueError: as for :class:`ClipLoss`; ``dist_impl`` is unknown.

    Example:
        >>> import torch
        >>> from betaclip.integrations.open_clip import SigLipLoss
        >>> image = text = torch.eye(4)
        >>> SigLipLoss()(image, text, torch.tensor(10.0), torch.tensor(-10.0), output_dict=True).keys()
        dict_keys(['contrastive_loss'])
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if dist_impl not in _TRANSPORTS:
            names = ", ".join(map(repr, _TRANSPORTS))
            raise ValueError(f"dist_impl: expected one of {names}, got {dist_impl!r}")
        self.loss = siglip.SigLipLoss(backend, _gather(rank, world_size, _TRANSPORTS[dist_impl]))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of one batch.

        Args:
            image_features, text_features: (B, D).
            logit_scale: () inverse temperature, after exp.
            logit_bias: () added to every logit; None for none.
            output_dict: return ``{"contrastive_loss": loss}``.

        Returns:
            () float32, or float64 for float64 features.
        """
        return _result(self.loss(image_features, text_features, logit_scale, logit_bias), None, output_dict)


class BetaCALLoss(nn.Module):
    """β-CAL as a loss of open_clip's, for models that return several texts per image.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, transport: as for :class:`ClipLoss`.
        options: ``form``, ``beta``, ``alpha``, ``padding``, ``divisor`` and ``backend`` of
            :class:`betaclip.BetaCALLoss`.

    Raises:
        ValueError, NotImplementedError: as for :class:`ClipLoss` and :class:`betaclip.BetaCALLoss`.

    Example:
        >>> import torch
        >>> from betaclip.integrations.open_clip import BetaCALLoss
        >>> loss = BetaCALLoss(rank=0, world_size=1, form="bce", beta=0.3)
        >>> pooled, texts = torch.randn(2, 4, 3, 32)  # 4 images, as each of their 3 texts pools them
        >>> loss(pooled, texts, torch.tensor(10.0), torch.tensor(-10.0), output_dict=True).keys()
        dict_keys(['contrastive_loss'])
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        transport: str = "all_gather",
        **options: Any,
    ) -> None:
        super().__init__()
        self.loss = beta_cal.BetaCALLoss(gather=_gather(rank, world_size, transport, use_horovod), **options)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of one batch.

        Args:
            image_features: (B, K, D), [b, k] the image as text k pools it; or (B, D), one for all texts of an image.
            text_features: (B, K, D), or (B, D) for one text per image.
            logit_scale: () inverse temperature, after exp.
            logit_bias: () added to every logit of the sigmoid form; cancels in the softmax form.
            output_dict: return ``{"contrastive_loss": loss}``.
            mask: (B, K) bool, True = valid text.

        Returns:
            () float32, or float64 for float64 features.
        """
        if text_features.dim() == 2:
            text_features = text_features.unsqueeze(1)
        if image_features.dim() == 2:
            image_features = image_features.unsqueeze(1).expand(-1, text_features.shape[1], -1)
        loss = self.loss(image_features, text_features, logit_scale, mask=mask, logit_bias=logit_bias)
        return _result(loss, logit_bias if self.loss.form == "ce" else None, output_dict)


def encode(model: Any, images: Tensor, texts: Tensor) -> Embeddings:
    """Encode images and texts by a CLIP or SigLIP of open_clip, patches included.

    open_clip returns patches before their projection into the space of the texts. This applies to them what the model
    applies to the image's embedding. Gradients flow. Call it inside the module that DistributedDataParallel wraps.

    Args:
        model: an open_clip model whose vision tower is a ViT, open_clip's own or timm's.
        images: (B, 3, H, W).
        texts: (B, K, L) token ids of K texts for each image, or (N, L).

    Returns:
        The embeddings (B, D), (B, P, D) and (B, K, D) or (N, D), not normalised.

    Raises:
        NotImplementedError: the vision tower has no patches in the space of the texts; the message says why.

    Example:
        >>> import open_clip, torch
        >>> from betaclip.integrations.open_clip import encode
        >>> vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 1}
        >>> text = {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 2, "layers": 1}
        >>> model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
        >>> out = encode(model, torch.randn(2, 3, 32, 32), torch.randint(100, (2, 3, 8)))  # 2 images with 3 texts each
        >>> out.image.shape, out.patches.shape, out.texts.shape
        (torch.Size([2, 32]), torch.Size([2, 16, 32]), torch.Size([2, 3, 32]))
    """
    image, patches = encode_images(model, images)
    flat = model.encode_text(texts.flatten(0, -2))
    return Embeddings(image, patches, flat.unflatten(0, texts.shape[:-1]))


def encode_images(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Encode images alone, as :func:`encode` does, into embeddings (B, D) and (B, P, D).

    Raises:
        NotImplementedError: the vision tower has no patches in the space of the texts; the message says why.
    """
    visual = getattr(model, "visual", None)
    if isinstance(visual, VisionTransformer):
        return _encode_vit(visual, images)
    if isinstance(visual, TimmModel):
        return _encode_timm(visual, images)
    kind = f"a {type(model).__name__}" if visual is None else f"one whose vision tower is a {type(visual).__name__}"
    raise NotImplementedError(
        f"model: expected an open_clip model with a VisionTransformer or a ViT of timm, got {kind} (of a wrapper "
        "such as DistributedDataParallel, pass the module)"
    )


def _encode_vit(visual: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        pool = "attentional_pool" if visual.attn_pool is not None else f"pool_type {visual.pool_type!r}"
        raise NotImplementedError(
            f"model: expected a vision tower whose output tokens are patches, got one with {pool}"
        )
    before, visual.output_tokens = visual.output_tokens, True
    try:
        image, tokens = visual(images)  # tokens without the class token
    finally:
        visual.output_tokens = before
    if visual.final_ln_after_pool:
        tokens = visual.ln_post(tokens)
    return image, tokens if visual.proj is None else tokens @ visual.proj


def _encode_timm(visual: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    trunk = visual.trunk
    if not hasattr(trunk, "num_prefix_tokens") or not hasattr(trunk, "fc_norm"):
        kind = type(trunk).__name__
        raise NotImplementedError(f"model: expected a ViT of timm, whose tokens are patches, got a {kind} of timm")
    tokens = trunk.forward_features(images)
    image = visual.head(trunk.forward_head(tokens))
    return image, visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(tokens[:, trunk.num_prefix_tokens :]))))


def _gather(rank: int, world_size: int, transport: str, use_horovod: bool = False) -> bool | str:
    """The loss's ``gather`` for open_clip's arguments."""
    check_choice("transport", transport, TRANSPORTS)
    if use_horovod:
        raise NotImplementedError("use_horovod: expected False, as ranks are those of torch.distributed; got True")
    if world_size == 1:
        return False
    if dist.is_available() and dist.is_initialized():
        actual = dist.get_rank(), dist.get_world_size()
        if (rank, world_size) != actual:
            raise ValueError(f"rank, world_size: expected {actual} as in the process group, got {(rank, world_size)}")
    return transport


def _result(loss: Tensor, unused: Tensor | None, output_dict: bool) -> Tensor | dict[str, Tensor]:
    """unused: a parameter on which the loss does not depend. It gets a gradient of 0, because
    DistributedDataParallel waits for the gradient of every parameter."""
    if unused is not None:
        loss = loss + 0 * unused.sum().to(loss.dtype)
    return {"contrastive_loss": loss} if output_dict else loss
