"""Which parameters a run trains: none that its losses do not reach, and of the towers what the settings say."""

from typing import Any

from torch import nn

from betaclip.errors import ConfigError
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.text_tower import text_modules
from betaclip.training.config import LockConfig, TrainingConfig
from betaclip.training.lora import add_adapters
from betaclip.training.objective import Objective


def freeze(model: BetaCLIP, config: TrainingConfig, objective: Objective) -> None:
    """Freeze what is not trained, and give the towers their adapters.

    Frozen parameters get no gradients and no optimizer state, and neither weight decay nor clipping sees them.

    Raises:
        ConfigError: the towers have not the layers that the settings name.
    """
    freeze_unused(model, objective)
    lock_towers(model, config.lock)
    if config.lora.rank:
        add_adapters(model, config.lora)


def freeze_unused(model: BetaCLIP, objective: Objective) -> None:
    """Freeze the parameters that no loss term reaches: they would neither get a gradient nor should they decay."""
    if not objective.needs("pooled_embeds", "scores"):
        model.pool.requires_grad_(False)
    if not objective.needs("pool_logit_scale"):
        model.pool.logit_scale.requires_grad_(False)
    if not objective.needs("logit_scale"):
        model.logit_scale.requires_grad_(False)
    if model.logit_bias is not None:
        model.logit_bias.requires_grad_(objective.needs("logit_bias"))


def lock_towers(model: BetaCLIP, config: LockConfig) -> None:
    """Freeze the towers, or all but their last layers, as open_clip's trainer locks them.

    Raises:
        ConfigError: a tower has not so many groups of layers.
    """
    clip: Any = model.clip
    if config.image:
        tower = clip.visual
        _check("image_unlocked_groups", config.image_unlocked_groups, tower)
        clip.lock_image_tower(unlocked_groups=config.image_unlocked_groups)
        _set_layer_norms(tower, config.image_freeze_layer_norm)
    if config.text:
        tower = text_modules(clip)
        _check("text_unlocked_layers", config.text_unlocked_layers, tower)
        clip.lock_text_tower(unlocked_layers=config.text_unlocked_layers)
        # open_clip sees no parameter in positions that are stretched, hence parametrized.
        for name, parameter in tower.named_parameters():
            if name.startswith("parametrizations.positional_embedding."):
                parameter.requires_grad_(tower.token_embedding.weight.requires_grad)
        for part in (tower.transformer, tower.ln_final):  # of an open_clip CLIP, the tower also holds the other one
            _set_layer_norms(part, config.text_freeze_layer_norm)


def _check(option: str, unlocked: int, tower: Any) -> None:
    groups = len(tower.transformer.resblocks) + 2  # embeddings, blocks, projection
    if not 0 <= unlocked <= groups:
        raise ConfigError(f"lock.{option}: expected 0 to {groups}, as the tower has {groups} groups, got {unlocked}")


def _set_layer_norms(part: nn.Module, freeze: bool) -> None:
    if not freeze:
        for module in part.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_()
