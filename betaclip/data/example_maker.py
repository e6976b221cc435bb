"""Makes an example of a picture and its caption, the same for files and for shards."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from betaclip.data.batches import PHRASE, Bad, Example
from betaclip.data.dataset_options import DatasetOptions
from betaclip.data.hierarchy import SentenceOrder, hierarchy
from betaclip.data.phrases.cache import UnknownSentenceError, open_phrases
from betaclip.data.phrases.extraction import ExtractorName
from betaclip.data.phrases.spans import Phrase, PhraseStyle
from betaclip.data.transforms import Interpolation, TrainingTransform, UnreadableImageError, read_image
from betaclip.model.tokenizer import Tokenizer
from betaclip.settings import bounded

LongPhrases = Literal["drop", "published"]


def draw_caption(captions: Sequence[str], seed: int) -> str:
    """One of the captions of a picture, each as often as the others over the seeds of draws, which are uniform."""
    return captions[seed % len(captions)]


class ExampleMaker:
    """Makes an example of a picture and its caption.

    Args:
        phrases: gives the phrases of a sentence (``betaclip.data.phrases.cache.open_phrases``).
        sentences: how many of them an example has at most; with more, they are sampled.
        max_phrases: how many phrases an example has at most.
        max_phrase_tokens: longer phrases are left out; start and end tokens do not count.
        phrase_style: that of ``phrases``; it decides which of them come first.
        long_phrases: "drop" leaves longer phrases out. "published" cuts them as the released code does: without their
            end token their embedding is that of the start token, whatever they say.
        sentence_order: of the sampled sentences, in the caption too (:func:`betaclip.data.hierarchy.hierarchy`).
        interpolation: of the random crop.
    """

    def __init__(
        self,
        image_size: int,
        context_length: int,
        phrases: Callable[[str], list[Phrase]],
        *,
        sentences: int = 5,
        max_phrases: int = 30,
        max_phrase_tokens: int = 30,
        phrase_style: PhraseStyle = "longest",
        long_phrases: LongPhrases = "drop",
        sentence_order: SentenceOrder = "caption",
        interpolation: Interpolation = "bicubic",
    ) -> None:
        self.transform = TrainingTransform(image_size, interpolation)
        self.tokenizer = self.phrase_tokenizer = Tokenizer(context_length)
        if long_phrases == "published":
            self.phrase_tokenizer = Tokenizer(min(context_length, max_phrase_tokens + 2), keep_end=False)
        self.phrases = phrases
        self.sentences, self.max_phrases, self.max_phrase_tokens = sentences, max_phrases, max_phrase_tokens
        self.phrase_style: PhraseStyle = phrase_style
        self.long_phrases, self.sentence_order = long_phrases, sentence_order

    def __call__(self, source: Path | IO[bytes], path: str, caption: str, seed: int) -> Example | Bad:
        """The example of the picture in ``source``, or a Bad if it is broken or its caption has no words or no phrases.

        path: what messages call the picture. seed: decides all that is random.
        """
        try:
            texts, levels = hierarchy(
                caption,
                self.phrases,
                random.Random(seed),
                sentences=self.sentences,
                max_phrases=self.max_phrases,
                fits=self._fits,
                phrase_style=self.phrase_style,
                sentence_order=self.sentence_order,
            )
        except UnknownSentenceError as error:
            return Bad(path, f"{error}: the file was prepared from other captions; run betaclip prepare on these")
        if not texts:
            return Bad(path, "empty caption")
        if self.max_phrases and PHRASE not in levels:
            return Bad(path, f"no phrases in the caption {texts[0]!r}")
        try:
            image = read_image(source)
        except UnreadableImageError as error:
            return Bad(path, str(error))
        tokens = [
            (self.phrase_tokenizer if level == PHRASE else self.tokenizer)(text)
            for text, level in zip(texts, levels, strict=True)
        ]
        return Example(self.transform(image, seed), texts, tokens, levels, path)

    def _fits(self, phrase: str) -> bool:
        return self.long_phrases == "published" or len(self.tokenizer(phrase)) - 2 <= self.max_phrase_tokens


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(DatasetOptions):
    """The settings that data sets of pictures with captions share."""

    phrases: Path | None = None
    """all but scenes: what `betaclip prepare` wrote; without it, phrases are extracted anew in every epoch."""
    phrase_extractor: ExtractorName = "spacy"
    """all but scenes: without phrases, what extracts them: a spaCy model, or word lists, which are coarser."""
    phrase_style: PhraseStyle = "longest"
    """all but scenes: the longest of overlapping phrases, or those that the published code finds with spaCy."""
    sentences: int = bounded(5, at_least=1)
    """all but scenes: sentences sampled from a caption."""
    max_phrases: int = bounded(30, at_least=0)
    """all but scenes: phrases of an image at most."""
    max_phrase_tokens: int = bounded(30, at_least=1)
    """all but scenes: the tokens of a phrase at most; long_phrases says what becomes of longer ones."""
    long_phrases: LongPhrases = "drop"
    """all but scenes: drop leaves them out. published cuts them as the released code does: with their end token
    they lose their meaning, and all have the same embedding."""
    sentence_order: SentenceOrder = "caption"
    """all but scenes: sampled sentences, and the caption that is made of them, are in the caption's order or, as in
    the released code, in random order."""
    interpolation: Interpolation = "bicubic"
    """all but scenes: of the random crop of pictures; the released code's is bilinear."""

    def example_maker(self, image_size: int, context_length: int) -> ExampleMaker:
        return ExampleMaker(
            image_size,
            context_length,
            open_phrases(self.phrases, self.phrase_extractor, self.phrase_style),
            sentences=self.sentences,
            max_phrases=self.max_phrases,
            max_phrase_tokens=self.max_phrase_tokens,
            phrase_style=self.phrase_style,
            long_phrases=self.long_phrases,
            sentence_order=self.sentence_order,
            interpolation=self.interpolation,
        )
