"""β-CAL and CLIP's loss: the formulas, their inputs, and several ranks."""

from betaclip.losses.beta_cal import BetaCALLoss, beta_cal_bce_loss, beta_cal_ce_loss
from betaclip.losses.clip import ClipLoss

__all__ = ["BetaCALLoss", "ClipLoss", "beta_cal_bce_loss", "beta_cal_ce_loss"]
