"""Multi-head attention pooling of patches by given queries, without projecting the patches where that pays."""

from betaclip.kernels.attention_pool.operators import attention_pool

__all__ = ["attention_pool"]
