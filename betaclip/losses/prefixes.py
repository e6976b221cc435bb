"""Several lengths of embeddings in one loss, as Matryoshka representation learning (arXiv 2205.13147) trains them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

Dims = Sequence[int] | Mapping[int, float]


class Prefixes(NamedTuple):
    """P prefixes of embeddings: their lengths, ascending, and the weights of their losses.

    Without ``dims`` whole embeddings are the one prefix.
    """

    dims: tuple[int, ...] = ()
    weights: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, dims: Dims | None) -> "Prefixes":
        """From lengths, each with the weight 1, or from a mapping of lengths to weights.

        Raises:
            ValueError: there is no length, one is no positive integer or comes twice, or a weight is not a finite
                number of at least 0.
        """
        if dims is None:
            return cls()
        lengths = list(dims) if isinstance(dims, (Sequence, Mapping)) else []
        integers = all(isinstance(dim, int) and not isinstance(dim, bool) and dim >= 1 for dim in lengths)
        if not lengths or not integers or len(set(lengths)) < len(lengths):
            expected = "different lengths of at least 1, or a mapping of such lengths to weights"
            raise ValueError(f"dims: expected {expected}, got {dims!r}")
        weights = dict(dims) if isinstance(dims, Mapping) else dict.fromkeys(lengths, 1.0)
        for weight in weights.values():
            if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
                raise ValueError(f"dims: expected finite weights of at least 0, got {dims!r}")
        ascending = sorted(lengths)
        return cls(tuple(ascending), tuple(float(weights[dim]) for dim in ascending))

    @property
    def contrasted(self) -> tuple[int, ...]:
        """The ``dims`` of operands that are as long as the longest prefix: none for one prefix."""
        return self.dims if len(self.dims) > 1 else ()

    def longest(self, embeds: Tensor) -> Tensor:
        """The longest prefix of embeddings (..., D).

        Raises:
            ValueError: D is less.
        """
        if not self.dims:
            return embeds
        if self.dims[-1] > embeds.shape[-1]:
            raise ValueError(f"dims: expected lengths of at most D = {embeds.shape[-1]}, got {self.dims[-1]}")
        return embeds[..., : self.dims[-1]]

    def split(self, embeds: Tensor) -> list[Tensor]:
        """All prefixes of embeddings (..., D), shortest first."""
        return [embeds[..., :dim] for dim in self.dims] or [embeds]

    def sum(self, values: Tensor) -> Tensor:
        """The weighted sum of values (P, ...) of the prefixes."""
        if self.weights == (1.0,):
            return values.squeeze(0)
        first, *others = values
        total: Tensor = first * self.weights[0]
        for weight, value in zip(self.weights[1:], others, strict=True):
            total = total.add(value, alpha=weight)
        return total
