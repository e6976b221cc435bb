"""β-CLIP's losses and operations: exact, fast, linear in memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if not Path(__file__).with_name("kernels").is_dir():  # in a clone without symbolic links it is a text file
    __path__.append(str(Path(__file__).parents[1]))  # finds kernels/ as betaclip.kernels all the same

from betaclip.kernels.backends import backend_runs
from betaclip.losses import BetaCALLoss, ClipLoss, SigLipLoss, beta_cal_bce_loss, beta_cal_ce_loss
from betaclip.pooling import TextConditionedPool

if TYPE_CHECKING:
    from betaclip.inference import Model as Model
    from betaclip.inference import load as load

__version__ = "0.1.0"
# Without load and Model, since "import *" must not need the extra train.
__all__ = [
    "BetaCALLoss",
    "ClipLoss",
    "SigLipLoss",
    "TextConditionedPool",
    "__version__",
    "backend_runs",
    "beta_cal_bce_loss",
    "beta_cal_ce_loss",
]


def __getattr__(name: str) -> Any:
    """Import what needs the extra ``train`` only when it is used: the losses and the pooling need torch alone."""
    if name in ("Model", "load"):
        from betaclip import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
