"""The training steps that are compared: padded and dense as published, and ours.

All have the same weights and see the same batch: real captions (captions.json), their sentences and phrases, so that
the lengths of texts and the prefixes they share are those of training. Every image has all of its K texts, for then
both forms have the same loss.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from betaclip.data.hierarchy import distinct_phrases
from betaclip.data.phrases.rules import RuleExtractor
from betaclip.data.phrases.spans import cut_phrases
from betaclip.data.sentences import clean, split_sentences
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.text_tower import text_modules
from betaclip.model.texts import RaggedTexts
from betaclip.model.tokenizer import Tokenizer
from betaclip.training.objective import Objective
from common import pools
from common.comparison import Call
from common.dense_losses import PUBLISHED

PARTS = ("step", "text", "vision", "pooling", "losses")
SENTENCES = 5
_WORDS = range(49406)  # all token ids but those of a text's start and end


@dataclass(frozen=True)
class StepBatch:
    """images: (B, 3, H, W). texts: K of each image: a caption, SENTENCES sentences, phrases.

    embeds: leaves in place of the towers' outputs: CLS (B, D), patches (B, P, D), texts and pooled (B, K, D).
    """

    images: Tensor
    texts: RaggedTexts
    embeds: tuple[Tensor, Tensor, Tensor, Tensor]


def synthetic_step_batch(model: BetaCLIP, images: int, texts_per_image: int, dtype: torch.dtype) -> StepBatch:
    """Noise for images; for texts, captions with their sentences and phrases. A caption that is needed again comes in
    other words, so that texts of different images share no more than different captions do."""
    device, dim = model.logit_scale.device, model.embed_dim
    captions = json.loads((Path(__file__).parents[1] / "captions.json").read_text(encoding="utf-8"))["captions"]
    rng, tokens = random.Random(0), Tokenizer(model.context_length)
    batch = []
    for image in range(images):
        other = dict(zip(_WORDS, rng.sample(_WORDS, len(_WORDS)), strict=True)) if image >= len(captions) else {}
        chosen = texts_of_caption(captions[image % len(captions)], texts_per_image, rng)
        batch.append([[other.get(token, token) for token in tokens(text)] for text in chosen])
    patches = model.patch_grid[0] * model.patch_grid[1]
    sizes = (images, dim), (images, patches, dim), (images, texts_per_image, dim), (images, texts_per_image, dim)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        pixels = torch.randn(images, 3, model.image_size, model.image_size).to(device, dtype)
        embeds = [torch.randn(size).to(device, dtype).requires_grad_() for size in sizes]
    return StepBatch(pixels, RaggedTexts.of(batch), (embeds[0], embeds[1], embeds[2], embeds[3]))


def texts_of_caption(caption: str, texts_per_image: int, rng: random.Random) -> list[str]:
    """Sampled sentences joined, the sentences, and as many phrases of the whole caption as are missing."""
    parts = split_sentences(clean(caption))
    count = min(SENTENCES, texts_per_image - 1, len(parts))
    sentences = [parts[i] for i in sorted(rng.sample(range(len(parts)), count))]
    spans = RuleExtractor()(parts)
    phrases = chain.from_iterable(cut_phrases(part, found) for part, found in zip(parts, spans, strict=True))
    chosen = [". ".join(sentences), *sentences, *distinct_phrases(phrases)[: texts_per_image - 1 - count]]
    if len(chosen) != texts_per_image:
        raise ValueError(f"texts_per_image: expected at most {len(chosen)}, as a caption has, got {texts_per_image}")
    return chosen


def padded(texts: RaggedTexts) -> tuple[Tensor, Tensor]:
    """(B, 1 + SENTENCES, L) captions and sentences and (B, K - 1 - SENTENCES, L') phrases, each filled with 0 to the
    longest of all images."""
    rows = nn.utils.rnn.pad_sequence(list(texts.tokens.split(texts.lengths.tolist())), batch_first=True)
    index, _ = texts.slots()
    blocks = index[:, : 1 + SENTENCES], index[:, 1 + SENTENCES :]
    longest = [int(texts.lengths[block].max()) if block.numel() else 0 for block in blocks]
    return tuple(rows[block][:, :, :length] for block, length in zip(blocks, longest, strict=True))  # type: ignore[return-value]


class OurStep:
    """A step as the trainer makes it."""

    def __init__(self, model: BetaCLIP) -> None:
        self.model, self.objective = model, Objective()

    def text(self, batch: StepBatch) -> Tensor:
        return self.model.encode_text(batch.texts)

    def vision(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        return self.model.encode_image(batch.images)

    def pooling(self, patches: Tensor, texts: Tensor) -> Tensor:
        return cast(Tensor, self.model.pool(patches, texts))

    def losses(self, cls: Tensor, texts: Tensor, pooled: Tensor) -> Tensor:
        out = {
            "image_embeds": cls,
            "text_embeds": texts,
            "pooled_embeds": pooled,
            "mask": texts.new_ones(texts.shape[:2], dtype=torch.bool),
            "logit_scale": self.model.logit_scale.exp(),
            "pool_logit_scale": self.model.pool.logit_scale.exp(),
        }
        return cast(Tensor, self.objective(out)["loss"])

    def step(self, batch: StepBatch) -> Tensor:
        return cast(Tensor, self.objective(self.model(batch.images, batch.texts))["loss"])

    def tokens(self, batch: StepBatch) -> int:
        """Rows of the text tower's linear layers."""
        return len(batch.texts.packing.tokens)


class PublishedStep(OurStep):
    """Padded texts, dense attention over them, an nn.MultiheadAttention over patches, (B·K)² similarities.

    The vision tower is ours: it does the same work. The text tower calls open_clip's own blocks, and computes them
    again in the backward if ``checkpointed``, as the released code does.
    """

    def __init__(self, model: BetaCLIP, checkpointed: bool) -> None:
        super().__init__(model)
        self.checkpointed = checkpointed
        pool = pools.PublishedPool(model.embed_dim, model.config.pool_heads)
        pool.load_state_dict(dict(model.pool.named_parameters()), strict=False, assign=True)
        self.pool = pool

    def text(self, batch: StepBatch) -> Tensor:
        """(B, K, D)"""
        return torch.cat([self._encode(block.to(batch.images.device)) for block in padded(batch.texts)], 1)

    def _encode(self, tokens: Tensor) -> Tensor:
        tower, flat = text_modules(self.model.clip), tokens.flatten(0, 1)
        x = tower.token_embedding(flat) + self.model.clip.positional_embedding[: flat.shape[1]]
        mask = torch.full((flat.shape[1],) * 2, -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        for block in tower.transformer.resblocks:
            run = partial(block, attn_mask=mask)
            x = checkpoint(run, x, use_reentrant=False) if self.checkpointed and torch.is_grad_enabled() else run(x)
        x = tower.ln_final(x)[torch.arange(len(flat), device=x.device), flat.argmax(1)]
        return (x @ tower.text_projection).unflatten(0, tokens.shape[:2])

    def pooling(self, patches: Tensor, texts: Tensor) -> Tensor:
        return cast(Tensor, self.pool(patches, texts))

    def losses(self, cls: Tensor, texts: Tensor, pooled: Tensor) -> Tensor:
        loss, scale, pool_scale = PUBLISHED["ce"], self.model.logit_scale.exp(), self.model.pool.logit_scale.exp()
        return loss(cls[:, None], texts[:, :1], scale) + loss(pooled, texts, pool_scale)  # of one text it is CLIP's

    def step(self, batch: StepBatch) -> Tensor:
        texts = self.text(batch)
        cls, patches = self.vision(batch)
        return self.losses(cls, texts, self.pooling(patches, texts))

    def tokens(self, batch: StepBatch) -> int:
        return sum(block.numel() for block in padded(batch.texts))


def step_implementations() -> dict[str, Callable[[BetaCLIP], OurStep]]:
    """By name, in the order of the tables; the first is the baseline."""
    return {
        "published": partial(PublishedStep, checkpointed=True),
        "published, no checkpointing": partial(PublishedStep, checkpointed=False),
        "betaclip": OurStep,
    }


def part_call(step: OurStep, part: str, batch: StepBatch) -> Call:
    """A part of the step, with respect to the parameters that it trains and to those ``batch.embeds`` that it reads."""
    cls, patches, texts, pooled = batch.embeds
    functions: dict[str, Callable[[], Tensor]] = {
        "step": lambda: step.step(batch),
        "text": lambda: step.text(batch).square().mean(),
        "vision": lambda: torch.stack([x.square().mean() for x in step.vision(batch)]).sum(),
        "pooling": lambda: step.pooling(patches, texts).square().mean(),
        "losses": lambda: step.losses(cls, texts, pooled),
    }
    return Call(functions[part], [*batch.embeds, *(p for p in step.model.parameters() if p.requires_grad)])
