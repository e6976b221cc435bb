import pytest
import torch

from betaclip.model.adapters import has_adapters, merge_adapters


def weights() -> dict[str, torch.Tensor]:
    return {
        "a.base_layer.weight": torch.zeros(2, 3),
        "a.base_layer.bias": torch.ones(2),
        "a.lora_A.default.weight": torch.tensor([[1.0, 2.0, 3.0]]),
        "a.lora_B.default.weight": torch.tensor([[1.0], [-1.0]]),
        "b.weight": torch.ones(4),
    }


def test_merge():
    merged = merge_adapters(weights(), alpha=2.0)
    assert merged.keys() == {"a.weight", "a.bias", "b.weight"}
    assert merged["a.weight"].tolist() == [[2, 4, 6], [-2, -4, -6]] and merged["a.bias"].tolist() == [1, 1]
    assert has_adapters(weights()) and not has_adapters(merged)


@pytest.mark.parametrize(
    "change",
    [
        {"a.lora_B.default.weight": torch.ones(3, 1)},
        {"a.lora_B.default.weight": torch.ones(2, 2)},
        {"a.lora_A.default.weight": torch.ones(1, 2)},
        {"a.lora_A.default.weight": torch.ones(())},
        {"a.lora_A.default.weight": None},
    ],
)
def test_rejects(change):
    state = {name: value for name, value in (weights() | change).items() if value is not None}
    with pytest.raises(ValueError, match=r"a: expected an adapter for a weight of shape \(2, 3\)"):
        merge_adapters(state, alpha=1.0)
