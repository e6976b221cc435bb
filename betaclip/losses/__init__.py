"""β-CAL and CLIP's loss: the formulas, their inputs, and several ranks."""

from betaclip.losses.beta_cal import BetaCALLoss, ClipLoss, beta_cal_bce_loss, beta_cal_ce_loss

__all__ = ["BetaCALLoss", "ClipLoss", "beta_cal_bce_loss", "beta_cal_ce_loss"]
