"""β-CAL, and the losses of CLIP and SigLIP: the formulas, their inputs, and several ranks."""

from betaclip.losses.beta_cal import BetaCALLoss
from betaclip.losses.clip import ClipLoss
from betaclip.losses.functional import beta_cal_bce_loss, beta_cal_ce_loss
from betaclip.losses.siglip import SigLipLoss

__all__ = ["BetaCALLoss", "ClipLoss", "SigLipLoss", "beta_cal_bce_loss", "beta_cal_ce_loss"]
