"""Low-rank adapters (LoRA, arXiv 2106.09685) in the towers, by the library peft."""

from typing import Any

from torch import nn

from betaclip.errors import ConfigError
from betaclip.model.beta_clip import BetaCLIP
from betaclip.training.config import LoraConfig


def add_adapters(model: BetaCLIP, config: LoraConfig) -> None:
    """Give the towers' linear layers adapters, and freeze everything else in the towers. They start without effect.

    Files of weights hold the frozen layers and the adapters beside each other; whatever reads them merges these
    (``betaclip.model.weights``).

    Raises:
        ConfigError: peft is not installed, or a target is not the name of linear layers of the towers.
    """
    for target in config.targets:
        _check(target, model.clip)
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ConfigError("lora.rank: peft is not installed: pip install peft") from error
    options: Any = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    inject_adapter_in_model(PeftConfig(target_modules=list(config.targets), **options), model.clip)


def _check(target: str, towers: nn.Module) -> None:
    found = [module for name, module in towers.named_modules() if f".{name}".endswith(f".{target}") and name]
    if found and all(isinstance(module, nn.Linear) for module in found):
        return
    kinds = {type(module).__name__ for module in found if not isinstance(module, nn.Linear)}
    got = f"{target!r}, which is a {', '.join(sorted(kinds))}" if kinds else repr(target)
    # The towers read the weights of attn rather than call it, so an adapter of it would do nothing.
    raise ConfigError(f"lora.targets: expected names of linear layers of the towers, such as out_proj, c_fc and "
                      f"c_proj, got {got}")  # fmt: skip
