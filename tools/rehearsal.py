"""A dress rehearsal of the published recipe: all commands of a real run, on a set that is made up in the same layouts.

    python tools/rehearsal.py                       # ViT-B/16, as the recipes have it: minutes
    python tools/rehearsal.py --tower small         # two small layers: seconds

Annotations with the 1000 test rows, pictures, OpenAI's layout of weights with random numbers, Urban1K, DCI and FG-OVD
are written into a folder. After betaclip prepare, each form of the loss is trained for two updates, killed, resumed,
evaluated and exported, and the exported model is evaluated. Each command is printed as a user would type it.
"""

import argparse
import json
import multiprocessing
import os
import random
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from betaclip import checkpoint
from betaclip.cli import main as betaclip
from betaclip.data.readers.sharegpt4v import TEST_ROWS
from betaclip.model.open_clip_towers import create_towers
from betaclip.model.weights import OPENAI_SIZES

FORMS = ("ce", "bce")
BEFORE_KILL, UPDATES = 2, 4
ITEMS = 4  # pictures of each set to evaluate on
SMALL = json.dumps(
    {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }
)
TOWERS = {"published": "ViT-B-16", "small": SMALL}

# Words of captions, which spaCy finds phrases in.
ADJECTIVES = ("red", "blue", "wooden", "tall", "small", "round", "shiny", "striped", "bright", "dusty", "smooth")
NOUNS = ("mug", "lamp", "chair", "bicycle", "bench", "basket", "clock", "kettle", "ladder", "mirror", "window", "sign")
VERBS = ("leaning against", "standing behind", "lying on", "hanging over", "sitting beside", "resting under")
PLACES = ("on the left", "on the right side of the picture", "in the background", "in front of the house", "next to it")


