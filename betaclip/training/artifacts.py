"""What a finished run leaves to look at: results, curves of all that was logged, pictures of attention."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from betaclip.data.scenes.dataset import TEST, scene
from betaclip.evaluation.report import Results, table, write_json
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.tokenizer import Tokenizer
from betaclip.training.log import read_metrics
from betaclip.visualize import attention_figure

# Panels, and what of metrics.jsonl each of them shows.
PANELS = {
    "losses": ("loss", "global_loss", "beta_cal_loss"),
    "scales": ("logit_scale", "pool_logit_scale"),
    "gradient norms": ("norm_backbone", "norm_pool"),
    "learning rates": ("lr_backbone", "lr_pool"),
}
PICTURES = 6
PHRASES = 7  # of a picture


def write_results(folder: Path, results: Results) -> str:
    """results.json, and the table to print."""
    write_json(results, folder / "results.json")
    return table(results)


def write_curves(runs: Mapping[str, Path], file: Path) -> None:
    """A PNG of what each run has logged, from its metrics.jsonl alone."""
    metrics = {name: read_metrics(folder / "metrics.jsonl") for name, folder in runs.items()}
    figure = Figure((11, 7), dpi=120, layout="constrained")
    for axis, (title, names) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for style, (run, rows) in zip(("-", "--", ":", "-."), metrics.items(), strict=False):
            for colour, name in enumerate(names):
                points = [(row["step"], row[name]) for row in rows if name in row]
                if points:
                    label = name if len(runs) == 1 else f"{name}, {run}"
                    axis.plot(*zip(*points, strict=True), style, color=f"C{colour}", label=label, linewidth=1.2)
        axis.set(title=title, xlabel="step")
        if title in ("gradient norms", "learning rates"):
            axis.set_yscale("log")
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(file)


def write_pictures(model: BetaCLIP, folder: Path, seed: int) -> None:
    """The attention of some phrases over test scenes, with the boxes of what they name."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(model.context_length)
    for index in range(PICTURES):
        shown = scene(seed, index, model.image_size, TEST)
        attention_figure(model, tokenizer, shown.image, shown.phrases[:PHRASES], shown.boxes[:PHRASES]).savefig(
            folder / f"scene_{index}.png"
        )
