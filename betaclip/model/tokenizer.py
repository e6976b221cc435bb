"""Encodes texts as token ids by open_clip's byte-pair encoding, without padding."""

from dataclasses import dataclass
from functools import lru_cache

from open_clip.tokenizer import SimpleTokenizer

_BPE = SimpleTokenizer()
SOT, EOT = _BPE.sot_token_id, _BPE.eot_token_id


@dataclass(frozen=True)
class Tokenizer:
    """Encodes a text as token ids, from the start token to the end token, as open_clip's ``SimpleTokenizer`` does.

    A text that is too long loses its last tokens and keeps its end token, whose state becomes the text's embedding.

    Args:
        context_length: the largest number of ids, at least 3.
        keep_end: False is for the numbers of the released code, which cuts the end token off too. Its text tower then
            reads the text at the start token, the largest that is left, so only that is returned.

    Raises:
        ValueError: ``context_length`` is below 3.

    Example:
        >>> from betaclip.model.tokenizer import Tokenizer
        >>> Tokenizer()("a red mug")
        [49406, 320, 736, 9722, 49407]
    """

    context_length: int = 77
    keep_end: bool = True

    def __post_init__(self) -> None:
        if self.context_length < 3:
            raise ValueError(f"context_length: expected at least 3, got {self.context_length}")

    def __call__(self, text: str) -> list[int]:
        ids = [i for word in _BPE.pat.findall(_clean(text)) for i in _ids(word)]
        if EOT in ids:  # the text spells the end token out, and ends there for open_clip's text tower
            ids = ids[: ids.index(EOT)]
        if len(ids) > self.context_length - 2 and not self.keep_end:
            return [SOT]
        return [SOT, *ids[: self.context_length - 2], EOT]


def byte_pair_encoding(start: str, end: str) -> tuple[dict[str, int], list[str]]:
    """The vocabulary, with these names of the start and the end token, and the merges, each two pieces and a blank."""
    vocabulary = {{SOT: start, EOT: end}.get(number, piece): number for piece, number in _BPE.encoder.items()}
    return vocabulary, [" ".join(pieces) for pieces in _BPE.bpe_ranks]


def _clean(text: str) -> str:
    """The text in lower case, with encodings and entities repaired as open_clip does."""
    # The repair takes half of the time of a text, and plain ASCII does not need it.
    plain = text.isascii() and text.isprintable() and "&" not in text
    return text.lower() if plain else _BPE.clean_fn(text)


@lru_cache(maxsize=1 << 16)
def _ids(word: str) -> tuple[int, ...]:
    """Ids of a cleaned word, cached because they are most of the cost of a text."""
    characters = "".join(_BPE.byte_encoder[byte] for byte in word.encode())
    return tuple(_BPE.encoder[piece] for piece in _BPE.bpe(characters).split(" "))
