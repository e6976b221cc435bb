"""``betaclip export``: writes the model of a run in another layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from betaclip.checkpoint import AVERAGED, Weights, load_checkpoint
from betaclip.errors import ConfigError
from betaclip.files import reporting
from betaclip.published import save_published


@dataclass(frozen=True)
class ExportConfig:
    """The model, the file to write and its layout."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder, or one of its checkpoints."""
    output: tyro.conf.Positional[Path]
    """The file to write, whose name ends in .safetensors."""
    to: Literal["published"]
    """The layout: that of the released β-CLIP checkpoints, which betaclip's other commands read as well."""
    weights: Weights = "auto"
    """Of a run with optimizer.ema_decay: ema, the average of the weights, raw, those after the last update, or auto,
    the average if there is one."""


def export(config: ExportConfig) -> None:
    """Write the file.

    Raises:
        ConfigError: there is no such checkpoint, the layout cannot express its model, or the file has another ending.
        OutputError: the file cannot be written.
    """
    if config.output.suffix != ".safetensors":
        raise ConfigError(f"output: expected a name that ends in .safetensors, got {config.output}")
    try:
        model = load_checkpoint(config.checkpoint, weights=config.weights)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    with reporting(config.output):
        config.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_published(model, config.output)
    except NotImplementedError as error:
        raise ConfigError(f"{config.checkpoint}: {error}") from error
    # No tensor shows the heads; whoever loads the file with others gets another model.
    block = model.clip.visual.transformer.resblocks[0].attn
    heads = f"--head-width {block.embed_dim // block.num_heads} --pool-heads {model.config.pool_heads}"
    if model.averaged:
        print(AVERAGED)
    print(f"{config.output}: written; betaclip reads it with {heads}")
