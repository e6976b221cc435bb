"""``betaclip visualize``: draws which patches of a picture each text attends to."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from betaclip.checkpoint import AVERAGED, Weights, load_checkpoint
from betaclip.data.transforms import UnreadableImageError, read_image
from betaclip.errors import ConfigError, OutputError
from betaclip.evaluation.encode import Squash
from betaclip.evaluation.regions import Box
from betaclip.files import reporting, write_atomically
from betaclip.inference import attention
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.tokenizer import Tokenizer
from betaclip.process_group import initialized
from betaclip.settings import bounded
from betaclip.titles import fonts_for, spelled_out, wrapped

# In inches. A panel has the area of a square with sides of PANEL, whatever the picture's shape.
PANEL, GAP, BAR, MAX_WIDTH = 2.6, 0.1, 1.0, 12.5
LETTER, LINE = 0.08, 0.19  # of a title: width of a letter, height of a line
MAX_COLUMNS, MAX_TITLE_LINES = 4, 3
MAX_PIXELS = 1024  # the longer side of the picture as it is drawn

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VisualizeConfig:
    """The model, the picture and the texts."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, the folder of a run, a file in the published or in FLAIR's layout, or a folder that betaclip export
    wrote."""
    image: tyro.conf.Positional[Path]
    """A picture of any shape; the model sees it squashed to a square."""
    texts: tyro.conf.Positional[tuple[str, ...]]
    """The texts, with one panel each."""
    weights: Weights = "auto"
    """Which weights of a run with optimizer.ema_decay to take: ema, their average, raw, those after the last update, or
    auto, the average if there is one."""
    out: Path = Path("attention.png")
    """The file to write; its suffix gives the format, .png if it has none."""
    head_width: int | None = bounded(None, at_least=1)
    """Width of the towers' attention heads, if the file has the published or FLAIR's layout and does not say it; by
    default 64."""
    pool_heads: int | None = bounded(None, at_least=1)
    """Attention heads of the pooling block, likewise; by default 8."""
    device: str = "auto"
    """cpu, cuda or auto, which takes a GPU if there is one."""


def visualize(config: VisualizeConfig) -> None:
    """Draw the attention of each text and write the figure.

    Raises:
        ConfigError: no texts, an empty one, or a file that cannot be read or written.
    """
    if not config.texts:
        raise ConfigError('texts: expected at least one, such as "a red mug"')
    for number, text in enumerate(config.texts, 1):
        if not text.strip():
            raise ConfigError(f"texts: expected words, got an empty text as number {number}")
    with initialized(config.device) as (_, device):
        try:
            image = read_image(config.image)
            model = load_checkpoint(
                config.checkpoint, device=device, weights=config.weights,
                head_width=config.head_width, pool_heads=config.pool_heads,
            )  # fmt: skip
        except UnreadableImageError as error:
            raise ConfigError(f"image: {config.image}: {error}") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"checkpoint: {error}") from error
        figure = attention_figure(model, Tokenizer(model.context_length), image, config.texts)
    try:
        out = config.out if config.out.suffix else config.out.with_suffix(".png")
        with reporting(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(out) as file:
            figure.savefig(file, format=out.suffix.removeprefix("."))
    except OutputError as error:
        raise ConfigError(f"out: {error}") from error
    except ValueError as error:
        raise ConfigError(f"out: {out}: {error}") from error
    if model.averaged:
        print(AVERAGED)
    print(f"wrote {out}")


def attention_figure(
    model: BetaCLIP,
    tokenizer: Tokenizer,
    image: Image.Image | npt.NDArray[np.uint8],
    texts: Sequence[str],
    boxes: Sequence[Box] | None = None,
) -> Figure:
    """Draw the picture, and once more for each text with the text's attention laid over it, in the picture's shape.

    Attention is a multiple of even attention, so 1 means no preference. All panels share one scale, from 0 to the
    largest value or at least to 2, so that a text without a preference looks like one.

    Titles take letters that matplotlib's font lacks from the system's fonts. For letters that none has, titles show the
    code points, such as \\u4e2d, and a warning names the letters.

    Args:
        model: a model in training or evaluation mode; it stays in that mode.
        tokenizer: the tokenizer of the model's texts.
        image: RGB, or (H, W, 3) uint8.
        texts: one or more.
        boxes: for each text, the box of what it names, in the picture's pixels; drawn in its panel.

    Returns:
        A figure that needs no window system; ``savefig`` writes it.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    maps = attention(model, tokenizer, Squash(model.image_size)(picture), texts).cpu()
    maps = maps * maps[0].numel()
    top = max(2.0, float(maps.max()))
    width, height = picture.size
    across, down = (PANEL * side / (width * height) ** 0.5 for side in (width, height))
    fonts, missing = fonts_for(texts)
    if missing:
        named = (letter if letter.isprintable() else spelled_out(letter, missing) for letter in sorted(missing))
        _log.warning("no installed font has %s: titles show their code points", " ".join(named))
    titles = [wrapped(spelled_out(text, missing), int(across / LETTER), MAX_TITLE_LINES) for text in texts]
    figure, axes, bar = _panels(["", *titles], across, down)
    small = picture.copy()
    small.thumbnail((MAX_PIXELS, MAX_PIXELS))
    extent = (0.0, float(width), float(height), 0.0)
    axes[0].imshow(small, extent=extent)
    for axis, title, weights in zip(axes[1:], titles, maps, strict=True):
        shown = _overlay(axis, small, weights, top, extent)
        axis.set_title(title, fontsize=10, fontfamily=fonts, pad=4, parse_math=False)
    for axis, (x0, y0, x1, y1) in zip(axes[1:], boxes or (), strict=boxes is not None):
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="white", linewidth=1.5))
    figure.colorbar(shown, cax=bar, label="× even attention")
    return figure


