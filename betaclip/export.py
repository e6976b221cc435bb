"""``betaclip export``: writes a trained model for other programs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from betaclip.checkpoint import AVERAGED, Weights, load_checkpoint
from betaclip.errors import ConfigError
from betaclip.exported import save_open_clip, save_transformers
from betaclip.files import reporting
from betaclip.model.beta_clip import BetaCLIP
from betaclip.published import heads_of, save_published

Layout = Literal["open_clip", "transformers", "published"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The model, its new layout, and where to write it."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder, one of its checkpoints, a file in the published or in FLAIR's layout, or a folder that export
    wrote."""
    output: tyro.conf.Positional[Path | None] = None
    """The folder to write, which must not exist yet; for the published layout, a file whose name ends in .safetensors.
    By default open_clip, transformers or published.safetensors in the run's folder."""
    to: Layout
    """open_clip: a folder that open_clip.create_model_and_transforms and get_tokenizer load by local-dir:FOLDER.
    transformers: a folder that CLIPModel.from_pretrained and CLIPProcessor.from_pretrained load. published: a file in
    the layout of the released β-CLIP checkpoints. betaclip reads all of them again, with the pooling block."""
    weights: Weights = "auto"
    """Which weights of a run with optimizer.ema_decay to take: ema, their average, raw, those after the last update, or
    auto, the average if there is one."""
    head_width: int | None = None
    """Width of the towers' attention heads, if the file has the published or FLAIR's layout and does not say it; by
    default 64."""
    pool_heads: int | None = None
    """Attention heads of the pooling block, likewise; by default 8."""


def export(config: ExportConfig) -> None:
    """Write the model.

    Raises:
        ConfigError: there is no such checkpoint, the layout cannot hold its model, or the output exists or is named
            otherwise than the layout needs.
        OutputError: the output cannot be written.
    """
    output = config.output or _default_output(config.checkpoint, config.to)
    if config.to == "published" and output.suffix != ".safetensors":
        raise ConfigError(f"output: expected a name that ends in .safetensors, got {output}")
    try:
        model = load_checkpoint(
            config.checkpoint, weights=config.weights, head_width=config.head_width, pool_heads=config.pool_heads
        )
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    try:
        done = _WRITERS[config.to](model, output)
    except NotImplementedError as error:
        raise ConfigError(f"{config.checkpoint}: {error}; --to open_clip can") from error
    except ConfigError as error:
        raise ConfigError(f"output: {error}") from error
    if model.averaged:
        print(AVERAGED)
    print(f"{output}: written; {done}")


def _default_output(checkpoint: Path, to: Layout) -> Path:
    name = "published.safetensors" if to == "published" else to
    if checkpoint.is_dir():
        return checkpoint / name
    return checkpoint.with_name(f"{checkpoint.stem}_{name}")


def _open_clip(model: BetaCLIP, output: Path) -> str:
    save_open_clip(model, output)
    return f"open_clip.create_model_and_transforms and get_tokenizer take local-dir:{output}"


def _transformers(model: BetaCLIP, output: Path) -> str:
    save_transformers(model, output)
    return "CLIPModel.from_pretrained and CLIPProcessor.from_pretrained take the folder"


def _published(model: BetaCLIP, output: Path) -> str:
    with reporting(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    save_published(model, output)
    heads = heads_of(model)
    vision, text = heads["vision_head_width"], heads["text_head_width"]
    widths = f"of width {vision}" if vision == text else f"of width {vision} (vision) and {text} (text)"
    return f"it says that its towers' heads are {widths} and that its pool has {heads['pool_heads']}"


_WRITERS: dict[Layout, Callable[[BetaCLIP, Path], str]] = {
    "open_clip": _open_clip,
    "transformers": _transformers,
    "published": _published,
}
