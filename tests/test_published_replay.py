"""The released training loop and the trainer's, update by update, on images with different numbers of texts."""

import pytest
import torch
from published_replay import replay
from safetensors.torch import load_file
from support.paths import GOLDEN

RECORD = GOLDEN / "published_training.safetensors"


@pytest.mark.parametrize("form", ["ce", "bce"])
def test_curve(form):
    """Both losses and both inverse temperatures before each update."""
    torch.testing.assert_close(replay(RECORD, form), load_file(RECORD)[f"curve.{form}"], rtol=1e-5, atol=0)
