"""A trained model as a Python object: pictures and texts in, embeddings, cosines and attention out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from betaclip.checkpoint import Weights, load_checkpoint
from betaclip.data.transforms import EvaluationTransform, UnreadableImageError, read_image, to_rgb
from betaclip.evaluation.encode import (
    Encoder,
    Squash,
    Tokenize,
    Transform,
    batches,
    encode_images,
    encode_slots,
    encode_texts,
    evaluating,
)
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.plain_clip import PlainClip, create_plain
from betaclip.model.tokenizer import Tokenizer
from betaclip.pooling import TextConditionedPool
from betaclip.process_group import local_device

PictureLike = str | Path | Image.Image | npt.NDArray[np.uint8] | Tensor


class Model:
    """A model in evaluation mode that encodes pictures and texts, a batch at a time, on its own device.

    A picture is the path of a file (turned upright by its EXIF orientation), a PIL image (not turned), an (H, W, 3)
    uint8 array, or a (3, S, S) tensor as ``transform`` returns it. Methods that take pictures accept one picture, a
    list of them, or a (B, 3, S, S) tensor; methods that take texts accept a string or a list. Results are in the order
    of the arguments, in float32, without gradients.

    Args:
        model: the model; :func:`betaclip.load` reads one from a file.
        batch_size: the number of pictures or texts that are encoded at a time.
        pooled: whether the pooling block is trained. If not, methods that need it raise a ValueError.

    Attributes:
        model: the BetaCLIP, for everything that is not here; a PlainClip if ``load`` was given a name.
        transform: turns a PIL image into a (3, S, S) tensor: of the central square of the picture, as in the
            evaluation, or as open_clip prepares pictures for one of its models.

    Example:
        >>> import torch, betaclip
        >>> from betaclip.model import ModelConfig, create_model
        >>> model = betaclip.Model(create_model(ModelConfig()))  # random weights
        >>> model.conditioned_similarity(torch.rand(2, 3, 72, 72), ["a red mug", "a dog", "a cat"]).shape
        torch.Size([2, 3])
    """

    def __init__(self, model: Encoder, *, batch_size: int = 64, pooled: bool = True) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.model, self.batch_size = model.eval(), batch_size
        self.pooled = pooled and model.pool is not None
        if isinstance(model, PlainClip):
            self.tokenizer: Tokenize = model.tokenizer
            self.transform: Transform = model.transform
        else:
            self.tokenizer = Tokenizer(model.context_length)
            self.transform = EvaluationTransform(model.image_size)

    def encode_image(self, images: PictureLike | Sequence[PictureLike]) -> Tensor:
        """Encode B pictures into (B, D) unit embeddings.

        Raises:
            ValueError: a picture cannot be read, or has another size than the model; the message names it.
        """
        return self._encode(images)[0]

    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Encode M texts into (M, D) unit embeddings. A text that is too long loses its last tokens."""
        return _unit(self._queries(texts))

    def similarity(self, images: PictureLike | Sequence[PictureLike], texts: str | Sequence[str]) -> Tensor:
        """Compare B whole pictures with M texts as CLIP does; returns (B, M) cosines."""
        return self.encode_image(images) @ self.encode_text(texts).T

    def conditioned_similarity(
        self, images: PictureLike | Sequence[PictureLike], texts: str | Sequence[str], *, top_k: int | None = None
    ) -> Tensor:
        """Compare M texts with B pictures as each text pools them; returns cosines.

        Args:
            images: B pictures.
            texts: M texts.
            top_k: score only the ``top_k`` pictures that are nearest to a text by :meth:`similarity`, which makes
                retrieval from many pictures cheap (re-ranking). All pairs if None.

        Returns:
            (B, M); -inf for pairs that ``top_k`` leaves out.

        Raises:
            ValueError: the pooling block is not trained, a picture cannot be read, or top_k is below 1.
        """
        pool = self._pool()
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}")
        embeds, patches = self._encode(images, keep_patches=True)
        queries = self._queries(texts)
        with evaluating(self.model):
            if top_k is None or top_k >= len(embeds):
                return pool.score(patches, queries).float()
            nearest = (_unit(queries) @ embeds.T).topk(top_k).indices
            scores = pool.score(patches, queries, images=nearest).float()
        return scores.new_full((len(queries), len(embeds)), -torch.inf).scatter(1, nearest, scores).T

    def attention(self, image: PictureLike, texts: str | Sequence[str]) -> Tensor:
        """The attention of M texts over the patches of one whole picture, averaged over heads.

        A picture that is not a tensor is squashed to a square, so that nothing of it is cut off.

        Returns:
            (M, rows, columns); each text's attention sums to 1, even if the model has a key of zeros beside the
            patches.

        Raises:
            ValueError: the pooling block is not trained, or the picture cannot be read.
        """
        pool = self._pool()
        pixels = self._pixels(image, Squash(self.model.image_size))
        return _attention(self.model, pool, self.tokenizer, pixels, _texts(texts))

    def _queries(self, texts: str | Sequence[str]) -> Tensor:
        """(M, D) text embeddings of any norm."""
        with evaluating(self.model):
            return encode_texts(self.model, self.tokenizer, _texts(texts), self.batch_size)

    def _encode(self, images: PictureLike | Sequence[PictureLike], keep_patches: bool = False) -> tuple[Tensor, Tensor]:
        """(B, D) unit embeddings, and the (B, P, D) patch embeddings where they are kept, else those of no picture."""
        pixels = (self._pixels(image, self.transform) for image in _pictures(images))
        device, size = self.model.logit_scale.device, self.model.embed_dim
        rows, cols = self.model.patch_grid
        embeds, patches = [torch.empty(0, size, device=device)], [torch.empty(0, rows * cols, size, device=device)]
        with evaluating(self.model):
            for batch in batches(pixels, self.batch_size):
                cls, tokens = encode_images(self.model, batch)
                embeds.append(_unit(cls))
                if keep_patches:
                    patches.append(tokens)
        return torch.cat(embeds), torch.cat(patches)

    def _pixels(self, picture: PictureLike, transform: Transform) -> Tensor:
        size = self.model.image_size
        if isinstance(picture, Tensor):
            if picture.shape != (3, size, size):
                raise ValueError(f"images: expected tensors (3, {size}, {size}), got shape {tuple(picture.shape)}")
            return picture
        if isinstance(picture, str | Path):
            try:
                picture = read_image(picture)
            except UnreadableImageError as error:
                raise ValueError(f"images: {picture}: {error}") from error
        elif not isinstance(picture, Image.Image):
            picture = Image.fromarray(picture)
        try:
            return transform(to_rgb(picture))
        except UnreadableImageError as error:
            raise ValueError(f"images: {error}") from error

    def _pool(self) -> TextConditionedPool:
        if not self.pooled or self.model.pool is None:
            raise ValueError("the weights have no pooling block: load a checkpoint of a β-CLIP model")
        return self.model.pool


