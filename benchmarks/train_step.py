"""What do a training step of β-CLIP and its parts cost? betaclip's, and the published form, padded and dense.

    python benchmarks/train_step.py                          # ViT-B/16, 4 and 12 images (a GPU: 64), in minutes
    python benchmarks/train_step.py --smoke                  # a tiny model, everything once
    python benchmarks/train_step.py --images 8 --parts text --model ViT-L-14

A step is forward and backward of everything: towers, pooling, CLIP's loss and β-CAL; parts: "text", "vision",
"pooling" and "losses" alone. The update of the weights is not in it: it is the same for all. Weights are random, texts
are real captions with their sentences and phrases (common/steps.py).

"speed-up" is against the published form with its checkpointing of texts, in the same rounds. "tokens" are those that
the text tower's linear layers compute, of the tokens that exist. Extra memory is the peak above what existed before,
gradients included. "differs": ‖difference‖ / ‖value‖ of loss and of all gradients to the published form.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from common.budget import Budget
from common.comparison import BASELINES, Call, Comparison
from common.figures import Figure
from common.report import number
from common.rows import Row
from common.session import Benchmark, Session, at_least
from common.steps import PARTS, OurStep, StepBatch, part_call, step_implementations, synthetic_step_batch
from torch import Tensor

from betaclip.model.beta_clip import BetaCLIP, ModelConfig, create_model

IMAGES = {"cpu": (4, 12), "cuda": (64,)}
BENCHMARK = Benchmark(
    name="train_step",
    suffix="-train-step",
    columns={
        "images/s": lambda r: f"{int(r['images']) / float(r['time_ms_p50']) * 1e3:.3g}" if r["time_ms_p50"] else "",
        "tokens": lambda r: f"{r['tokens_computed']} of {r['tokens_existing']}" if r.get("tokens_computed") else "",
        "differs: loss": number("loss_difference", ".1e"),
        "gradients": number("gradient_difference", ".1e"),
    },
    figure=Figure(
        panel=("texts", "K"),
        x=("images", "images of a step"),
        same=("model", "context"),
    ),
)


class StepComparison(Comparison):
    """All implementations of one part on one batch.

    Values: tokens_computed, rows of the text tower's linear layers; tokens_existing, of all texts; differences to the
    baseline, which comes first.
    """

    def __init__(self, part: str, model: BetaCLIP, batch: StepBatch, chosen: dict[str, Any], budget: Budget) -> None:
        sizes = {"model": model.config.name, "context": model.context_length}
        sizes |= {"images": batch.texts.num_images, "texts": batch.texts.max_texts_per_image}
        super().__init__(part, sizes, chosen, batch.images, budget)
        self.model, self.batch = model, batch
        self.steps: dict[str, OurStep] = {name: build(model) for name, build in chosen.items()}
        self.expected: tuple[Tensor, ...] = ()

    def prepare(self, name: str) -> Call:
        return part_call(self.steps[name], self.form, self.batch)

    def values(self, name: str, phase: str, outputs: Sequence[Tensor]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if self.form in ("step", "text"):
            values["tokens_computed"] = self.steps[name].tokens(self.batch)
            values["tokens_existing"] = len(self.batch.texts.tokens)
        if name in BASELINES:
            self.expected = tuple(outputs)
        elif self.expected:
            loss, *gradients = zip(outputs, self.expected, strict=False)  # the baseline may have failed in one phase
            values["loss_difference"] = difference([loss])
            values["gradient_difference"] = difference(gradients) if gradients else None
        return values


@torch.no_grad()
def difference(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """‖a - b‖ / ‖b‖ over all pairs (a, b)"""
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    return math.hypot(*(norm(a - b) for a, b in pairs)) / math.hypot(*(norm(b) for _, b in pairs))


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = BENCHMARK.parser(__doc__)
    add = parser.add_argument
    add("--model", default="ViT-B-16", help="an open_clip name, or scenes (default ViT-B-16)")
    add("--context", type=int, default=248, help="longest text in tokens: 77 or 248 (default 248)")
    add("--images", nargs="+", type=at_least(1), metavar="B", help="of a step (default: 4 12, on a GPU 64)")
    add("--texts", type=at_least(2), default=36, metavar="K", help="per image (default 36)")
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    smoke = {"model": "scenes", "context": 77, "images": [2], "texts": 8}
    return BENCHMARK.parse(parser, argv, step_implementations(), smoke, {"images": IMAGES})


def comparisons(args: argparse.Namespace, session: Session) -> dict[str, Callable[[], list[Row]]]:
    torch.manual_seed(0)
    model = create_model(ModelConfig(args.model, context_length=args.context)).to(args.device, args.dtype)
    batch = cache(lambda images: synthetic_step_batch(model, images, args.texts, args.dtype))

    def compare(images: int, part: str) -> list[Row]:
        return session.measure(StepComparison(part, model, batch(images), args.chosen, session.budget))

    return {f"{part}, {images} images": partial(compare, images, part) for images in args.images for part in args.parts}


if __name__ == "__main__":
    sys.exit(BENCHMARK.main(arguments, comparisons))
