"""β-CLIP's losses and operations: exact, fast, linear in memory."""

from pathlib import Path

if not Path(__file__).with_name("kernels").is_dir():  # in a clone without symbolic links it is a text file
    __path__.append(str(Path(__file__).parents[1]))  # finds kernels/ as betaclip.kernels all the same

from betaclip.losses import BetaCALLoss, ClipLoss, beta_cal_bce_loss, beta_cal_ce_loss
from betaclip.pooling import TextConditionedPool

__version__ = "0.1.0"
__all__ = ["BetaCALLoss", "ClipLoss", "TextConditionedPool", "__version__", "beta_cal_bce_loss", "beta_cal_ce_loss"]
