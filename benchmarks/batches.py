"""What the loss benchmarks measure on: made-up batches that look like training, and real ones from a file."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

INVERSE_TEMPERATURE = 1 / 0.07  # where CLIP's starts
SIGLIP_BIAS = -10.0  # where SigLIP's starts


@dataclass(frozen=True)
class Batch:
    """image, text: (B, K, D) raw; scale: (); bias: () for the form "siglip"; mask: (B, K), True = valid, or None."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return (self.image, self.text, self.scale) + (() if self.bias is None else (self.bias,))

    def to_leaves(
        self, dtype: torch.dtype | None = None, *, images: int | None = None, bias: float | None = None
    ) -> "Batch":
        """A copy as new leaves: in another dtype, of the first images only, with a bias. Scalars stay wide."""
        dtype = dtype or self.image.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        given = self.bias if bias is None else torch.tensor(bias, device=self.image.device)

        def leaf(x: Tensor, kind: torch.dtype) -> Tensor:
            return x.detach().to(kind, copy=True).requires_grad_()

        return Batch(
            leaf(self.image[:images], dtype),
            leaf(self.text[:images], dtype),
            leaf(self.scale, wide),
            None if given is None else leaf(given, wide),
            None if self.mask is None else self.mask[:images],
        )


def made_up_batch(images: int, texts: int, dim: int, dtype: torch.dtype, device: torch.device) -> Batch:
    """A batch as in training: expected cosines 0.45 with the own text, 0.2 within an image, 0.05 elsewhere.

    Each embedding is a sum of directions that are nearly orthogonal, as D is large: one of the whole batch, one
    of its image, one that it shares with its own text only, one of its own. Norms vary.
    """
    generator = torch.Generator(device).manual_seed(0)

    def directions(rows: int, columns: int, squared: float) -> Tensor:
        x = torch.randn(rows, columns, dim, device=device, generator=generator)
        return F.normalize(x, dim=-1) * math.sqrt(squared)

    shared = directions(1, 1, 0.05) + directions(images, 1, 0.15) + directions(images, texts, 0.25)
    image, text = (
        (shared + directions(images, texts, 0.55))
        * torch.empty(images, texts, 1, device=device).uniform_(0.5, 2, generator=generator)
        for _ in range(2)
    )
    return Batch(image, text, torch.tensor(INVERSE_TEMPERATURE, device=device)).to_leaves(dtype)


def real_batch(path: Path, dtype: torch.dtype, device: torch.device) -> Batch:
    """From a safetensors file: image_embeds and text_embeds (B, K, D), optionally mask (B, K) and logit_scale.

    Raises:
        ValueError: a tensor is missing or has another shape.
        ImportError: safetensors is not installed.
    """
    from safetensors.torch import load_file

    tensors = load_file(path, device=str(device))
    for name in ("image_embeds", "text_embeds"):
        if name not in tensors:
            raise ValueError(f"{path.name}: expected a tensor {name}, there are {', '.join(sorted(tensors))}")
    image, text, mask = tensors["image_embeds"], tensors["text_embeds"], tensors.get("mask")
    if image.dim() != 3 or image.shape != text.shape:
        raise ValueError(f"{path.name}: expected two (B, K, D), got {tuple(image.shape)} and {tuple(text.shape)}")
    if mask is not None and mask.shape != image.shape[:2]:
        raise ValueError(f"{path.name}: expected mask {tuple(image.shape[:2])}, got {tuple(mask.shape)}")
    scale = tensors.get("logit_scale", torch.tensor(INVERSE_TEMPERATURE, device=device)).reshape(())
    return Batch(image, text, scale, mask=None if mask is None else mask.bool()).to_leaves(dtype)
