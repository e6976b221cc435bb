"""β-CLIP: CLIP's two towers, pooling of an image's patches by each of its texts, and two scales."""

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import nvtx
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.pretrained import get_pretrained_cfg
from torch import Tensor, nn

from betaclip.model.packing import to_device
from betaclip.model.published_layout import from_published, is_published
from betaclip.model.text_tower import FROZEN, encode_packed, prepare_text, stretch_positions, stretched, why_not_text
from betaclip.model.texts import RaggedTexts
from betaclip.model.vision_tower import encode_patches, prepare_vision, why_not_vision
from betaclip.model.weights import read_weights
from betaclip.pooling import TextConditionedPool

MAX_LOGIT_SCALE = math.log(100)

_range = partial(nvtx.annotate, domain="betaclip")

# Learns the rendered scenes on a CPU in minutes.
SCENES: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 72, "patch_size": 12, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}


@dataclass(frozen=True)
class ModelConfig:
    """A β-CLIP model.

    name: an open_clip model ("ViT-B-16", "ViT-L-14", any with a ViT and a causal text tower of open_clip's own), the
        configuration of one in JSON, or "scenes": a small one.
    pretrained: an open_clip tag ("openai"), or a file in open_clip's, the published or our own layout; random if None.
    context_length: the model's own (77), or 248: its positions stretched as in the published models, the first 20
        frozen.
    pool_heads: attention heads of the pooling block.
    pool_norm_inputs: LayerNorms of texts and patches in the pooling block; the published models have none.
    pool_identity: start the pooling block from identities rather than at random, for towers that start at random.
    gradient_checkpointing: compute the towers' blocks again in the backward rather than keep their activations.
    quick_gelu: QuickGELU in the towers whatever the name says. Weights that need it, OpenAI's and the published, set
        it, in the model's own ``config`` too, for its checkpoints.
    """

    name: str = "scenes"
    pretrained: str | None = None
    context_length: int = 77
    pool_heads: int = 8
    pool_norm_inputs: bool = False
    pool_identity: bool = False
    gradient_checkpointing: bool = False
    quick_gelu: bool = False


