"""A run's metrics: buffered on the device, and logged as lines, metrics.jsonl, TensorBoard and Weights & Biases."""

import errno
import json
import logging
import math
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from betaclip.errors import NonFiniteError
from betaclip.files import reporting, write_atomically
from betaclip.settings import flat, to_dict, to_toml
from betaclip.training.config import TrainingConfig

LOG_FILE = "log.txt"


class MetricsBuffer:
    """The measured values of the steps since the last line. They stay on the device until :meth:`read`, so that no step
    waits for them; a value that is not finite is found then, together with its step and its images.

    columns: names of the values that a step measures. must_be_finite: the columns that must be.
    """

    def __init__(self, columns: list[str], must_be_finite: list[str]) -> None:
        self.columns = columns
        self._checked = torch.tensor([name in must_be_finite for name in columns], device="cpu")
        self.rows: list[Tensor] = []
        self.clear()

    def clear(self) -> None:
        self.rows.clear()
        self.paths: list[list[str]] = []
        self.start_clock()

    def start_clock(self) -> None:
        self.images, self.waited_s = 0, 0.0
        self._begin = time.perf_counter()

    def add(self, row: Tensor, paths: list[str], images: int, waited_s: float) -> None:
        """Add a step: ``row`` holds a value for each column, ``paths`` name this rank's images, ``images`` is their
        number over all ranks, ``waited_s`` are the seconds spent waiting for data."""
        self.rows.append(row)
        self.paths.append(paths)
        self.images += images
        self.waited_s += waited_s

    def restore(self, table: Tensor) -> None:
        """Take the steps of a table that :meth:`read` returned, without their images and times.

        Raises:
            ValueError: it has other columns.
        """
        if table.dim() != 2 or table.shape[1] != len(self.columns):
            raise ValueError(f"expected a table of {len(self.columns)} columns, got the shape {tuple(table.shape)}")
        self.rows = list(table)
        self.paths = [[] for _ in self.rows]

    def read(self) -> tuple[Tensor, list[int]]:
        """(n, columns) on the CPU, and the indices of those of the n steps where a value must be finite and is not."""
        table = torch.stack(self.rows).cpu() if self.rows else torch.empty(0, len(self.columns), device="cpu")
        return table, (~table[:, self._checked].isfinite().all(1)).nonzero().flatten().tolist()

    def stop_if_not_finite(self, step: int, rank: int, folder: Path) -> None:
        """
        Args:
            step: number of steps done.
            folder: the message names a few of the step's images; a file in this folder lists all of them.

        Raises:
            NonFiniteError: a value that must be finite is not; the message is about the first such step.
        """
        table, bad = self.read()
        if not bad:
            return
        first = step - len(table) + bad[0] + 1
        values = dict(zip(self.columns, table[bad[0]].tolist(), strict=True))
        paths = self.paths[bad[0]]
        file = folder / f"non_finite_rank{rank}.json"
        # NaN and Infinity are not JSON, but Python reads them.
        with write_atomically(file) as stream:
            stream.write(json.dumps({"step": first, **values, "paths": paths}).encode())
        raise NonFiniteError(
            f"step {first} is not finite: {', '.join(f'{name} {value:.6g}' for name, value in values.items())}; "
            f"rank {rank}'s {len(paths)} images ({file} lists all):{''.join(f'{chr(10)}  {p}' for p in paths[:8])}"
        )

    def means(self, device: torch.device) -> dict[str, float]:
        """Means of the finite values, throughput, share of the time spent waiting for data, memory, skipped steps."""
        table, bad = self.read()
        elapsed = time.perf_counter() - self._begin
        means = {name: finite_mean(column) for name, column in zip(self.columns, table.T, strict=True)}
        return {
            **means,
            "images_per_s": self.images / elapsed,
            "data_share": self.waited_s / elapsed,
            "peak_gib": peak_bytes(device) / 2**30,
            "skipped": float(len(bad)),
        }


def finite_mean(column: Tensor) -> float:
    """The mean of the finite values; NaN if there are none."""
    return float(column[column.isfinite()].double().mean())


