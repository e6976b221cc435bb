"""What does a training step of β-CLIP cost, and its parts? Ours, and padded and dense as published.

    python benchmarks/train_step.py                          # ViT-B/16, 4 and 12 images (a GPU: 64), in minutes
    python benchmarks/train_step.py --smoke                  # a tiny model, everything once
    python benchmarks/train_step.py --images 8 --parts text --model ViT-L-14
    python benchmarks/train_step.py --largest                # on a GPU: the most images that fit

A step is forward and backward of everything: towers, pooling, CLIP's loss and β-CAL; parts: "text", "vision",
"pooling" and "losses" alone. The update of the weights is not in it: it is the same for all. Weights are random, texts
are real captions with their sentences and phrases (steps.py).

Prints a table per part and size, appends one CSV row per case to results/<device>-train-step.csv, and draws
results/<device>-train-step.png from that file.

"speed-up" is against the published form with its checkpointing of texts, in the same rounds. "tokens" are those that
the text tower's linear layers compute, of the tokens that exist. "of mm" is the least FLOP (steps.least_flop) over the
time, over the rate of torch.mm in the same rounds. Extra memory is the peak above what existed before, gradients
included. "differs": ‖difference‖ / ‖value‖ of loss and of all gradients to the published form.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison import (
    PHASES,
    Comparison,
    add_common_options,
    begin,
    end,
    figure,
    mm_rate,
    phase_run,
    resolve_common_options,
    run,
)
from harness import OK, OUT_OF_MEMORY, Case, Measurement, Run, attempt
from report import Figure, Progress, Row, in_bytes, number, plot
from steps import PARTS, Step, StepBatch, call, least_flop, made_up_step_batch, step_implementations
from torch import Tensor

from betaclip.kernels import memory as scratch
from betaclip.model.beta_clip import BetaCLIP, ModelConfig, create_model

BENCHMARK = "train_step"
IMAGES = {"cpu": (4, 12), "cuda": (64,)}
BASELINE = "published"
MATRIX_ROWS = {"cpu": 2304, "cuda": 9216}  # torch.mm's rate is measured with
COLUMNS = {
    "speed-up": lambda row: number(row["speedup"], ".2f"),
    "images/s": lambda row: number(row["images_per_s"], ".3g"),
    "tokens": lambda row: f"{row['tokens_computed']} of {row['tokens_existing']}" if row["tokens_computed"] else "",
    "of mm": lambda row: number(row["share_of_mm"], ".2f"),
    "extra memory": lambda row: in_bytes(row["peak_bytes"]),
    "differs: loss": lambda row: number(row["loss_difference"], ".1e"),
    "gradients": lambda row: number(row["gradient_difference"], ".1e"),
}
FIGURE = Figure(
    panel=lambda row: row["form"],
    x="images",
    x_label="images of a step",
    quantities=(("time_ms_p50", "forward + backward, ms", 1.0), ("peak_bytes", "peak extra memory, MiB", 2.0**20)),
)


@dataclass(frozen=True)
class StepCase(Case):
    """B images with K texts each; form is the part."""

    model: str
    context: int
    images: int
    texts: int


@dataclass(frozen=True)
class StepMeasurement(Measurement):
    """tokens_computed: rows of the text tower's linear layers; tokens_existing: of all texts.

    speedup: time of the published form over this. Differences are to it.
    """

    case: StepCase
    tokens_computed: int | None = None
    tokens_existing: int | None = None
    images_per_s: float | None = None
    speedup: float | None = None
    loss_difference: float | None = None
    gradient_difference: float | None = None


class StepComparison(Comparison[StepMeasurement]):
    """All implementations of one part on one batch."""

    def __init__(self, part: str, model: BetaCLIP, batch: StepBatch, chosen: dict[str, Any], device: str) -> None:
        images, texts = batch.shape
        dtype, on = batch.images.dtype, batch.images.device
        super().__init__(f"{part}, {images} images", chosen, MATRIX_ROWS[on.type], model.embed_dim, dtype, on)
        self.part, self.model, self.batch = part, model, batch
        self.steps: dict[str, Step] = {name: build(model) for name, build in chosen.items()}
        sizes = (model.config.name, model.context_length, images, texts)
        self.case = StepCase(BENCHMARK, part, str(dtype)[6:], device, "", "", *sizes)
        self.truth: tuple[Tensor, ...] | None = None

    def flop(self, phase: str) -> float:
        return least_flop(self.model, self.part, phase, self.batch)

    def heading(self, rows: list[Row]) -> str:
        images, texts = self.batch.shape
        return (
            f"\n{self.part}   {self.case.model}, context {self.case.context}   {images} images × {texts} texts   "
            f"{self.case.dtype}   {mm_rate(rows)}".rstrip()
        )

    def measure(self, phase: str, seconds: float, progress: Progress, previous: list[Row]) -> list[StepMeasurement]:
        rows = super().measure(phase, seconds, progress, previous)
        self.truth = None
        base = next((row.time_ms_p50 for row in rows if row.case.implementation == BASELINE), None)
        return [with_rates(row, base) for row in rows]

    def first_call(self, name: str, phase: str, previous: list[Row]) -> tuple[StepMeasurement, Run | None, float]:
        step = self.steps[name]
        row = StepMeasurement(replace(self.case, implementation=name, phase=phase))
        if self.part in ("step", "text"):
            existing = len(self.batch.texts.tokens)
            row = replace(row, tokens_computed=step.tokens(self.batch), tokens_existing=existing)
        function, leaves = call(step, self.part, self.batch)
        timed = phase_run(function, leaves, torch.ones((), device=self.device), phase)
        row, outputs, elapsed_ms = self.call(row, timed, timed, scratch.forget)
        if row.status != OK:
            return row, None, 0.0
        if name == BASELINE:
            self.truth = outputs
        elif self.truth is not None:
            loss, *gradients = zip(outputs, self.truth, strict=True)
            row = replace(row, loss_difference=difference([loss]))
            if gradients:
                row = replace(row, gradient_difference=difference(gradients))
        return row, timed, elapsed_ms


def difference(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """‖a - b‖ / ‖b‖ over all pairs (a, b)"""
    differences, values = (
        torch.stack([torch.linalg.vector_norm(x.detach(), dtype=torch.float64) for x in xs]).norm()
        for xs in zip(*((a - b, b) for a, b in pairs), strict=True)
    )
    return float(differences / values)


def with_rates(row: StepMeasurement, base_ms: float | None) -> StepMeasurement:
    """With images per second, and the speed-up over a step of ``base_ms``."""
    if row.time_ms_p50 is None:
        return row
    speedup = None if base_ms is None else base_ms / row.time_ms_p50
    return replace(row, images_per_s=row.case.images / row.time_ms_p50 * 1e3, speedup=speedup)


def largest(fits: Callable[[int], bool], most: int = 2**16) -> int:
    """The largest number up to ``most`` that ``fits``, to 1/16 of it; 0 if 1 does not."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def step_fits(step: Step, texts: int, dtype: torch.dtype, images: int) -> bool:
    """Whether a step of so many images does not run out of memory."""

    def once() -> None:
        function, leaves = call(step, "step", made_up_step_batch(step.model, images, texts, dtype))
        phase_run(function, leaves, torch.ones((), device=step.model.logit_scale.device), PHASES[0])()

    _, status = attempt(once)
    if status not in (OK, OUT_OF_MEMORY):
        raise RuntimeError(f"{images} images: {status}")
    return status == OK


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="ViT-B-16", help="an open_clip name, or scenes (default ViT-B-16)")
    add("--context", type=int, default=248, help="longest text in tokens: 77 or 248 (default 248)")
    add("--images", nargs="+", type=int, metavar="B", help="of a step (default: 4 12, on a GPU 64)")
    add("--texts", type=int, default=36, metavar="K", help="per image (default 36)")
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--largest", action="store_true", help="on a GPU, only: the most images whose step fits")
    add_common_options(parser, each="part, size and phase")
    args = parser.parse_args(argv)
    resolve_common_options(parser, args, BENCHMARK, step_implementations())
    if args.smoke:
        args.model, args.context, args.images, args.texts = "scenes", 248, [2], 8
    if args.largest and args.device.type != "cuda":
        parser.error("--largest: expected a GPU: a CPU that runs out of memory ends the process")
    args.images = args.images or IMAGES[args.device.type]
    for name, least in (("images", 1), ("texts", 2)):
        value = getattr(args, name)
        for size in [value] if isinstance(value, int) else value:
            if size < least:
                parser.error(f"--{name}: expected at least {least}, got {size}")
    return args