def _panels(titles: Sequence[str], across: float, down: float) -> tuple[Figure, list[Axes], Axes]:
    """Make a figure; return it with its empty panels, each below the space for its title, and the colour bar's axes."""
    columns = max(1, min(MAX_COLUMNS, len(titles), int((MAX_WIDTH - BAR) / (across + GAP))))
    rows = [titles[i : i + columns] for i in range(0, len(titles), columns)]
    heads = [LINE * max(title.count("\n") + 1 for title in row) + GAP for row in rows]
    width, height = columns * (across + GAP) + GAP + BAR, sum(heads) + len(rows) * (down + GAP)
    figure = Figure((width, height), dpi=120)

    def place(x: float, y: float, w: float) -> Axes:
        """Axes ``w`` wide and ``down`` high, ``x`` from the left and ``y`` from the top, in inches."""
        return figure.add_axes((x / width, 1 - (y + down) / height, w / width, down / height))

    axes = []
    y = 0.0
    for row, head in zip(rows, heads, strict=True):
        y += head
        axes += [place(GAP + i * (across + GAP), y, across) for i in range(len(row))]
        y += down + GAP
    for axis in axes:
        axis.set_axis_off()
    return figure, axes, place(width - BAR + GAP, heads[0], 0.15)


def _overlay(
    axis: Axes, picture: Image.Image, weights: Tensor, top: float, extent: tuple[float, float, float, float]
) -> AxesImage:
    """Draw the picture in gray, and over it the smoothed attention of its patches, more opaque where it is larger."""
    width, height = picture.size
    smooth = F.interpolate(weights[None, None], (height, width), mode="bicubic", align_corners=False)[0, 0]
    smooth = smooth.clamp(0, top)
    axis.imshow(picture.convert("L"), cmap="gray", vmin=0, vmax=255, extent=extent)
    opacity = 0.35 + 0.5 * smooth / top
    return axis.imshow(smooth.numpy(), cmap="inferno", vmin=0, vmax=top, alpha=opacity.numpy(), extent=extent)
