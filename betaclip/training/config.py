"""Everything that a training run can be told, with its defaults: the scenes, on a CPU."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from betaclip.data.registry import DataConfig
from betaclip.errors import ConfigError
from betaclip.model.beta_clip import ModelConfig


@dataclass(frozen=True)
class LossConfig:
    """The two losses. ``betaclip.BetaCALLoss`` explains form, beta and alpha."""

    form: Literal["ce", "bce"] = "ce"
    """Softmax or sigmoid form of β-CAL."""
    beta: float = 0.5
    """Weight of the other texts of the same image."""
    alpha: float = 1.0
    """Weight of the own text."""
    global_weight: float = 1.0
    """Of CLIP's loss between images and captions; 0 leaves it out."""
    beta_cal_weight: float = 1.0
    """Of β-CAL; 0 leaves it out, with all texts but the captions, and freezes the pooling block."""
    gather: Literal["auto", "all_gather", "ring", "false"] = "auto"
    """Contrast with all ranks' images: auto does wherever there are several. false: β-CAL with the rank's own alone,
    and only the global loss with all, as in the published code."""
    backend: str = "auto"
    """Of both losses."""


@dataclass(frozen=True)
class GroupConfig:
    """Schedule and clipping of one part of the model."""

    lr: float
    """Learning rate after the warm-up; from there half a cosine goes down."""
    final_lr: float
    """In the last update."""
    initial_lr: float = 0.0
    """In the first update, if there is a warm-up."""
    warmup: int = 0
    """Updates from initial_lr to lr."""
    clip_norm: float | None = None
    """Largest norm of the part's gradients; without it they are not clipped."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    backbone: GroupConfig = field(default_factory=lambda: GroupConfig(1.5e-3, 1e-5, warmup=50))
    """Towers, projections and their scale."""
    pool: GroupConfig = field(default_factory=lambda: GroupConfig(1e-4, 1e-5, warmup=50))
    """The pooling block and its scale."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Not of biases, norms, scales and other parameters of one dimension."""


@dataclass(frozen=True)
class RunConfig:
    """How to run it."""

    name: str | None = None
    """Of the run's folder; without one, the time it starts."""
    folder: Path = Path("runs")
    """Where runs' folders are."""
    resume: bool = False
    """Go on from the latest checkpoint in the run's folder, or start if there is none."""
    steps: int | None = None
    """Updates; instead of epochs."""
    epochs: int = 1
    batch_size: int = 32
    """Images of one update, over all ranks."""
    micro_batch_size: int | None = field(default=None, metadata={"was": "chunk"})
    """Images that a rank encodes at a time; by default its whole share of the batch."""
    accumulation: Literal["grad_cache", "mean"] = field(default="grad_cache", metadata={"was": "chunks"})
    """Over several micro-batches: one loss of all of them by gradient caching, or the mean of each one's loss."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast; fp16 with a gradient scaler."""
    compile: bool = False
    """torch.compile of the vision tower's blocks, which have the same shapes in every batch."""
    device: str = "auto"
    """auto takes a GPU if there is one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun."""
    seed: int = 0
    workers: int = 1
    """Processes that read data, of each rank; 0 reads between the steps."""
    log_every: int = 10
    checkpoint_every: int = 500
    """Updates; also after the last one, and at SIGTERM."""
    keep: int = 2
    """Latest checkpoints."""
    compare_global: bool | None = None
    """Afterwards train the same model with the global loss alone, and print both results; by default if the data are
    scenes."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: its update is left out, and then the run stops or goes on."""
    tensorboard: bool = True
    wandb: str | None = None
    """Weights & Biases: the project's name."""


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of a run."""

    # The pooling block's LayerNorms and its start from identities let towers that start at random learn in minutes.
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(pool_heads=4, pool_norm_inputs=True, pool_identity=True)
    )
    data: DataConfig = field(default_factory=DataConfig)
    # The lower β is, the more a thing must be told from those beside it. At 0, or with a pooling block that learns as
    # fast as the towers, pooled embeddings tell texts apart without the picture.
    loss: LossConfig = field(default_factory=lambda: LossConfig(beta=0.1))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)


def check(config: TrainingConfig, ranks: int) -> None:
    """Raise ConfigError for values that no run can have."""
    run = config.run
    at_least_one = ("batch_size", "epochs", "steps", "micro_batch_size", "log_every", "checkpoint_every", "keep")
    for name in at_least_one:
        value = getattr(run, name)
        if value is not None and value < 1:
            raise ConfigError(f"run.{name}: expected at least 1, got {value}")
    if run.batch_size < ranks:
        raise ConfigError(f"run.batch_size: expected at least {ranks}, one for each rank, got {run.batch_size}")
    if run.workers < 0:
        raise ConfigError(f"run.workers: expected at least 0, got {run.workers}")
    if run.resume and run.name is None:
        raise ConfigError("run.resume: expected run.name with it, the name of the run to resume")
    if run.parallel == "fsdp" and run.precision == "fp16":
        raise ConfigError("run.precision: fp16's gradient scaler does not support run.parallel=fsdp; take bf16, or ddp")


def check_schedules(config: OptimizerConfig, steps: int) -> None:
    """Raise ConfigError for a warm-up that does not end within the run."""
    for part in ("backbone", "pool"):
        warmup = getattr(config, part).warmup
        if not 0 <= warmup < steps:
            raise ConfigError(
                f"optimizer.{part}.warmup: expected 0 to {steps - 1}, to end within the run of {steps} updates, "
                f"got {warmup}"
            )