def load(
    path: str | Path,
    *,
    name: str | None = None,
    device: str = "auto",
    batch_size: int = 64,
    weights: Weights = "auto",
    head_width: int | None = None,
    pool_heads: int | None = None,
) -> Model:
    """Load a trained model for use from Python.

    Args:
        path: the folder of a run, one of its checkpoints, a folder that ``betaclip export`` wrote, a file in the
            published layout or in that of released FLAIR checkpoints, or, with ``name``, a file in open_clip's layout
            or the tag of an open_clip model (``load("openai", name="ViT-B-16")``).
        name: name of the open_clip model (CLIP or SigLIP) that the weights belong to; it brings its own tokenizer and
            preprocessing. Such a model has no pooling block and supports only ``encode_image``, ``encode_text`` and
            ``similarity``.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``, which takes a GPU if there is one.
        batch_size: the number of pictures or texts that are encoded at a time.
        weights: which weights of a run with ``optimizer.ema_decay`` to take: ``ema``, their average, ``raw``, those
            after the last update, or ``auto``, the average if there is one. ``model.averaged`` of the result says which
            it has.
        head_width, pool_heads: width of the towers' attention heads, and number of heads of the pooling block, for a
            file in the published or in FLAIR's layout, whose tensors do not show them. By default the numbers in the
            file's metadata, or 64 and 8.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the folder.
        ValueError: the file is damaged or has another layout, or there is no such device; the message is one line.

    Example:
        >>> import tempfile, torch
        >>> import betaclip
        >>> from betaclip.model import ModelConfig, create_model
        >>> from betaclip.published import save_published
        >>> untrained = create_model(ModelConfig(quick_gelu=True, context_length=248))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_published(untrained, f"{folder}/model.safetensors")
        ...     model = betaclip.load(f"{folder}/model.safetensors")
        >>> picture = torch.rand(3, 72, 72)
        >>> model.similarity(picture, ["a red mug", "a dog"]).shape
        torch.Size([1, 2])
        >>> model.attention(picture, "a red mug").shape
        torch.Size([1, 6, 6])
    """
    chosen = local_device(device)
    if name is None:
        model = load_checkpoint(path, device=chosen, weights=weights, head_width=head_width, pool_heads=pool_heads)
        return Model(model, batch_size=batch_size)
    return Model(create_plain(name, str(path)).to(chosen), batch_size=batch_size)


def attention(model: BetaCLIP, tokenizer: Tokenize, pixels: Tensor, texts: Sequence[str]) -> Tensor:
    """The attention of M texts over the grid of patches of a picture (3, S, S): (M, rows, columns), averaged over
    heads; each sums to 1."""
    return _attention(model, model.pool, tokenizer, pixels, texts)


def _attention(
    model: Encoder, pool: TextConditionedPool, tokenizer: Tokenize, pixels: Tensor, texts: Sequence[str]
) -> Tensor:
    with evaluating(model):
        _, patches = encode_images(model, [pixels])
        queries, _ = encode_slots(model, tokenizer, [texts])
        weights: Tensor = pool(patches, queries, need_weights=True)[1][0].float()
    weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return weights.unflatten(1, model.patch_grid)


def _pictures(images: PictureLike | Sequence[PictureLike]) -> Sequence[Any]:
    """A list of pictures, of which a tensor of four dimensions is one already."""
    many = (
        images.dim() == 4
        if isinstance(images, Tensor)
        else isinstance(images, Sequence) and not isinstance(images, str)
    )
    return images if many else [images]  # type: ignore[return-value]


def _unit(embeds: Tensor) -> Tensor:
    return F.normalize(embeds.float(), dim=-1)


def _texts(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
