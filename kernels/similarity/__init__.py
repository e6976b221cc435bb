"""Two-sided statistics of all pairwise similarities, without the matrix of similarities."""

from betaclip.kernels.similarity.functional import similarity_logsumexp, similarity_softplus

__all__ = ["similarity_logsumexp", "similarity_softplus"]