class BetaCLIP(nn.Module):
    """CLIP's towers and text-conditioned pooling between them (arXiv 2512.12678).

    ``clip`` stays a model of open_clip: its names, its checkpoints, its own ``encode_image`` and ``encode_text``. Its
    blocks have learned to compute what β-CLIP wants of images, and texts without padding.

    Args:
        clip: an open_clip model; this one takes it over.
        config: what the model was made from, for checkpoints.

    Attributes:
        clip: the towers.
        pool: the pooling block; its parameters are all that CLIP does not have.

    Raises:
        NotImplementedError: towers that cannot serve; the message lists why.
    """

    def __init__(self, clip: Any, config: ModelConfig) -> None:
        super().__init__()
        reasons = [*why_not_vision(clip), *why_not_text(clip)]
        if reasons:
            raise NotImplementedError(f"{config.name} cannot be a β-CLIP: {'; '.join(reasons)}")
        prepare_vision(clip)
        prepare_text(clip)
        self.config = config
        self.clip = clip
        self.embed_dim: int = clip.visual.output_dim
        self.image_size: int = clip.visual.image_size[0]
        self.patch_grid: tuple[int, int] = clip.visual.grid_size
        self.pool = TextConditionedPool(
            self.embed_dim, config.pool_heads, norm_inputs=config.pool_norm_inputs, identity=config.pool_identity
        )

    @property
    def context_length(self) -> int:
        """The most tokens that a text can have."""
        return self.clip.context_length

    @property
    def logit_scale(self) -> nn.Parameter:
        """() logarithm of the inverse temperature between images and captions. Between pooled images and texts it is
        ``pool.logit_scale``."""
        return self.clip.logit_scale

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (B, D) of CLS and (B, P, D) of the patches, row by row; projected, not normalised."""
        tokens = encode_patches(self.clip.visual, images, self.config.gradient_checkpointing)
        cls, patches = tokens.split((1, tokens.shape[1] - 1), dim=1)
        return cls[:, 0].clone(), patches  # a copy, because FSDP2 warns of outputs that are views

    def encode_text(self, texts: RaggedTexts) -> Tensor:
        """(N, D) of the texts' end tokens; projected, not normalised.

        Raises:
            ValueError: a text is longer than the context.
        """
        distinct = self._encode_distinct(texts)
        return F.embedding(to_device(texts.packing.text, distinct.device), distinct)

    def forward(self, images: Tensor, texts: RaggedTexts, width: int | None = None) -> dict[str, Tensor]:
        """All that the losses take.

        Args:
            images: (B, 3, H, W).
            texts: those of these B images.
            width: K; the largest number of texts of an image if None.

        Returns:
            image_embeds (B, D) of CLS; text_embeds (B, K, D), the captions at [:, 0]; pooled_embeds (B, K, D), the
            image as each text pools it; mask (B, K) bool, True where there is a text, elsewhere both embeddings are 0;
            logit_scale () and pool_logit_scale (), after exp. No embedding is normalised.

        Raises:
            ValueError: a text is longer than the context, an image has more than K texts, or images and texts disagree.
        """
        self._check(images, texts, width)
        with _range("vision tower"):
            image_embeds, patches = self.encode_image(images)
        with _range("text tower"):
            distinct = self._encode_distinct(texts)
            index, mask = (to_device(t, images.device) for t in _slots(texts, width))
            # Empty slots take the row of zeros.
            text_embeds = F.embedding(index, F.pad(distinct, (0, 0, 0, 1)))
        with _range("pooling"):
            pooled_embeds = self.pool(patches, text_embeds, query_mask=mask)
        return {
            "image_embeds": image_embeds,
            "text_embeds": text_embeds,
            "pooled_embeds": pooled_embeds,
            "mask": mask,
            "logit_scale": self.logit_scale.exp(),
            "pool_logit_scale": self.pool.logit_scale.exp(),
        }

    @torch.no_grad()
    def clamp_scales_(self) -> None:
        """Both scales into [1, 100]."""
        for scale in (self.logit_scale, self.pool.logit_scale):
            scale.clamp_(0, MAX_LOGIT_SCALE)

    def _encode_distinct(self, texts: RaggedTexts) -> Tensor:
        """(U, D) of the distinct texts, as their packing orders them."""
        longest = int(texts.lengths.max()) if len(texts.lengths) else 0
        if longest > self.context_length:
            raise ValueError(f"texts: expected at most {self.context_length} tokens in each, got {longest}")
        device = self.logit_scale.device
        return encode_packed(self.clip, texts.packing, device, self.config.gradient_checkpointing)

    def _check(self, images: Tensor, texts: RaggedTexts, width: int | None) -> None:
        size = self.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images: expected (B, 3, {size}, {size}), got shape {tuple(images.shape)}")
        if texts.num_images != len(images):
            raise ValueError(f"texts: expected those of {len(images)} images, got those of {texts.num_images}")
        most = texts.max_texts_per_image
        if width is not None and width < most:
            raise ValueError(f"width: expected at least {most}, the texts of one image, got {width}")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _slots(texts: RaggedTexts, width: int | None) -> tuple[Tensor, Tensor]:
    """(B, K) distinct text in each slot, or their number where there is none, and (B, K) bool whether there is one."""
    slots, valid = texts.slots(width)
    index = torch.full_like(slots, len(texts.packing.ends))
    index[valid] = texts.packing.text[slots[valid]]
    return index, valid


def create_model(config: ModelConfig) -> BetaCLIP:
    """A model in float32 on the CPU, random but for what ``config.pretrained`` gives.

    Raises:
        ValueError: the name, the context length or the weights do not fit; the message says which.
        NotImplementedError: a model of open_clip's whose towers cannot serve; the message lists why.
    """
    file, tag = None, config.pretrained
    if tag is not None and Path(tag).is_file():
        file, tag = Path(tag), None
    weights = read_weights(file) if file else {}
    published, ours = is_published(weights), "pool.logit_scale" in weights
    quick_gelu = config.quick_gelu or published or _needs_quick_gelu(config.name, tag)
    model = BetaCLIP(_towers(config.name, tag, quick_gelu), replace(config, quick_gelu=quick_gelu))
    if file and not (published or ours):
        open_clip.load_checkpoint(model.clip, str(file))
    own = model.context_length
    if own > FROZEN and config.context_length == stretched(own):
        stretch_positions(model.clip)
    elif config.context_length != own:
        expected = f"{own}, or {stretched(own)} for stretched positions"
        raise ValueError(f"context_length: expected {expected}, got {config.context_length}")
    if published or ours:
        load_state(model, from_published(weights) if published else weights, f"pretrained: {file}")
    return model


def _towers(name: str, tag: str | None, quick_gelu: bool) -> nn.Module:
    """An open_clip model."""
    if name == "scenes" or name.startswith("{"):
        if tag is not None:
            raise ValueError(f"pretrained: no file {tag}, and no tags for a model without a name of open_clip's")
        options = SCENES if name == "scenes" else _parsed(name)
        options = options | {"quick_gelu": quick_gelu or options.get("quick_gelu", False)}
        kind = CustomTextCLIP if options.get("custom_text") else CLIP
        try:
            return kind(**{key: value for key, value in options.items() if key != "custom_text"})
        except TypeError as error:
            raise ValueError(f"name: no configuration of an open_clip model: {error}, in {name!r}") from error
    known = name.replace("/", "-")
    if known not in open_clip.list_models():
        raise ValueError(f"name: expected scenes, JSON, or one of {', '.join(open_clip.list_models())}; got {name!r}")
    tags = open_clip.list_pretrained_tags_by_model(known)
    if tag is not None and tag not in tags:
        raise ValueError(f"pretrained: expected a file, or one of {', '.join(tags)} for {name}; got {tag!r}")
    return open_clip.create_model(known, pretrained=tag, force_quick_gelu=quick_gelu)


def _needs_quick_gelu(name: str, tag: str | None) -> bool:
    """Whether the weights of a tag were trained with it."""
    return bool(tag and get_pretrained_cfg(name.replace("/", "-"), tag).get("quick_gelu"))


def _parsed(name: str) -> dict[str, Any]:
    try:
        return json.loads(name)
    except json.JSONDecodeError as error:
        raise ValueError(f"name: expected JSON after an opening brace, {error}, in {name!r}") from error


def load_state(model: BetaCLIP, state: dict[str, Tensor], source: Path | str) -> None:
    """Raises ValueError where the state is another model's."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit {model.config}: {error}") from error
