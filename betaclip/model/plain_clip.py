"""CLIP and SigLIP models of open_clip as they are, with their own preprocessing and tokenizer and no pooling block."""

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from betaclip.integrations.open_clip import encode_images
from betaclip.model.open_clip_towers import (
    check_tag,
    create_known,
    create_tokenizer,
    create_towers,
    is_custom,
    known_model,
    load_towers,
    needs_quick_gelu,
)
from betaclip.model.texts import RaggedTexts
from betaclip.model.vision_tower import encode_patches, prepare_vision, vision_not_supported_reasons
from betaclip.model.weights import OPENAI_SIZES, read_weights

_SCHEMES = ("hf-hub:", "local-dir:")  # names of open_clip that say where a model's files lie
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")

_log = logging.getLogger(__name__)


class PlainClip(nn.Module):
    """A CLIP or SigLIP of open_clip with the methods of a BetaCLIP that encode images and texts.

    Pictures come normalised by CLIP's mean and standard deviation, as everywhere in betaclip; the model replaces these
    by its own.

    Args:
        clip: an open_clip model. The blocks of a vision tower that a BetaCLIP could have are replaced in place, which
            changes none of its outputs.
        tokenizer: open_clip's tokenizer for it.
        preprocess: open_clip's settings for its pictures.

    Attributes:
        transform: makes a (3, S, S) tensor of a PIL image as open_clip does to evaluate.
        pool: None.
        patch_grid: rows and columns of the patches; (0, 0) if the tower has none in the space of the texts.

    Raises:
        ValueError: the model's pictures are not square.
    """

    factor: Tensor
    shift: Tensor

    def __init__(self, clip: Any, tokenizer: Any, preprocess: PreprocessCfg) -> None:
        super().__init__()
        height, width = (preprocess.size,) * 2 if isinstance(preprocess.size, int) else preprocess.size
        if height != width:
            raise ValueError(f"name: expected a model of square pictures, got {height} x {width}")
        self.clip, self.image_size = clip, height
        self.pool = None
        self._tokenizer = tokenizer
        clips = PreprocessCfg()
        geometry = vars(preprocess) | {"mean": clips.mean, "std": clips.std}
        self.transform: Callable[[Image.Image], Tensor] = image_transform_v2(PreprocessCfg(**geometry), is_train=False)
        std = torch.tensor(preprocess.std, device="cpu")
        shift = torch.tensor(clips.mean, device="cpu") - torch.tensor(preprocess.mean, device="cpu")
        self.register_buffer("factor", (torch.tensor(clips.std, device="cpu") / std).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (shift / std).view(3, 1, 1), persistent=False)
        self.eval()
        self._encode = self._encoder()
        with torch.no_grad():
            image, patches = self.encode_image(torch.zeros(1, 3, height, width, device="cpu"))
        self.embed_dim, side = image.shape[1], math.isqrt(patches.shape[1])
        self.patch_grid = (side, side)

    @property
    def logit_scale(self) -> Tensor:
        """() logarithm of the inverse temperature."""
        return self.clip.logit_scale

    def tokenizer(self, text: str) -> list[int]:
        """The token ids of a text, padded as the model's texts are."""
        return self._tokenizer([text])[0].tolist()

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (B, 3, S, S) into (B, D) embeddings and (B, P, D) patch embeddings, not normalised."""
        return self._encode(images * self.factor + self.shift)

    def encode_text(self, texts: RaggedTexts) -> Tensor:
        """Encode N texts of :meth:`tokenizer` into (N, D) embeddings, not normalised."""
        return self.clip.encode_text(texts.tokens.view(len(texts.lengths), -1).to(self.logit_scale.device))

    def _encoder(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        clip = self.clip
        if not vision_not_supported_reasons(clip):  # patches as a BetaCLIP has them, so that regions compare
            prepare_vision(clip)

            def as_betaclip(images: Tensor) -> tuple[Tensor, Tensor]:
                tokens = encode_patches(clip.visual, images, False)
                return tokens[:, 0], tokens[:, 1:]

            return as_betaclip
        try:
            with torch.no_grad():
                encode_images(clip, torch.zeros(1, 3, self.image_size, self.image_size, device="cpu"))
        except NotImplementedError:

            def without_patches(images: Tensor) -> tuple[Tensor, Tensor]:
                image = clip.encode_image(images)
                return image, image.new_empty(len(image), 0, image.shape[1])

            return without_patches
        return lambda images: encode_images(clip, images)


def create_plain(name: str, pretrained: str | None) -> PlainClip:
    """Load a model of open_clip.

    Args:
        name: a name that open_clip knows, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``; or a configuration in JSON, or
            scenes, with a file.
        pretrained: open_clip's tag, or a file in open_clip's layout; None for the two that bring their weights.

    Returns:
        The model, in float32 on the CPU. Pictures are prepared as open_clip says for the tag; for a file, as it says
        for the model's tags if all agree, else as for OpenAI's.

    Raises:
        OSError, ValueError: there is no such model, tag or file, it cannot be loaded or downloaded, or the weights are
            those of another model; the message is one line that begins with "name" or "pretrained".
    """
    if name.startswith(_SCHEMES):
        if pretrained is not None:
            raise ValueError(f"pretrained: expected none, because {name} has weights of its own, got {pretrained}")
        clip = create_known(name, None, require_pretrained=True)
        return _plain(clip, name, clip.visual.preprocess_cfg)
    file = pretrained if pretrained is not None and Path(pretrained).is_file() else None
    custom = is_custom(name)
    known = name if custom else known_model(name, "a model of open_clip")
    if pretrained is None:
        tags = ", ".join([] if custom else open_clip.list_pretrained_tags_by_model(known))
        raise ValueError(f"pretrained: expected a file{' or one of ' * bool(tags)}{tags} for {name}")
    if file is None:
        if custom:
            raise ValueError(f"pretrained: expected a file for this model, got {pretrained!r}")
        check_tag(known, pretrained)
        clip = create_known(known, pretrained, force_quick_gelu=needs_quick_gelu(known, pretrained))
        return _plain(clip, known, clip.visual.preprocess_cfg)
    weights = read_weights(file)
    quick_gelu = all(size in weights for size in OPENAI_SIZES)
    if custom:
        clip = create_towers(name, None, quick_gelu)
        load_towers(clip, weights, f"pretrained: {file} does not fit {name}")
        return _plain(clip, known, {"size": clip.visual.image_size})
    clip = create_known(known, None, force_quick_gelu=quick_gelu, pretrained_text=False)
    load_towers(clip, weights, f"pretrained: {file} does not fit {name}")
    return _plain(clip, known, clip.visual.preprocess_cfg | _agreed_preprocessing(known))


def _plain(clip: Any, name: str, preprocess: dict[str, Any]) -> PlainClip:
    if is_custom(name):
        tokenizer: Any = partial(open_clip.tokenize, context_length=clip.context_length)
    else:
        tokenizer = create_tokenizer(name)
    return PlainClip(clip, tokenizer, PreprocessCfg(**preprocess))


def _agreed_preprocessing(known: str) -> dict[str, Any]:
    """The preprocessing on which all tags of a model agree; empty, with a warning, if they do not."""
    tags = open_clip.list_pretrained_tags_by_model(known)
    said = [{key: value for key, value in get_pretrained_cfg(known, tag).items() if key in _PREPROCESSING}
            for tag in tags]  # fmt: skip
    if any(one != said[0] for one in said):
        _log.warning("pretrained: pictures are prepared as for OpenAI's models; weights of %s differ in that, "
                     "and the file does not say it", known)  # fmt: skip
        return {}
    return said[0] if said else {}
