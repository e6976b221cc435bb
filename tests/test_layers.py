"""The layers that the pooling block and the towers share, against PyTorch's and open_clip's own."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU as OpenClipQuickGELU
from support.adapters import Adapter, hooked
from torch import Tensor, nn
from torch.nn.utils import parametrize

from betaclip import layers
from betaclip.layers import LayerNorm, QuickGELU, attention, attention_not_supported_reasons


def test_quick_gelu():
    x = 3 * torch.randn(50, dtype=torch.float64)
    torch.testing.assert_close(QuickGELU()(x), OpenClipQuickGELU()(x), atol=1e-14, rtol=1e-14)


def test_quick_gelu_gradients():
    x = torch.linspace(-4, 4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(QuickGELU(), x)
    assert torch.autograd.gradgradcheck(QuickGELU(), x)
    (expected,) = torch.autograd.grad(OpenClipQuickGELU()(x).sum(), x)
    compiled = torch.compile(QuickGELU(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(QuickGELU().forward))(x.detach()), expected)


def test_quick_gelu_keeps_one_tensor():
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        QuickGELU()(torch.randn(5, requires_grad=True))
    assert len(kept) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_layer_norm(dtype):
    """Rounded once, from float32, also where 16-bit sums would overflow."""
    norm = LayerNorm(64, dtype=dtype)
    nn.init.normal_(norm.weight)
    x = (torch.randn(3, 64) * 1e4).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = F.layer_norm(x.to(wide), (64,), norm.weight.to(wide), norm.bias.to(wide))
    assert torch.equal(norm(x), expected.to(dtype))


class Overridden(nn.MultiheadAttention):
    def forward(self, *args: Tensor) -> Tensor:
        return 2 * super().forward(*args)[0]


def replaced_forward(attn: nn.MultiheadAttention) -> nn.Module:
    attn.forward = lambda *args: args  # as tools that offload weights do
    return attn


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
WRAPPED = {
    "adapter": (Adapter, "attn has a forward of its own (Adapter)"),
    "subclass": (lambda _: Overridden(8, 2), "attn has a forward of its own (Overridden)"),
    "replaced forward": (replaced_forward, "attn has a forward of its own (MultiheadAttention)"),
    **{kind: (partial(hooked, kind=kind), "attn has hooks") for kind in HOOKS},
}


@pytest.mark.parametrize("wrap, reason", WRAPPED.values(), ids=WRAPPED)
def test_attention_that_must_be_called(wrap, reason):
    (found,) = attention_not_supported_reasons(wrap(nn.MultiheadAttention(8, 2)))
    assert found.startswith(reason)


def test_attention_whose_weights_may_be_read():
    attn = nn.MultiheadAttention(8, 2)
    assert not attention_not_supported_reasons(attn)
    parametrize.register_parametrization(attn, "in_proj_weight", nn.Identity())
    assert not attention_not_supported_reasons(attn)


@pytest.mark.parametrize("queries, is_causal", [(1, False), (7, False), (7, True)])
def test_attention_of_short_sequences(queries, is_causal, monkeypatch):
    """As PyTorch's, which is called for long ones."""
    leaves = [torch.randn(2, n, 3, 8, dtype=torch.float64, requires_grad=True) for n in (queries, 7, 7)]
    runs = []
    for short in (7, 6):
        monkeypatch.setattr(layers, "SHORT", short)
        out = attention(*(t.transpose(1, 2) for t in leaves), is_causal=is_causal)
        runs.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    fused = "ScaledDotProduct" in runs[0][0].grad_fn.name(), "ScaledDotProduct" in runs[1][0].grad_fn.name()
    assert fused == (queries == 1, True)
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs)