class MadeUpSet:
    """Files of the published layouts in a folder.

    Args:
        folder: an empty folder.
        images: number of rows to train on, after the 1000 test rows, of which ITEMS have their pictures.
        size: width and height of the pictures in pixels.
    """

    def __init__(self, folder: Path, images: int, size: tuple[int, int]) -> None:
        self.folder, self.size = folder, size
        self.images, self.annotations = folder / "images", folder / "share-captioner.json"
        self.urban1k, self.dci, self.fg_ovd = (
            folder / name for name in ("Urban1k", "densely_captioned_images", "fg-ovd")
        )
        self._random, self._noise = random.Random(0), np.random.default_rng(0)
        self._write_sharegpt4v(images)
        self._write_urban1k()
        self._write_dci()
        self._write_fg_ovd()

    def _write_sharegpt4v(self, images: int) -> None:
        rows = []
        for number in range(TEST_ROWS + images):
            image = ("sam/images/sa_{}.jpg", "coco/train2017/{:012}.jpg", "llava/llava_pretrain/images/{:09}.jpg")[
                number % 3
            ]
            image = image.format(number)
            used = number < ITEMS or number >= TEST_ROWS  # the other test rows are there to be counted
            caption = self._caption() if used else self._sentence()
            turns = [("human", "What do you see?\n<image>"), ("gpt", caption)]
            rows.append(
                {"id": str(number), "image": image, "conversations": [{"from": a, "value": b} for a, b in turns]}
            )
            if used:
                self._picture(self.images / image)
        self.annotations.write_text(json.dumps(rows), encoding="utf-8")

    def _write_urban1k(self) -> None:
        for number in range(1, ITEMS + 1):
            self._picture(self.urban1k / "image" / f"{number}.jpg")
            _write(self.urban1k / "caption" / f"{number}.txt", self._caption())

    def _write_dci(self) -> None:
        for number in range(ITEMS):
            self._picture(self.dci / "photos" / f"sa_{number}.jpg")
            row = {"image": f"sa_{number}.jpg", "short_caption": self._sentence(), "extra_caption": self._caption()}
            _write(self.dci / "annotations" / f"sa_{number}.json", json.dumps(row))

    def _write_fg_ovd(self) -> None:
        """The four difficulties in FG-CLIP's files, and an attribute's subset in the benchmark's own."""
        for number in range(ITEMS):
            self._picture(self.images / "train2017" / f"{number:012}.jpg")
        width, height = self.size
        box = [width / 8, height / 8, width / 2, height / 2]
        for name in ("h_attributes", "m_attributes", "e_attributes", "shuffle_attributes"):
            rows = [
                {
                    "img_path": f"/train2017/{number:012}.jpg", "bbox": box,
                    "pos_expression": [self._thing()], "neg_expression": [self._thing() for _ in range(10)],
                }
                for number in range(ITEMS)
            ]  # fmt: skip
            _write(self.fg_ovd / f"{name}_llava.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        things = [{"id": number, "name": self._thing()} for number in range(11)]
        content = {
            "images": [{"id": number, "file_name": f"train2017/{number:012}.jpg"} for number in range(ITEMS)],
            "categories": things,
            "annotations": [
                {"id": n, "image_id": n, "bbox": box, "category_id": 0, "neg_category_ids": list(range(1, 11))}
                for n in range(ITEMS)
            ],
        }
        _write(self.fg_ovd / "color.json", json.dumps(content))

    def _picture(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(self._noise.integers(0, 256, (6, 8, 3), np.uint8))
        coarse.resize(self.size, Image.Resampling.BICUBIC).save(path, quality=90)

    def _thing(self) -> str:
        return " ".join((*self._random.sample(ADJECTIVES, 2), self._random.choice(NOUNS)))

    def _sentence(self) -> str:
        things = [self._thing() for _ in range(3)]
        verb, place = self._random.choice(VERBS), self._random.choice(PLACES)
        return f"The {things[0]} is {verb} a {things[1]} with a {things[2]} {place}."

    def _caption(self) -> str:
        return " ".join(self._sentence() for _ in range(8))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_openai_weights(path: Path, name: str) -> None:
    """Random numbers in the layout of OpenAI's archives, whose matrices are in half precision."""
    torch.manual_seed(0)
    clip: Any = create_towers(name, None, quick_gelu=True)
    sizes = dict(zip(OPENAI_SIZES, (clip.visual.image_size[0], clip.context_length, clip.vocab_size), strict=True))
    weights = {name: value.half() if value.dim() > 1 else value for name, value in clip.state_dict().items()}
    torch.save(weights | {name: torch.tensor(size) for name, size in sizes.items()}, path)


class Rehearsal:
    """The commands on a made-up set.

    Args:
        files: the set.
        weights: pretrained weights of the towers ``tower``.
        options: of ``betaclip train``, such as the sizes that this machine takes.
        start: how to start the process that is killed: "spawn", or "fork" where that is safe.
    """

    def __init__(self, files: MadeUpSet, weights: Path, tower: str, options: list[str], start: str = "spawn") -> None:
        self.files, self.start = files, start
        self.phrases, self.runs = files.folder / "phrases.bin", files.folder / "runs"
        self._train = [
            "--model.name", tower, "--model.pretrained", str(weights),
            "--data.root", str(files.images), "--data.annotations", str(files.annotations),
            "--data.phrases", str(self.phrases), "--run.folder", str(self.runs),
            "--run.steps", str(UPDATES), "--run.checkpoint-every", str(BEFORE_KILL),
            "--optimizer.backbone.warmup", str(BEFORE_KILL), *options,
        ]  # fmt: skip
        self._sets = [
            "--urban1k", str(files.urban1k), "--dci", str(files.dci),
            "--sharegpt4v", str(files.annotations), "--sharegpt4v-images", str(files.images),
            "--fg-ovd", str(files.fg_ovd), "--fg-ovd-images", str(files.images),
        ]  # fmt: skip

    def prepare(self) -> None:
        annotations, out = str(self.files.annotations), str(self.phrases)
        self._run("prepare", "--annotations", annotations, "--out", out, "--phrase-style", "published")

    def run(self, form: str) -> None:
        """Train, kill, resume, evaluate, export, and evaluate the exported model."""
        folder, exported = self.runs / form, self.files.folder / f"{form}.safetensors"
        train = ("train", "--config", f"vit_b16_sharegpt4v_{form}", *self._train, "--run.name", form)
        self._run_and_kill(*train)
        self._run(*train, "--run.resume")
        self._evaluate(folder, folder / "results.json")
        self._run("export", str(folder), str(exported), "--to", "published")
        self._evaluate(exported, exported.with_suffix(".json"))

    def _evaluate(self, model: Path, results: Path) -> None:
        self._run("evaluate", str(model), *self._sets, "--output", str(results))

    def _run(self, *arguments: str) -> None:
        print(f"\n$ betaclip {shlex.join(arguments)}", flush=True)
        betaclip(list(arguments))

    def _run_and_kill(self, *arguments: str) -> None:
        print(f"\n$ betaclip {shlex.join(arguments)} & # and kill -9 it after {BEFORE_KILL} updates", flush=True)
        child = multiprocessing.get_context(self.start).Process(target=_die_at_checkpoint, args=(arguments,))  # type: ignore[attr-defined]
        child.start()
        child.join()
        if child.exitcode != -signal.SIGKILL:
            sys.exit(f"expected the run to be killed after its first checkpoint, but it ended with {child.exitcode}")


def _die_at_checkpoint(arguments: tuple[str, ...]) -> None:
    """Run a command in this process, which dies as soon as it has written a checkpoint."""
    write = checkpoint.write

    def write_and_die(*args: Any) -> None:
        write(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.write = write_and_die
    betaclip(list(arguments))


def summary(runs: Path) -> Iterator[str]:
    """Yield a line about what each run has measured."""
    for form in FORMS:
        last = json.loads((runs / form / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        names = ("global_loss", "beta_cal_loss", "images_per_s", "data_share", "peak_gib")
        yield f"{form}: " + ", ".join(f"{name} {last[name]:.3g}" for name in names)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tower", choices=TOWERS, default="published", help="that of the recipe, ViT-B/16, or a small one")
    add("--images", type=int, default=16, help="pictures to train on (default 16)")
    add("--batch-size", type=int, default=8, help="images of an update (default 8; the recipe: 2048)")
    add("--micro-batch-size", type=int, default=4, help="images at a time (default 4; the recipe: 64)")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="by default fp16, on a CPU fp32")
    add("--workers", type=int, default=2, help="processes that read data (default 2)")
    add("--folder", type=Path, help="an empty folder to keep everything in; by default it is temporary")
    return parser.parse_args(argv)


def main(argv: list[str], start: str = "spawn") -> None:
    """start: how to start the process that is killed: "spawn", or "fork" where that is safe."""
    args = arguments(argv)
    precision = args.precision or ("fp16" if torch.cuda.is_available() else "fp32")
    options = [
        "--run.batch-size", args.batch_size, "--run.micro-batch-size", args.micro_batch_size,
        "--run.precision", precision, "--run.workers", args.workers,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files, tower = MadeUpSet(folder, args.images, (640, 480)), TOWERS[args.tower]
        weights = folder / "openai.pt"
        write_openai_weights(weights, tower)
        rehearsal = Rehearsal(files, weights, tower, list(map(str, options)), start)
        rehearsal.prepare()
        for form in FORMS:
            rehearsal.run(form)
        print("", *summary(rehearsal.runs), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
