"""Text to token ids: open_clip's byte-pair encoding, without padding."""

from dataclasses import dataclass
from functools import lru_cache

from open_clip.tokenizer import SimpleTokenizer

_BPE = SimpleTokenizer()
SOT, EOT = _BPE.sot_token_id, _BPE.eot_token_id


@dataclass(frozen=True)
class Tokenizer:
    """The ids of a text from its start token to its end token, at most ``context_length``.

    They are those of open_clip's ``SimpleTokenizer`` up to the end token. A text that is too long loses its last words
    and keeps its end token, from whose position the text's embedding is taken.
    """

    context_length: int = 77

    def __post_init__(self) -> None:
        if self.context_length < 3:
            raise ValueError(f"context_length: expected at least 3, got {self.context_length}")

    def __call__(self, text: str) -> list[int]:
        ids = [i for word in _BPE.pat.findall(_clean(text)) for i in _ids(word)]
        if EOT in ids:  # spelled out in the text: it ends there, as for open_clip's text tower
            ids = ids[: ids.index(EOT)]
        return [SOT, *ids[: self.context_length - 2], EOT]


def _clean(text: str) -> str:
    """open_clip's cleaning, half of the time, repairs encodings and entities: plain text needs no repair."""
    plain = text.isascii() and text.isprintable() and "&" not in text
    return text.lower() if plain else _BPE.clean_fn(text)


@lru_cache(maxsize=1 << 16)
def _ids(word: str) -> tuple[int, ...]:
    """Ids of a cleaned word, most of what encoding a text costs."""
    characters = "".join(_BPE.byte_encoder[byte] for byte in word.encode())
    return tuple(_BPE.encoder[piece] for piece in _BPE.bpe(characters).split(" "))
