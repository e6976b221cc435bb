"""The curves of finished runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from betaclip.files import write_atomically
from betaclip.training.log import read_metrics

# The metrics in each panel, by how their names start or end.
PANELS = {"losses": "loss", "scales": "logit_scale", "gradient norms": "norm_", "learning rates": "lr_"}
LOGARITHMIC = ("gradient norms", "learning rates")
LINE_STYLES = ("-", "--", ":", "-.")


def write_curves(runs: Mapping[str, Path], file: Path) -> None:
    """Write a PNG of the losses, scales, gradient norms and learning rates of each run, from its metrics alone."""
    figure = curves_figure({name: read_metrics(folder / "metrics.jsonl") for name, folder in runs.items()})
    with write_atomically(file) as stream:
        figure.savefig(stream, format="png")


def curves_figure(metrics: Mapping[str, list[dict[str, float]]]) -> Figure:
    """One panel for each kind of metric, a colour for each metric in it, and a line style for each run."""
    figure = Figure((11, 7), dpi=120, layout="constrained")
    for axis, (title, affix) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        names = dict.fromkeys(name for rows in metrics.values() for row in rows for name in row if fits(name, affix))
        for colour, name in enumerate(names):
            for style, (run, rows) in zip(LINE_STYLES, metrics.items(), strict=False):
                label = name if len(metrics) == 1 else f"{name}, {run}"
                _draw(axis, rows, name, linestyle=style, color=f"C{colour}", label=label)
        axis.set(title=title, xlabel="step")
        if title in LOGARITHMIC:
            axis.set_yscale("log")
        if axis.lines:
            axis.legend(fontsize=8)
    return figure


def fits(name: str, affix: str) -> bool:
    return name.startswith(affix) if affix.endswith("_") else name.endswith(affix)


def _draw(axis: Axes, rows: list[dict[str, float]], name: str, **look: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        axis.plot(*zip(*points, strict=True), linewidth=1.2, **look)
