"""The batch that ranks share, and what one process makes of it."""

import torch
import torch.distributed as dist
from torch import Tensor

K, D = 4, 8
SCALE = torch.tensor(5.0, dtype=torch.float64)


def whole_batch(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Image and text embeddings (B, K, D) of unequal norms, and a mask that leaves the last image no text."""
    images = sum(sizes)
    image, text = (torch.randn(images, K, D, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(images, K) < 0.7
    mask[-1] = False
    return image, text, mask


def own_part(sizes: tuple[int, ...]) -> slice:
    rank = dist.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
