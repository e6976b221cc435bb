"""β-CLIP's losses and operations: exact, fast, linear in memory."""

from betaclip.losses.beta_cal import BetaCALLoss, ClipLoss, beta_cal_bce_loss, beta_cal_ce_loss
from betaclip.pooling import TextConditionedPool

__version__ = "0.1.0"
__all__ = ["BetaCALLoss", "ClipLoss", "TextConditionedPool", "__version__", "beta_cal_bce_loss", "beta_cal_ce_loss"]
