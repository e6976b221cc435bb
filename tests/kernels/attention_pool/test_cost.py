"""The cost model: where folding the projections pays."""

import pytest
import torch

from betaclip.kernels.attention_pool.cost import folded_cost, folding_pays, projected_cost

# Where folding stops to pay on the CPU in float32: texts per image, by patches and width, for 64 images and 8 heads.
SWITCH = {(49, 512): 19, (196, 512): 40, (256, 512): 47, (576, 512): 54, (196, 768): 52, (576, 768): 74}


@pytest.mark.parametrize("patches, width", SWITCH)
def test_cost_model_switches_once(patches, width):
    choices = [folding_pays(64, k, patches, width, 8, torch.float32, "cpu") for k in range(1, 200)]
    last = choices.index(False)
    assert all(choices[:last]) and not any(choices[last:])
    assert last == SWITCH[patches, width]


def test_cost_model_counts_the_products():
    """FLOP by hand at K = 36, P = 196, D = 512, H = 8: projections of 2 x 196 rows and of 36, three products each.
    Folded, P counts as a multiple of 32."""
    texts, patches, width, heads = 36, 196, 512, 8
    projection, attention = 2 * 2 * patches * width**2, 2 * texts * patches * width
    padded = 2 * texts * 224 * width
    assert projected_cost(64, texts, patches, width, heads, 4).flop == 3 * projection + 7 * attention
    assert folded_cost(64, texts, patches, width, heads, 4).flop == 8 * heads * padded + 7 * 2 * texts * width**2
