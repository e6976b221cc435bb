"""Layer-wise learning rates, as in BEiT (arXiv 2106.08254): the farther from a tower's head, the lower the rate."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")
_EMBEDDINGS = {"conv1", "class_embedding", "positional_embedding", "ln_pre", "token_embedding"}


class Layer(NamedTuple):
    """A layer of a tower of ``depth`` blocks: 0 are its embeddings, 1 to depth its blocks, depth + 1 its head."""

    tower: str
    number: int
    depth: int

    def scale(self, decay: float) -> float:
        """The layer's learning rate, as a share of the head's."""
        return decay ** (self.depth + 1 - self.number)


def layers(names: Iterable[str]) -> dict[str, Layer]:
    """The layers of a BetaCLIP's parameters, by their names; the scale, the bias and the pool are in none.

    Example:
        >>> from betaclip.training.layer_rates import layers
        >>> layers(["clip.visual.conv1.weight", "clip.visual.transformer.resblocks.0.ln_1.bias", "clip.visual.proj"])
        ... # doctest: +NORMALIZE_WHITESPACE
        {'clip.visual.conv1.weight': Layer(tower='image', number=0, depth=1),
         'clip.visual.transformer.resblocks.0.ln_1.bias': Layer(tower='image', number=1, depth=1),
         'clip.visual.proj': Layer(tower='image', number=2, depth=1)}
    """
    towers = {name: tower for name in names if (tower := _tower(name)) is not None}
    blocks = {name: int(found[1]) + 1 for name in towers if (found := _BLOCK.search(name))}
    depths: dict[str, int] = defaultdict(int)
    for name, block in blocks.items():
        depths[towers[name]] = max(depths[towers[name]], block)
    return {
        name: Layer(tower, blocks.get(name, 0 if _EMBEDDINGS.intersection(name.split(".")) else depths[tower] + 1),
                    depths[tower])
        for name, tower in towers.items()
    }  # fmt: skip


def _tower(name: str) -> str | None:
    if not name.startswith("clip.") or name in ("clip.logit_scale", "clip.logit_bias"):
        return None
    return "image" if name.startswith("clip.visual.") else "text"


def summary(names: Iterable[str], decay: float) -> str:
    """One line that says the rates of all layers, as shares of the backbone's rate.

    Example:
        >>> from betaclip.training.layer_rates import summary
        >>> summary(["clip.visual.conv1.weight", "clip.visual.transformer.resblocks.0.ln_1.bias"], 0.5)
        'shares of the learning rate from embeddings to head: image 0.25 0.5 1'
    """
    depths = {layer.tower: layer.depth for layer in layers(names).values()}
    parts = [
        f"{tower} {' '.join(f'{Layer(tower, i, depth).scale(decay):.3g}' for i in range(depth + 2))}"
        for tower, depth in sorted(depths.items())
    ]
    return f"shares of the learning rate from embeddings to head: {'; '.join(parts)}"
