"""The rows of one operand laid out so that a single pass over their columns forms the logits of all prefixes.

Each slice is stored as it is in the normalised prefix that ends with it. The cosines of that prefix are a product over
the slice, plus those of the prefix before it times a ratio of norms for each row. No number of a stored row exceeds 1,
however small a prefix may be, and so neither float16 nor the sum over the columns loses anything.

With dS_p of prefix p and R_p the product of a pair's ratios, the gradient of slice p is a product of
B_p = dS_p + R_p B_{p+1} and the other side's slice: one product per slice, however many prefixes contain it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from betaclip.kernels.similarity.contract import Operand, zero_rows


@dataclass(frozen=True)
class PrefixRows:
    """One operand of P prefixes.

    rows: (N, E) in the dtype of the products. Slice p, times ``factors[p]``, is in the columns ``places[p]``, which
    begin and end at multiples of a kernel's steps; columns that fill it up are 0.
    factors: (P, N) 1 / the norm of each prefix of the normalised rows, that of the next one if it counts as zero.
    ratios: (P - 1, N) ``factors[p + 1] / factors[p]``, negative where prefix p counts as zero.
    """

    operand: Operand
    rows: Tensor
    places: list[slice]
    factors: Tensor
    ratios: Tensor

    @classmethod
    def of(cls, side: Operand, multiple: int) -> "PrefixRows":
        """Fill each slice up to a ``multiple`` of columns."""
        exact = side.prefix_factors()
        factors = torch.cat((exact, exact.new_ones(1, exact.shape[1])))
        for prefix in range(len(exact) - 1, -1, -1):
            factors[prefix] = torch.where(exact[prefix] > 0, exact[prefix], factors[prefix + 1])
        ratios = factors[1:] / factors[:-1]
        places, end = [], 0
        for part in side.slices:
            width = -(-(part.stop - part.start) // multiple) * multiple
            places.append(slice(end, end + width))
            end += width
        rows = side.rows.new_zeros((side.rows.shape[0], end), dtype=side.dtype)
        found = cls(side, rows, places, factors, torch.where(exact > 0, ratios, -ratios))
        for prefix, place in enumerate(found._filled()):
            found._slice(prefix, rows[:, place])
        return found

    @property
    def ends(self) -> tuple[int, ...]:
        """Where the slices end in ``rows``."""
        return tuple(place.stop for place in self.places)

    def gradient(self, products: Tensor, radial: Tensor) -> Tensor:
        """(N, D) the gradient of the normalised rows.

        products: (N, E) of B_p and the other side's slice, in the place of each slice; written over. radial: (P - 1, N)
        sums over dS_p times the cosines of prefix p: the norm of every prefix but the longest depends on the rows.
        """
        out = products.new_empty(self.operand.rows.shape)
        weight: Tensor | float = 0.0
        for prefix, place in reversed(list(enumerate(self._filled()))):
            of_slice = products[:, place]
            if prefix < len(radial):
                weight = radial[prefix] + self.ratios[prefix] ** 2 * weight
                # Exact rows: rounding errors of a row's own would not average out, as those of the other side's do.
                unit = self._slice(prefix, torch.empty_like(of_slice))
                of_slice = of_slice.addcmul_(unit, weight[:, None], value=-1).mul_(self.factors[prefix, :, None])
            out[:, self.operand.slices[prefix]] = of_slice
        return out

    def _filled(self) -> list[slice]:
        """The columns of ``rows`` that hold each slice."""
        sizes = (part.stop - part.start for part in self.operand.slices)
        return [slice(place.start, place.start + size) for place, size in zip(self.places, sizes, strict=True)]

    def _slice(self, prefix: int, out: Tensor) -> Tensor:
        """Write a slice of the normalised prefix that ends with it into ``out``, (N, size)."""
        side = self.operand
        weight = self.factors[prefix] if side.inverse_norm is None else self.factors[prefix] * side.inverse_norm
        torch.mul(side.rows[:, side.slices[prefix]], weight[:, None], out=out)
        return out if side.inverse_norm is None or side.complete else zero_rows(out, side.inverse_norm)
