"""The cost model: where folding the projections pays, and the launches that it counts."""

from itertools import pairwise

import pytest
import torch
from support.attention_pool import arguments
from support.dispatches import Dispatches

from betaclip.kernels.attention_pool import rows
from betaclip.kernels.attention_pool.cost import (
    FOLDED_LAUNCHES,
    PROJECTED_LAUNCHES,
    folded_cost,
    folding_pays,
    projected_cost,
)
from betaclip.kernels.attention_pool.operators import Backend, attention_pool

# Where folding stops to pay in float32 on the CPU and in bfloat16 on a GPU: texts per image, by patches and width, for
# 64 images and 8 heads.
SWITCH = {
    "cpu": {(49, 512): 20, (196, 512): 48, (256, 512): 58, (576, 512): 70, (196, 768): 62, (576, 768): 95},
    "cuda": {(49, 512): 7, (196, 512): 22, (256, 512): 28, (576, 512): 32, (196, 768): 24, (576, 768): 40},
}


@pytest.mark.parametrize("device, dtype", [("cpu", torch.float32), ("cuda", torch.bfloat16)])
@pytest.mark.parametrize("patches, width", SWITCH["cpu"])
def test_cost_model_switches_once(patches, width, device, dtype):
    choices = [folding_pays(64, k, patches, width, 8, dtype, device) for k in range(1, 200)]
    last = choices.index(False)
    assert all(choices[:last]) and not any(choices[last:])
    assert last == SWITCH[device][patches, width]


def test_cost_model_counts_the_products():
    """FLOP by hand at K = 36, P = 196, D = 512, H = 8: projections of 2 x 196 rows and of 36, three products each.
    Folded, P counts as a multiple of 32, and two of the backward's six products were kept."""
    texts, patches, width, heads = 36, 196, 512, 8
    projection, attention = 2 * 2 * patches * width**2, 2 * texts * patches * width
    padded = 2 * texts * 224 * width
    assert projected_cost(64, texts, patches, width, heads, 4).flop == 3 * projection + 7 * attention
    kept, recomputed = (folded_cost(images, texts, patches, width, heads, 4).flop for images in (64, 10**9))
    assert kept == 6 * heads * padded + 7 * 2 * texts * width**2
    assert recomputed == pytest.approx(8 * heads * padded + 7 * 2 * texts * width**2)


def test_gpu_kernels_compute_whole_tiles():
    """6 to 8 texts of 8 heads fill the same tile of 64 latent queries; the ninth begins another. 196 patches count as
    256."""
    flop = [folded_cost(64, texts, 196, 512, 8, 2, "cuda").flop for texts in (6, 7, 8, 9)]
    steps = [more - less for less, more in pairwise(flop)]
    logits_and_means = 2 * 2 * 64 * 256 * 512
    # In the forward, in the backward, and three halves in the products; at half of the library's rate.
    assert steps[0] == steps[1] and steps[2] - steps[0] == 2 * 3.5 * logits_and_means


def test_cost_model_counts_what_is_launched(monkeypatch):
    """A batch that is one chunk launches kernels, and PyTorch's operators that compute."""
    triton_kernels = pytest.importorskip("betaclip.kernels.attention_pool.triton_kernels")
    triton_rows = pytest.importorskip("betaclip.kernels.attention_pool.triton_rows")
    kernels = []
    for module in (triton_kernels, triton_rows):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: kernels.append(kernel))
    monkeypatch.setattr(triton_kernels.architecture, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(rows, "kernels_serve", lambda x: True)
    shapes = (256, 196, 512), (256, 36, 512), (512, 512), (512, 512), (512,)
    large = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
    found = [*forward_and_backward(large, triton_kernels.Fused()), *kernels]
    assert len(found) == FOLDED_LAUNCHES - 1, found  # the gradient of the weights, which 16 bits round
    assert [name for name in found if name == "_to_copy"] == []
    kernels.clear()
    small = [t.requires_grad_() for t in arguments(2, 3, 7, 16, torch.float32)]
    found = [*forward_and_backward(small, "sdpa"), *kernels]
    assert len(found) == PROJECTED_LAUNCHES, found


def forward_and_backward(leaves: list[torch.Tensor], backend: Backend) -> list[str]:
    with Dispatches() as dispatches:
        out = attention_pool(*leaves, 4, backend=backend)
        torch.autograd.grad(out, leaves, torch.empty_like(out))
    return dispatches.launches