def peak_bytes(device: torch.device) -> float:
    """The most memory in use so far: of the GPU, or of this process; NaN for a process on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return math.nan
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Log:
    """Writes a run's metrics, on the first rank. Lines that an earlier attempt wrote for steps after ``step`` go.

    What is said, and warnings, are also in the run's log file.
    """

    def __init__(self, folder: Path, config: TrainingConfig, steps: int, step: int) -> None:
        self.folder, self.steps = folder, steps
        self._first, self._begin = step, time.perf_counter()
        self._file = folder / "metrics.jsonl"
        kept = [m for m in read_metrics(self._file) if m["step"] <= step]
        with write_atomically(self._file) as file:
            file.writelines(json.dumps(m).encode() + b"\n" for m in kept)
        with reporting(folder):
            self._tensorboard = _tensorboard(folder, config, step) if config.run.tensorboard else None
        self._wandb = _wandb(config, folder) if config.run.wandb is not None else None
        self._warnings = _WarningsToFile(folder)
        logging.getLogger("betaclip").addHandler(self._warnings)
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=None, dynamic_ncols=True)

    def advance(self) -> None:
        self._bar.update()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics since the last line."""
        self._write(step, metrics)
        self.say(f"{line(step, self.steps, metrics)}{self._to_go(step)}")

    def write_evaluation(
        self, step: int, metrics: dict[str, float], table: str, figures: Mapping[str, Figure] | None = None
    ) -> None:
        """Log an evaluation; TensorBoard takes the figures, under their names."""
        self._write(step, metrics)
        self.say(f"step {step}/{self.steps}, evaluated\n{table}")
        if self._tensorboard is not None:
            with reporting(self.folder):
                for name, figure in (figures or {}).items():
                    self._tensorboard.add_image(name, _pixels(figure), step, dataformats="HWC")

    def _to_go(self, step: int) -> str:
        """The time that the remaining steps take, if they take as long as those of this process did on average."""
        done = step - self._first
        if done < 1 or step >= self.steps:
            return ""
        each = (time.perf_counter() - self._begin) / done
        return f"  {tqdm.format_interval(each * (self.steps - step))} to go"

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        with reporting(self._file), self._file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._tensorboard is not None:
            with reporting(self._file.parent):
                for name, value in metrics.items():
                    self._tensorboard.add_scalar(tensorboard_name(name), value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def say(self, text: str) -> None:
        """Print above the progress bar, and add to the log file."""
        write_log(self.folder, text)
        try:
            self._bar.write(text)
            sys.stdout.flush()
        except OSError as error:
            if error.errno != errno.EIO:  # the terminal has hung up, which must not keep the run from saving
                raise

    def close(self) -> None:
        logging.getLogger("betaclip").removeHandler(self._warnings)
        self._bar.close()
        if self._tensorboard is not None:
            with reporting(self._file.parent):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class _WarningsToFile(logging.Handler):
    """Adds warnings to a run's log file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.WARNING)
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        write_log(self._folder, record.getMessage())


def write_log(folder: Path, text: str) -> None:
    """Add a text to a run's log file."""
    file = folder / LOG_FILE
    with reporting(file), file.open("a", encoding="utf-8") as stream:
        stream.write(f"{text}\n")


def write_final(folder: Path, config: TrainingConfig, results: Mapping[str, float]) -> None:
    """Write a finished run's results for TensorBoard, with its settings, by which runs can be compared there."""
    from torch.utils.tensorboard import SummaryWriter

    settings = {name: value if isinstance(value, bool | int | float) else str(value)
                for name, value in flat(to_dict(config))}  # fmt: skip
    with reporting(folder), SummaryWriter(str(folder)) as writer:
        writer.add_hparams(settings, {f"final/{name}": value for name, value in results.items()}, run_name=".")


def tensorboard_name(name: str) -> str:
    """The name of a metric with the section of TensorBoard's page that it belongs to."""
    if "/" in name:
        return name
    if name.endswith("loss"):
        return f"loss/{name.removesuffix('_loss')}"
    if name.startswith(("lr_", "norm_")) or name.endswith("logit_scale"):
        return f"optim/{name}"
    return f"{'speed' if name in ('images_per_s', 'data_share', 'peak_gib') else 'run'}/{name}"


def _pixels(figure: Figure) -> Any:
    """(H, W, 3) uint8, without pyplot, which would look for a window system."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, without those that a kill or a power cut damaged."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [metrics for text in lines if text.endswith(b"\n") and (metrics := _metrics(text)) is not None]


def _metrics(text: bytes) -> dict[str, float] | None:
    try:
        metrics = json.loads(text)
    except ValueError:
        return None
    return metrics if isinstance(metrics, dict) and "step" in metrics else None


def line(step: int, steps: int, metrics: dict[str, float]) -> str:
    """The metrics that a person watches, in one line."""
    rest = dict(metrics)
    parts = [f"step {step}/{steps}"]
    groups = {name.removesuffix("_loss"): (name,) for name in metrics if name.endswith("loss")} | {
        "scales": ("logit_scale", "pool_logit_scale"),
        "norms": ("norm_backbone", "norm_pool"),
        "lr": ("lr_backbone", "lr_pool"),
    }
    for title, names in groups.items():
        values = [f"{rest.pop(name):.4g}" for name in names if name in rest]
        if values:
            parts.append(f"{title} {' '.join(values)}")
    if "images_per_s" in rest:
        parts.append(f"{rest.pop('images_per_s'):.1f} images/s")
        parts.append(f"data {100 * rest.pop('data_share'):.0f} %")
        parts.append(f"peak {rest.pop('peak_gib'):.2f} GiB")
    parts += [f"{name} {value:.4g}" for name, value in rest.items() if name not in ("skipped", "epoch") or value]
    return "  ".join(parts)


def _tensorboard(folder: Path, config: TrainingConfig, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1)
    writer.add_text("settings", textwrap.indent(to_toml(config), "    "), step)  # indented, Markdown shows it as it is
    return writer


def _wandb(config: TrainingConfig, folder: Path) -> Any:
    import wandb

    name = config.run.name
    return wandb.init(
        project=config.run.wandb, name=name, id=name, config=to_dict(config), dir=str(folder), resume="allow"
    )
