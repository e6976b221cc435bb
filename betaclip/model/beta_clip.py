"""β-CLIP: CLIP's two towers, pooling of an image's patches by each of its texts, and two scales."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nvtx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from betaclip.model.flair_layout import FLAIR_SETTINGS, from_flair, is_flair, to_flair
from betaclip.model.open_clip_towers import check_tag, create_towers, load_towers, needs_quick_gelu, towers_config
from betaclip.model.other_pictures import (
    conditioned_outputs,
    no_conditioned_outputs,
    plan_others,
    pool_with_others,
    sampled_texts,
)
from betaclip.model.packing import to_device
from betaclip.model.published_layout import (
    from_published,
    has_input_norms,
    is_published,
    not_published_reasons,
    to_published,
)
from betaclip.model.text_tower import (
    FROZEN,
    encode_packed,
    prepare_text,
    stretch_positions,
    stretched,
    text_modules,
    text_not_supported_reasons,
)
from betaclip.model.texts import RaggedTexts
from betaclip.model.vision_tower import encode_patches, prepare_vision, vision_not_supported_reasons
from betaclip.model.weights import OPENAI_SIZES, check_weights, read_weights
from betaclip.pooling import CLIP_LOGIT_SCALE, TextConditionedPool

MAX_LOGIT_SCALE = math.log(100)

_range = partial(nvtx.annotate, domain="betaclip")


@dataclass(frozen=True)
class ModelConfig:
    """The towers, their weights, and the pooling block."""

    name: str = "scenes"
    """An open_clip model (ViT-B-16, ViT-L-14, any with a ViT and a causal text tower of open_clip's own), an open_clip
    configuration in JSON, or scenes, a small one."""
    pretrained: str | None = None
    """An open_clip tag (openai), or a file in open_clip's, the published, FLAIR's or betaclip's own layout. By default
    the weights are random."""
    context_length: int = 77
    """Largest number of tokens of a text: the model's own (77), or 248, for which positions are stretched as in the
    published models and the first 20 are frozen."""
    pool_heads: int = 8
    """Attention heads of the pooling block."""
    pool_norm_inputs: bool = False
    """Apply LayerNorms to texts and patches in the pooling block; the published models have none."""
    pool_identity: bool = False
    """Start the pooling block from identities rather than at random, for towers that start at random."""
    pool_norm_qkv: bool = False
    """Apply FLAIR's LayerNorms in the pooling block, in place of normalising its inputs: to texts, to patches as keys
    and to patches as values."""
    pool_add_zero_attn: bool = False
    """Let texts attend to a key and a value of zeros beside the patches, as in FLAIR."""
    pool_mlp_ratio: float = 4.0
    """Hidden width of the pooling block's MLP, as a multiple of the embeddings'; 0 for no MLP, as in FLAIR."""
    attended_patches: bool = False
    """Let patches attend in the vision tower's last block, as in CLIP and FLAIR. In β-CLIP each takes its own value
    there instead."""
    gradient_checkpointing: bool = False
    """Compute the towers' blocks again in the backward rather than keep their activations."""
    quick_gelu: bool = False
    """Use QuickGELU in the towers, whatever the model's name says. Weights that were trained with it (OpenAI's and the
    published ones) turn this on by themselves, also in the configuration that checkpoints keep."""


class Sizes(NamedTuple):
    """The sizes of a model's inputs: pixels of a side of the picture, and tokens of a text."""

    image_size: int
    context_length: int


class BetaCLIP(nn.Module):
    """CLIP's towers with text-conditioned pooling between them (arXiv 2512.12678).

    ``clip`` is modified in place. It remains an open_clip model with its parameters' names, but its blocks are replaced
    by β-CLIP's vision blocks and padding-free text blocks over the same modules. Called as open_clip calls them, these
    compute what the old blocks did, so ``clip.encode_image`` and ``clip.encode_text`` return what they did before.

    A bias of the logits (``init_logit_bias``) is for β-CAL's sigmoid form, in which the trainer trains it. It is frozen
    here, because other losses give it no gradient: call ``requires_grad_()`` on it for a sigmoid loss of your own.

    Args:
        clip: an open_clip model. Register hooks on its blocks only afterwards, because the blocks are replaced.
        config: the settings that the model was made from, for checkpoints.

    Attributes:
        clip: the towers.
        pool: the pooling block; its parameters are the only ones that CLIP does not have.
        embed_dim: D.
        image_size: height and width of the images, in pixels.
        patch_grid: rows and columns of the patches, P in all.
        averaged: whether the weights are a checkpoint's average (EMA), as ``load_checkpoint`` notes.

    Raises:
        NotImplementedError: the towers cannot be used; the message lists every reason.

    Example:
        >>> import torch
        >>> from betaclip.model import ModelConfig, RaggedTexts, create_model
        >>> model = create_model(ModelConfig())
        >>> texts = RaggedTexts.of([[[7, 1, 9], [7, 9]], [[7, 2, 9]]])  # token ids: two images, with two texts and one
        >>> out = model(torch.randn(2, 3, model.image_size, model.image_size), texts)
        >>> out["pooled_embeds"].shape
        torch.Size([2, 2, 128])
        >>> out["mask"].tolist()
        [[True, True], [True, False]]
    """

    def __init__(self, clip: Any, config: ModelConfig) -> None:
        super().__init__()
        reasons = [*vision_not_supported_reasons(clip), *text_not_supported_reasons(clip)]
        if reasons:
            raise NotImplementedError(f"{config.name} cannot become a β-CLIP: {'; '.join(reasons)}")
        prepare_vision(clip)
        prepare_text(clip)
        self.config = config
        self.clip = clip
        if self.logit_bias is not None:
            self.logit_bias.requires_grad_(False)
        self.embed_dim: int = clip.visual.output_dim
        self.image_size: int = clip.visual.image_size[0]
        self.patch_grid: tuple[int, int] = clip.visual.grid_size
        self.averaged = False
        self.pool = TextConditionedPool(
            self.embed_dim, config.pool_heads, config.pool_mlp_ratio, config.pool_norm_inputs, config.pool_identity,
            norm_qkv=config.pool_norm_qkv, add_zero_attn=config.pool_add_zero_attn,
            init_logit_scale=towers_config(config.name).get("init_logit_scale", CLIP_LOGIT_SCALE),
        )  # fmt: skip

    @property
    def context_length(self) -> int:
        """The largest number of tokens that a text may have."""
        return self.clip.context_length

    @property
    def end_token(self) -> int:
        """The token by which the text tower finds the end of a padded text: the largest of the vocabulary."""
        return text_modules(self.clip).token_embedding.num_embeddings - 1

    @property
    def logit_scale(self) -> nn.Parameter:
        """() logarithm of the inverse temperature between images and captions.

        ``pool.logit_scale`` is that between pooled images and texts. It starts where the towers' configuration has
        theirs start (open_clip's ``init_logit_scale``), also if theirs is then loaded.
        """
        return self.clip.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """() what the sigmoid form adds to every logit, if the towers have it."""
        return getattr(self.clip, "logit_bias", None)

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images into the joint space, without normalising.

        Args:
            images: (B, 3, H, W).

        Returns:
            (B, D) CLS embeddings, and (B, P, D) patch embeddings, row by row.
        """
        return self._encode_image(images, cls_only=False)

    def encode_text(self, texts: RaggedTexts) -> Tensor:
        """Encode texts into the joint space, without normalising.

        Args:
            texts: N texts.

        Returns:
            (N, D) embeddings of the texts' end tokens.

        Raises:
            ValueError: a text is longer than the context.
        """
        distinct = self._encode_distinct(texts)
        return F.embedding(to_device(texts.packing.distinct, distinct.device), distinct)

    def forward(
        self,
        images: Tensor,
        texts: RaggedTexts,
        texts_per_image: int | None = None,
        other_pictures: Sequence[int] = (),
        other_texts: Tensor | None = None,
        pooled: bool = True,
    ) -> dict[str, Tensor]:
        """Compute the inputs of the losses.

        Args:
            images: (B, 3, H, W).
            texts: the texts of these B images.
            texts_per_image: K; the largest number of texts of an image if None.
            other_pictures: J shifts: the texts of image b also pool the images b + shift, modulo B. A multiple of B
                stands for no picture.
            other_texts: (B, J) int64, texts of other images that each image is scored with, besides its own: number
                b K + k for text k of image b, below 0 for none.
            pooled: whether to pool each image by its own texts; ``other_pictures`` need it.

        Returns:
            By name, with no embedding normalised:

            - ``image_embeds`` (B, D), of CLS.
            - ``text_embeds`` (B, K, D), the captions at [:, 0].
            - ``pooled_embeds`` (B, K, D), the image as each text pools it, if ``pooled``.
            - ``mask`` (B, K) bool, True where there is a text. Elsewhere both embeddings are 0, unless ``texts`` have a
              padding text there, which is encoded and pooled like others.
            - ``text_ids`` (B, K) int64, equal for equal texts, also of other batches; -1 where the mask is False.
            - ``logit_scale`` and ``pool_logit_scale`` (), inverse temperatures, after exp.
            - ``logit_bias`` (), if the towers have one.
            - with ``other_pictures``, ``conditioned_negatives`` (B, K, J), the cosines of each text with what it pools
              from other pictures; ``conditioned_mask`` (B, K, J) bool, False where there is no text or no picture, or
              the picture has an equal text of its own; and ``conditioned_leak`` (B, K) bool, whether the embedding that
              a text pools from the first other picture is nearer to this text than to all different texts of the batch.
            - with ``other_texts``, ``scores`` (B, K + J), the cosines of the image's own and the other texts with what
              they pool from it; and ``scores_mask`` of the same shape, bool, False where there is no text, or one that
              equals an own text.

        Raises:
            ValueError: a text is longer than the context, an image has more than K texts, or images and texts disagree.
        """
        self._check(images, texts, texts_per_image)
        with _range("vision tower"):
            pools = pooled or bool(other_pictures) or other_texts is not None
            image_embeds, patches = self._encode_image(images, cls_only=not pools)
        with _range("text tower"):
            distinct = self._encode_distinct(texts)
            planned = _slots(texts, texts_per_image)
            index, filled, mask, ids = (to_device(t, images.device) for t in planned)
            # Empty slots take the appended row of zeros.
            text_embeds = F.embedding(index, F.pad(distinct, (0, 0, 0, 1))).clone()  # FSDP2 warns of views
        out = {
            "image_embeds": image_embeds,
            "text_embeds": text_embeds,
            "mask": mask,
            "text_ids": ids,
            "logit_scale": self.logit_scale.exp(),
            "pool_logit_scale": self.pool.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias.reshape(()).clone()
        with _range("pooling"):
            if pooled or other_pictures:
                shifts = [number for number in other_pictures if len(images) and number % len(images)]
                if shifts:
                    others = plan_others(planned[1], shifts).to(images.device)
                    out["pooled_embeds"], for_others = pool_with_others(self.pool, patches, text_embeds, filled, others)
                    out |= conditioned_outputs(for_others, others, text_embeds, index, mask, len(other_pictures))
                else:
                    out["pooled_embeds"] = self.pool(patches, text_embeds, query_mask=filled)
                    if other_pictures:
                        out |= no_conditioned_outputs(text_embeds, mask, len(other_pictures))
            if other_texts is not None:
                own = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
                chosen, valid = sampled_texts(own, to_device(other_texts, mask.device), index, mask)
                scores = self.pool.score(patches, text_embeds.flatten(0, 1), texts=chosen)
                out |= {"scores": scores, "scores_mask": valid}
        return out

    @torch.no_grad()
    def clamp_scales_(self) -> None:
        """Clamp both inverse temperatures to [1, 100]."""
        for scale in (self.logit_scale, self.pool.logit_scale):
            scale.clamp_(0, MAX_LOGIT_SCALE)

    def _encode_image(self, images: Tensor, *, cls_only: bool) -> tuple[Tensor, Tensor]:
        """(B, D) and (B, P, D) as :meth:`encode_image`, with ``cls_only`` (B, 0, D) patches."""
        attending: Literal["all", "cls"] = "all" if self.config.attended_patches else "cls"
        checkpointing = self.config.gradient_checkpointing
        tokens = encode_patches(self.clip.visual, images, checkpointing, attending, cls_only=cls_only)
        cls, patches = tokens.split((1, tokens.shape[1] - 1), dim=1)
        return cls[:, 0].clone(), patches.clone()  # copies, because FSDP2 warns of outputs that are views

    def _encode_distinct(self, texts: RaggedTexts) -> Tensor:
        """(U, D) embeddings of the distinct texts, in the order of their packing."""
        longest = int(texts.lengths.max()) if len(texts.lengths) else 0
        if longest > self.context_length:
            raise ValueError(f"texts: expected at most {self.context_length} tokens in each, got {longest}")
        device = self.logit_scale.device
        return encode_packed(self.clip, texts.packing, device, self.config.gradient_checkpointing)

    def _check(self, images: Tensor, texts: RaggedTexts, texts_per_image: int | None) -> None:
        size = self.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images: expected (B, 3, {size}, {size}), got shape {tuple(images.shape)}")
        if texts.num_images != len(images):
            raise ValueError(f"texts: expected those of {len(images)} images, got those of {texts.num_images}")
        needed = texts.max_texts_per_image
        if texts_per_image is not None and texts_per_image < needed:
            raise ValueError(f"texts_per_image: expected at least {needed}, as one image has, got {texts_per_image}")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _slots(texts: RaggedTexts, texts_per_image: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, K) index of the distinct text in each slot, U in empty slots; (B, K) bool, True where a text fills the slot;
    the same where that is no padding; and (B, K) ids of the texts, -1 where there is none or padding."""
    slots, filled = texts.slots(texts_per_image)
    index, mask = torch.full_like(slots, len(texts.packing.ends)), filled
    index[filled] = texts.packing.distinct[slots[filled]]
    if texts.levels is not None:
        mask = torch.zeros_like(filled)
        mask[filled] = texts.levels[slots[filled]] >= 0
    ids = torch.full_like(slots, -1)
    ids[mask] = texts.ids[slots[mask]]
    return index, filled, mask, ids


def create_model(config: ModelConfig) -> BetaCLIP:
    """Make a model in float32 on the CPU, with random weights where ``config.pretrained`` gives none.

    Args:
        config: the towers, their weights, and the pooling block.

    Returns:
        The model. Its own ``config`` has ``quick_gelu`` set if the weights need it.

    Raises:
        ValueError: the name, the context length or the weights do not fit; the message says which.
        NotImplementedError: an open_clip model whose towers cannot be used; the message lists every reason.

    Example:
        >>> from betaclip.model import ModelConfig, create_model
        >>> model = create_model(ModelConfig(context_length=248))
        >>> model.context_length, model.patch_grid, model.embed_dim
        (248, (6, 6), 128)
    """
    file, tag = None, config.pretrained
    if tag is not None and Path(tag).is_file():
        file, tag = Path(tag), None
    weights = read_weights(file) if file else {}
    published, ours = is_published(weights), any(name.startswith(("clip.", "pool.")) for name in weights)
    flair = is_flair(weights)
    openai = all(name in weights for name in OPENAI_SIZES)
    quick_gelu = config.quick_gelu or published or openai or needs_quick_gelu(config.name, tag)
    with torch.device("cpu"):  # open_clip makes its modules on the default device
        model = BetaCLIP(create_towers(config.name, tag, quick_gelu), replace(config, quick_gelu=quick_gelu))
    source = f"pretrained: {file} does not fit model.name {config.name} with context_length {config.context_length}"
    if flair:
        load_flair_state(model, weights, source)
    elif file and not (published or ours):
        load_towers(model.clip, weights, source)
    _check_context_length(config, model.context_length)
    if config.context_length != model.context_length:
        stretch_positions(model.clip)
    if published:
        load_published_state(model, weights, source)
    elif ours:
        load_state(model, weights, source)
    return model


def check_config(config: ModelConfig) -> Sizes:
    """The sizes of the inputs of the model that :func:`create_model` would make, without making or fetching anything.

    Raises:
        ValueError: there is no such model or no such weights, or a number does not fit it; the message says which.
    """
    towers = towers_config(config.name)
    if config.pretrained is not None and not Path(config.pretrained).is_file():
        check_tag(config.name, config.pretrained)
    vision, text = (towers.get(part, {}) for part in ("vision_cfg", "text_cfg"))
    if not (isinstance(vision, dict) and isinstance(text, dict)):
        raise ValueError(f"name: expected the configuration of an open_clip model, got {config.name!r}")
    _check_context_length(config, text.get("context_length", 77))
    if config.pool_heads < 1 or towers.get("embed_dim", 0) % config.pool_heads:
        raise ValueError(f"pool_heads: expected a divisor of {towers.get('embed_dim')}, got {config.pool_heads}")
    size = vision.get("image_size", 224)
    return Sizes(size[0] if isinstance(size, list | tuple) else size, config.context_length)


def _check_context_length(config: ModelConfig, own: int) -> None:
    """Raise a ValueError for a context that is neither the towers' own nor that of stretched positions."""
    stretches = own > FROZEN
    if config.context_length != own and not (stretches and config.context_length == stretched(own)):
        expected = f"{own}, or {stretched(own)} for stretched positions" if stretches else str(own)
        raise ValueError(f"context_length: expected {expected}, got {config.context_length}")


def load_state(model: BetaCLIP, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Load a state dict.

    Raises:
        ValueError: its names or shapes are not those of the model; the message begins with ``source``.
    """
    check_weights(state, model.state_dict(), source)
    model.load_state_dict(state)


def load_published_state(model: BetaCLIP, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Load weights in the published layout.

    Raises:
        ValueError: they are those of another model, or this one has not what the layout assumes; the message begins
            with ``source``.
    """
    reasons = not_published_reasons(model.clip, model.config)
    if reasons:
        raise ValueError(f"{source}: the published layout cannot express this model: {'; '.join(reasons)}")
    norms = has_input_norms(state)
    if norms != model.config.pool_norm_inputs:
        raise ValueError(
            f"{source}: pool_norm_inputs: expected {norms}, as the file's pooling block is, got {not norms}"
        )
    check_weights(state, to_published(model.state_dict()), source)
    model.load_state_dict(from_published(state))


def load_flair_state(model: BetaCLIP, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Load weights in FLAIR's layout.

    Raises:
        ValueError: they are those of another model, or this one has other settings than FLAIR; the message begins with
            ``source``.
    """
    for name, value in FLAIR_SETTINGS.items():
        if getattr(model.config, name) != value:
            got = getattr(model.config, name)
            raise ValueError(f"{source}: {name}: expected {value}, as FLAIR's weights need it, got {got}")
    scalars = {name: state[name].reshape(()) for name in ("logit_scale", "logit_bias")
               if name in state and state[name].numel() == 1}  # fmt: skip
    state = {**state, **scalars}
    check_weights(state, to_flair(model.state_dict()), source)
    model.load_state_dict(from_flair(state))
