"""Merges the adapters that training with LoRA puts beside the towers' layers, as files of weights hold them."""

from collections.abc import Mapping

from torch import Tensor

_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def has_adapters(weights: Mapping[str, Tensor]) -> bool:
    return any(name.endswith(_DOWN) for name in weights)


def merge_adapters(weights: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The weights of the model without adapters that computes the same.

    Args:
        weights: of layers with adapters by peft's names: LAYER.base_layer.weight (M, N), LAYER.lora_A.default.weight
            (R, N) and LAYER.lora_B.default.weight (M, R), and any others.
        alpha: what adapters compute is multiplied by alpha / R.

    Returns:
        Under LAYER.weight, base + alpha / R * lora_B @ lora_A; all others as they were.

    Raises:
        ValueError: the adapter of a layer is missing or does not fit it.
    """
    merged = {}
    for name, tensor in weights.items():
        layer, base, own = name.rpartition(_BASE)
        if base and own == "weight":
            down, up = weights.get(layer + _DOWN), weights.get(layer + _UP)
            if down is None or up is None or not _fits(tensor, down, up):
                raise ValueError(f"{layer}: expected an adapter for a weight of shape {tuple(tensor.shape)}")
            tensor = tensor + alpha / len(down) * (up @ down).to(tensor.dtype)
        if not name.endswith((_DOWN, _UP)):
            merged[f"{layer}.{own}" if base else name] = tensor
    return merged


def _fits(weight: Tensor, down: Tensor, up: Tensor) -> bool:
    return down.dim() == up.dim() == 2 and up.shape[1] == len(down) and weight.shape == (len(up), down.shape[1])