def comparisons(args: argparse.Namespace, model: BetaCLIP, device: str) -> Iterator[StepComparison]:
    for images in args.images:
        batch = made_up_step_batch(model, images, args.texts, args.dtype)
        for part in args.parts:
            yield StepComparison(part, model, batch, args.chosen, device)


def draw(rows: list[Row], path: Path) -> str | None:
    """Of the configuration that the last row has."""
    same = ("model", "context", "texts", "dtype")
    last = rows[-1]
    rows = [row for row in rows if all(row[key] == last[key] for key in same)]
    title = f"{last['device']}, {last['dtype']}, {last['model']}, {last['texts']} texts per image"
    return plot(rows, path, title, FIGURE)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    source, device = begin(args, BENCHMARK, argv)
    torch.manual_seed(0)
    model = create_model(ModelConfig(args.model, context_length=args.context)).to(args.device, args.dtype)
    if args.largest:
        for name, build in args.chosen.items():
            print(f"{name}: {largest(partial(step_fits, build(model), args.texts, args.dtype))} images", flush=True)
        return 0
    path = args.output / f"{device}-train-step.csv"
    print("Times: median (20th-80th percentile) of interleaved rounds. All from speed-up on: of forward+backward;")
    print("see --help.")
    cases = len(PHASES) * len(args.chosen) * len(args.images) * len(args.parts)
    rows = run(comparisons(args, model, device), args.seconds, source, path, cases, COLUMNS)
    return end(rows, path, figure(path, BENCHMARK, draw))


if __name__ == "__main__":
    sys.exit(main())
