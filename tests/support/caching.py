"""Two small towers with dropout, a loss over the whole batch, and batches for them."""

import torch
from torch import Tensor, nn

from betaclip import BetaCALLoss

IMAGES, K, D = 7, 3, 8


class Model(nn.Module):
    """Towers with dropout, a scale that no micro-batch changes, and a mask without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.GELU(), nn.Linear(16, D))
        self.text = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.GELU(), nn.Linear(16, D))
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Linear(2, 2)
        self.unused.requires_grad_(False)

    def forward(self, micro_batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        image, text = micro_batch
        return {
            "image": self.image(image),
            "text": self.text(text),
            "mask": image[..., 0] > -1,
            "scale": self.log_scale.exp(),
            "unused": self.unused(image[..., :2]),
        }


def objective(out: dict[str, Tensor]) -> Tensor:
    torch.rand(3)  # a loss may draw too
    return BetaCALLoss(gather=False)(out["image"], out["text"], out["scale"], mask=out["mask"])


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(IMAGES, K, 5, dtype=dtype), torch.randn(IMAGES, K, 6, dtype=dtype)


def split(whole: tuple[Tensor, Tensor], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(whole[0].split(sizes), whole[1].split(sizes), strict=True))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]
