"""The lean QuickGELU is open_clip's, and adopting blocks leaves all but their kind."""

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from betaclip.model.blocks import LeanQuickGELU, adopt


class Other(ResidualAttentionBlock):
    pass


class Last(ResidualAttentionBlock):
    pass


def test_lean_quick_gelu():
    x = 3 * torch.randn(50, dtype=torch.float64)
    x.requires_grad_()
    torch.testing.assert_close(LeanQuickGELU()(x), QuickGELU()(x), atol=1e-14, rtol=1e-14)
    assert torch.autograd.gradcheck(LeanQuickGELU(), x)


def test_lean_quick_gelu_keeps_one_tensor():
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        LeanQuickGELU()(torch.randn(5, requires_grad=True))
    assert len(kept) == 1


def test_adopt():
    blocks = nn.ModuleList(ResidualAttentionBlock(8, 2, act_layer=act) for act in (QuickGELU, nn.GELU, QuickGELU))
    state = {name: tensor.data_ptr() for name, tensor in blocks.state_dict().items()}
    adopt(blocks, Other, Last)
    assert [type(block) for block in blocks] == [Other, Other, Last]
    assert [type(block.mlp.gelu) for block in blocks] == [LeanQuickGELU, nn.GELU, LeanQuickGELU]
    assert {name: tensor.data_ptr() for name, tensor in blocks.state_dict().items()} == state
