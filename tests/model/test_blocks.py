"""Replaced blocks: the same modules under the same names, open_clip's own computation, and what cannot be replaced."""

import copy

import pytest
import torch
from open_clip.transformer import CustomResidualAttentionBlock, QuickGELU, ResidualAttentionBlock
from support.adapters import AdaptedLinear, Adapter, hooked
from torch import nn
from torch.nn.utils import parametrize

from betaclip import layers
from betaclip.model.blocks import Block, blocks_not_supported_reasons, replace_blocks, run_block


class Other(Block):
    pass


def blocks(*activations: type[nn.Module]) -> nn.ModuleList:
    return nn.ModuleList(ResidualAttentionBlock(8, 2, act_layer=act, ls_init_value=0.5) for act in activations)


def test_replaced_blocks_have_the_same_modules():
    replaced = blocks(QuickGELU, nn.GELU).eval()
    state = {name: tensor.data_ptr() for name, tensor in replaced.state_dict().items()}
    attentions = [block.attn for block in replaced]
    replace_blocks(replaced, Other)
    assert [type(block) for block in replaced] == [Other, Other]
    assert [type(block.mlp.gelu) for block in replaced] == [layers.QuickGELU, nn.GELU]
    assert {name: tensor.data_ptr() for name, tensor in replaced.state_dict().items()} == state
    assert [block.attn for block in replaced] == attentions
    assert not any(module.training for block in replaced for module in block.modules())


@pytest.mark.parametrize("activation", [QuickGELU, nn.GELU])
def test_replaced_blocks_compute_what_they_did(activation):
    replaced = blocks(activation).double()
    (block,) = copy.deepcopy(replaced)
    replace_blocks(replaced, Other)
    x, mask = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(5, 5)
    torch.testing.assert_close(replaced[0](x, attn_mask=mask), block(x, attn_mask=mask), atol=1e-14, rtol=1e-14)


def test_in_projection():
    """It is read through the module, so that parametrizations act, and refused where the module must be called."""
    block = Other(*blocks(nn.GELU))
    assert block.in_projection()[0] is block.attn.in_proj_weight
    parametrize.register_parametrization(block.attn, "in_proj_bias", nn.Softplus())
    assert (block.in_projection()[1] > 0).all()
    block.attn = Adapter(block.attn)
    with pytest.raises(NotImplementedError, match=r"tower reads the weights .* \(Adapter\).* Adapt attn.out_proj"):
        block.in_projection()


def test_adapted_output_projection_acts():
    block, x = Other(*blocks(nn.GELU)), torch.randn(3, 8)
    before = block.add_attended(x, x)
    block.attn.out_proj = adapted = AdaptedLinear(block.attn.out_proj)
    after = block.add_attended(x, x)
    assert not torch.allclose(after, before) and torch.autograd.grad(after.square().sum(), adapted.added)[0].any()


def test_run_block_computes_again():
    calls = []

    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor, *, by: float) -> torch.Tensor:
            calls.append(by)
            return x.sin() * by

    x = torch.randn(3, requires_grad=True)
    for checkpointing, expected in ((False, 1), (True, 2)):
        calls.clear()
        out = run_block(Doubled(), x, checkpointing, by=2.0)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], 2 * x.detach().cos())
        assert calls == [2.0] * expected
    with torch.no_grad():
        assert not run_block(Doubled(), x, True, by=2.0).requires_grad


def test_not_supported_reasons():
    plain = blocks(nn.GELU, nn.GELU)
    assert blocks_not_supported_reasons(plain, "text") == []
    wrapped, hooks = copy.deepcopy(plain), copy.deepcopy(plain)
    wrapped[1].attn, hooks[0].attn = Adapter(wrapped[1].attn), hooked(hooks[0].attn)
    assert blocks_not_supported_reasons(wrapped, "text") == [
        "the text tower's attn has a forward of its own (Adapter), which would never be called"
    ]
    hooks[1].register_forward_hook(lambda *_: None)
    assert blocks_not_supported_reasons(hooks, "vision") == [
        "the vision tower's attn has hooks, which would never be called",
        "the vision tower's blocks have hooks; register them once the model is made",
    ]
    replace_blocks(plain, Other)
    mixed = [*plain, CustomResidualAttentionBlock(8, 2)]
    assert blocks_not_supported_reasons(mixed, "text") == [
        "the text tower has blocks of type CustomResidualAttentionBlock, Other, not ResidualAttentionBlock"
    ]
