"""A picture and its caption to an example, the same for files and for shards."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import IO

from betaclip.data.batches import PHRASE, Bad, Example
from betaclip.data.hierarchy import hierarchy
from betaclip.data.phrases.cache import UnknownSentenceError
from betaclip.data.phrases.spans import Phrase
from betaclip.data.transforms import TrainingTransform, UnreadableImageError, read_image
from betaclip.model.tokenizer import Tokenizer


class ExampleMaker:
    """
    phrases: of a sentence (``betaclip.data.phrases.cache.open_phrases``). sentences, max_phrases: most of each level.
    max_phrase_tokens: longer phrases are left out, start and end not counted.
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
    ) -> None:
        self.transform = TrainingTransform(image_size)
        self.tokenizer = Tokenizer(context_length)
        self.phrases = phrases
        self.sentences, self.max_phrases, self.max_phrase_tokens = sentences, max_phrases, max_phrase_tokens

    def __call__(self, source: Path | IO[bytes], path: str, caption: str, seed: int) -> Example | Bad:
        """The example of the picture in ``source``, which messages call ``path``; ``seed`` decides all that is random.

        Bad: the picture cannot be read, or the caption has no words or no phrases.
        """
        try:
            texts, levels = hierarchy(
                caption,
                self.phrases,
                random.Random(seed),
                sentences=self.sentences,
                max_phrases=self.max_phrases,
                fits=lambda phrase: len(self.tokenizer(phrase)) - 2 <= self.max_phrase_tokens,
            )
        except UnknownSentenceError as error:
            return Bad(path, f"{error}: betaclip prepare was run with other captions")
        if not texts:
            return Bad(path, "empty caption")
        if self.max_phrases and PHRASE not in levels:
            return Bad(path, f"no phrases in the caption {texts[0]!r}")
        try:
            image = read_image(source)
        except UnreadableImageError as error:
            return Bad(path, str(error))
        tokens = [self.tokenizer(text) for text in texts]
        return Example(self.transform(image, seed), texts, tokens, levels, path)
