"""Synthetic batches for the losses, that look like training."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

INVERSE_TEMPERATURE = 1 / 0.07  # where CLIP's starts
SIGLIP_BIAS = -10.0  # where SigLIP's starts


@dataclass(frozen=True)
class Batch:
    """image, text: (B, K, D) raw; scale: (); bias: (), which only the form "siglip" uses."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that gradients are taken with respect to."""
        return self.image, self.text, self.scale, self.bias

    def to_leaves(self, dtype: torch.dtype | None = None, images: slice = slice(None)) -> "Batch":
        """A copy as new leaves: in another dtype, of some images only. Scalars stay float32 or float64."""
        dtype = dtype or self.image.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        kinds = (self.image[images], dtype), (self.text[images], dtype), (self.scale, wide), (self.bias, wide)
        return Batch(*(x.detach().to(kind, copy=True).requires_grad_() for x, kind in kinds))


def synthetic_batch(images: int, texts_per_image: int, dim: int, dtype: torch.dtype, device: torch.device) -> Batch:
    """A batch as in training: expected cosines 0.45 with the own text, 0.2 within an image, 0.05 elsewhere.

    Each embedding is a sum of directions that are nearly orthogonal, as D is large: one of the whole batch, one
    of its image, one that it shares with its own text only, one of its own. Norms vary.
    """
    generator = torch.Generator(device).manual_seed(0)

    def directions(rows: int, columns: int, squared: float) -> Tensor:
        x = torch.randn(rows, columns, dim, device=device, generator=generator)
        return F.normalize(x, dim=-1) * math.sqrt(squared)

    shape = images, texts_per_image
    shared = directions(1, 1, 0.05) + directions(images, 1, 0.15) + directions(*shape, 0.25)
    image, text = (
        (shared + directions(*shape, 0.55))
        * torch.empty(*shape, 1, device=device).uniform_(0.5, 2, generator=generator)
        for _ in range(2)
    )
    scalars = (torch.tensor(x, device=device) for x in (INVERSE_TEMPERATURE, SIGLIP_BIAS))
    return Batch(image, text, *scalars).to_leaves(dtype)
