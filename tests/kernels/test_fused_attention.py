from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from betaclip.kernels.fused_attention import fused_attention


def test_cudnn_is_left_out_on_gpus(monkeypatch):
    """And may be used again by whoever comes after."""
    allowed = torch.backends.cuda.cudnn_sdp_enabled
    before = allowed()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **options: allowed())
        q = SimpleNamespace(device=torch.device("cuda"))
        assert not fused_attention(q, None, None)
        assert allowed()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 37])
def test_gradients_of_any_strides(queries):
    """Those that are whole tensors first, then slices of larger ones, which cuDNN's kernels confuse."""
    x = torch.randn(8, 37, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def attend(x, function):
        heads = [t.unflatten(2, (4, 32)).transpose(1, 2) for t in (x[:, :queries], x * 1.5, x * 0.5)]
        return function(*heads).transpose(1, 2).flatten(2)

    for more in (0, 5):
        incoming = torch.randn(8, queries + more, 128, device="cuda", dtype=torch.bfloat16)[:, :queries]
        (ours,) = torch.autograd.grad(attend(x, fused_attention), x, incoming)
        wide = x.detach().double().requires_grad_()
        (truth,) = torch.autograd.grad(attend(wide, F.scaled_dot_product_attention), wide, incoming.double())
        assert (ours - truth).norm() < 1e-2 * truth.norm()
