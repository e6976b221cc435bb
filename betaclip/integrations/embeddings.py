"""The embeddings that β-CLIP takes from a CLIP of another library."""

from typing import NamedTuple

from torch import Tensor


class Embeddings(NamedTuple):
    """The embeddings of B images and their texts, in one space of D dimensions, not normalised.

    image: (B, D), of the whole image.
    patches: (B, P, D), projected as the whole image's embedding is.
    texts: (B, K, D), or (N, D) for N texts that were given as one list.
    """

    image: Tensor
    patches: Tensor
    texts: Tensor
