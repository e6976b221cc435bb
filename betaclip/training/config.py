"""The settings of a training run. The defaults train on rendered scenes, on a CPU."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from betaclip.data.registry import DataConfig
from betaclip.errors import ConfigError
from betaclip.model.beta_clip import ModelConfig


@dataclass(frozen=True)
class LossConfig:
    """The loss terms. ``betaclip.BetaCALLoss`` explains form, beta and alpha."""

    form: Literal["ce", "bce"] = "ce"
    """Softmax or sigmoid form of β-CAL."""
    beta: float = 0.5
    """Weight of the other texts of the same image."""
    alpha: float = 1.0
    """Weight of the own text."""
    global_weight: float = 1.0
    """Weight of CLIP's loss between images and captions; 0 leaves it out."""
    beta_cal_weight: float = 1.0
    """Weight of β-CAL; 0 leaves it out and, unless another term reads them, all texts but the captions, and freezes the
    pooling block."""
    conditioned_negatives: int = 0
    """Number of other pictures that each text also pools, as negatives under the same text; 0 for none. They are drawn
    among the pictures that are encoded together. The loss term is called conditioned, and its weight is 1 unless
    loss.weights has another."""
    text_queue: int = 0
    """Number of texts of earlier updates that β-CAL has as further negatives, over all ranks; 0 for none. Their
    embeddings are as the model was then. Take fewer than an epoch has, or a text meets itself."""
    sampled_pictures: int | None = None
    """The loss term text_conditioned: number of other pictures of which each picture pools a random text, among the
    pictures that are encoded together; by default all of these, as in FLAIR."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of further loss terms, by name: multi_positive and text_conditioned are FLAIR's."""
    padding: Literal["ignore", "published"] = "ignore"
    """Images may have different numbers of texts. ignore: β-CAL contrasts the texts that there are. published: each
    image gets as many sentences and phrases as the richest one by padding texts, which are encoded, stay in the softmax
    denominators and count in the sigmoid form's divisor, as in the released code."""
    gather: Literal["auto", "all_gather", "ring", "false"] = "auto"
    """How to contrast with the images of all ranks; auto takes the default way. false: β-CAL sees the rank's own images
    alone, and only the global loss those of all ranks, as in the published code."""
    gather_global: Literal["auto", "published"] = "auto"
    """How the global loss contrasts over several ranks; auto: as gather says, with the gradients of the whole batch.
    published: each rank takes what the others send as constants, so that gradients have about half their norm."""
    backend: str = "auto"
    """Backend of the losses."""
    strict: bool = False
    """On a GPU, stop where the automatic choice would leave a loss to a slower backend than the fused one."""

    def term_weights(self) -> dict[str, float]:
        conditioned = {"conditioned": 1.0} if self.conditioned_negatives else {}
        return {"global": self.global_weight, "beta_cal": self.beta_cal_weight, **conditioned, **self.weights}


@dataclass(frozen=True)
class GroupConfig:
    """Schedule and clipping of one part of the model."""

    lr: float
    """Learning rate after the warm-up, from which it falls by half a cosine."""
    final_lr: float
    """Learning rate of the last update."""
    initial_lr: float = 0.0
    """Learning rate of the first update, if there is a warm-up."""
    warmup: int = 0
    """Number of updates from initial_lr to lr."""
    clip_norm: float | None = None
    """Largest norm of the part's gradients; by default they are not clipped."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    backbone: GroupConfig = field(default_factory=lambda: GroupConfig(1.5e-3, 1e-5, warmup=50))
    """Towers, projections and their scale."""
    pool: GroupConfig = field(default_factory=lambda: GroupConfig(1e-4, 1e-5, warmup=50))
    """The pooling block and its scale."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    schedule: Literal["exact", "published"] = "exact"
    """exact: the warm-up reaches lr in update ``warmup``, the fall final_lr in the last update. published: the warm-up
    reaches lr one update earlier, and the fall would reach final_lr one update after the last."""
    weight_decay: float = 0.01
    """Applied to parameters with more than one dimension: not to biases, norms and scales."""
    layer_decay: float = 1.0
    """Factor between the learning rates of a tower's layers: the head has the backbone's rate, each block before it
    this times the rate of the next, and the embeddings the lowest. 1 gives all the same."""
    ema_decay: float | None = None
    """Also keep an exponential moving average (EMA) of the weights, with this decay per update, such as 0.9998."""


@dataclass(frozen=True)
class LockConfig:
    """Parts of the towers that are not trained, by open_clip's names."""

    image: bool = False
    """Freeze the image tower."""
    image_unlocked_groups: int = 0
    """Number of the image tower's last groups that are trained nevertheless: 1 is the projection, 2 also the last block
    with the norm after it, each further one a block, and the last group the embeddings."""
    image_freeze_layer_norm: bool = True
    """Freeze the LayerNorms of the frozen groups as well."""
    text: bool = False
    """Freeze the text tower."""
    text_unlocked_layers: int = 0
    """Number of the text tower's last groups that are trained nevertheless, counted as in the image tower."""
    text_freeze_layer_norm: bool = True
    """Freeze the LayerNorms of the frozen groups as well."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) in the towers, by the library peft. Only they and the pooling block are trained."""

    rank: int = 0
    """Rank of the adapters (PEFT's r); 0 adds none."""
    alpha: float = 16.0
    """What adapters compute is multiplied by alpha / rank (PEFT's lora_alpha)."""
    targets: tuple[str, ...] = ("out_proj", "c_fc", "c_proj")
    """Names of the towers' linear layers that get adapters (PEFT's target_modules)."""
    dropout: float = 0.0
    """Dropout of what adapters are given (PEFT's lora_dropout)."""


@dataclass(frozen=True)
class RunConfig:
    """How the run is carried out."""

    name: str | None = None
    """Name of the run's folder; by default the time at which it starts."""
    folder: Path = Path("runs")
    """Folder that holds the runs' folders."""
    resume: bool = False
    """Continue from the latest checkpoint in the run's folder; start if there is none."""
    continue_from: Path | None = None
    """Start from a checkpoint of the released training code: its weights, its optimisers' state and its epoch."""
    steps: int | None = None
    """Number of updates, in place of epochs."""
    epochs: int = 1
    batch_size: int = 32
    """Images of one update, over all ranks."""
    micro_batch_size: int | None = field(default=None, metadata={"was": "chunk"})
    """Images that a rank encodes at a time; by default its whole share of the batch."""
    chunk_tokens: int | None = None
    """Tokens that a rank encodes at a time, patches and texts together, in place of micro_batch_size: micro-batches of
    gradient caching then have fewer images where texts are long. An image with more tokens is encoded alone."""
    accumulation: Literal["grad_cache", "mean"] = field(default="grad_cache", metadata={"was": "chunks"})
    """Over several micro-batches: one loss of all of them by gradient caching, or the mean of each one's loss."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of autocast; fp16 adds a gradient scaler."""
    compile: bool = False
    """torch.compile of the vision tower's blocks, which have the same shapes in every batch."""
    device: str = "auto"
    """auto takes a GPU if there is one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Data parallelism under torchrun: DistributedDataParallel or fully_shard."""
    seed: int = 0
    workers: int = 1
    """Processes per rank that read data; 0 reads between the steps."""
    log_every: int = 10
    """Updates between lines of the log."""
    checkpoint_every: int = 500
    """Updates between checkpoints; one is also written after the last update and when a signal stops the run."""
    keep: int = 2
    """Number of latest checkpoints to keep."""
    compare_global: bool | None = None
    """Then train the same model with the global loss alone, and print both results; by default if the data are
    scenes."""
    non_finite: Literal["stop", "skip"] = "stop"
    """If a loss or gradient is not finite, its update is skipped, and then the run stops or continues."""
    tensorboard: bool = True
    wandb: str | None = None
    """Project to log to at Weights & Biases."""


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
    lock: LockConfig = field(default_factory=LockConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)


def check(config: TrainingConfig, ranks: int) -> None:
    """Raise ConfigError for values that no run can have."""
    run = config.run
    at_least_one = (
        "batch_size", "epochs", "steps", "micro_batch_size", "chunk_tokens", "log_every", "checkpoint_every", "keep",
    )  # fmt: skip
    for name in at_least_one:
        value = getattr(run, name)
        if value is not None and value < 1:
            raise ConfigError(f"run.{name}: expected at least 1, got {value}")
    if run.batch_size < ranks:
        raise ConfigError(f"run.batch_size: expected at least {ranks}, one for each rank, got {run.batch_size}")
    if run.chunk_tokens is not None and run.micro_batch_size is not None:
        raise ConfigError(f"run.chunk_tokens: expected no run.micro_batch_size with it, got {run.micro_batch_size}; "
                          "give --run.micro-batch-size None")  # fmt: skip
    if run.chunk_tokens is not None and run.accumulation == "mean":
        raise ConfigError("run.chunk_tokens: expected run.accumulation grad_cache, as the mean would weigh images by "
                          "the length of their neighbours' texts, got mean")  # fmt: skip
    if run.workers < 0:
        raise ConfigError(f"run.workers: expected at least 0, got {run.workers}")
    if run.resume and run.name is None:
        raise ConfigError("run.resume: expected run.name with it, the name of the run to resume")
    if run.continue_from is not None and config.model.pretrained is not None:
        raise ConfigError(f"run.continue_from: brings its own weights; expected no model.pretrained with it, "
                          f"got {config.model.pretrained}; give --model.pretrained None")  # fmt: skip
    if run.parallel == "fsdp" and run.precision == "fp16":
        raise ConfigError("run.precision: fp16's gradient scaler does not support run.parallel=fsdp; take bf16, or ddp")
    _check_trained_parts(config)


def _check_trained_parts(config: TrainingConfig) -> None:
    """Raise ConfigError for values of lock, lora and of the optimizer's options for layers and averages."""
    lock, lora, optimizer = config.lock, config.lora, config.optimizer
    for option, value in vars(lock).items():
        tower = option.partition("_")[0]
        if value != getattr(LockConfig(), option) and not getattr(lock, tower):
            raise ConfigError(f"lock.{option}: expected lock.{tower} with it, which freezes the tower")
    if lora.rank < 0:
        raise ConfigError(f"lora.rank: expected at least 0, got {lora.rank}")
    if lora.rank and (lock.image or lock.text):
        raise ConfigError("lora.rank: expected no lock.image or lock.text with it, as adapters leave the towers frozen")
    if not lora.rank and lora != LoraConfig():
        raise ConfigError("lora.rank: expected at least 1 with other settings of lora, got 0")
    if lora.rank and not lora.targets:
        raise ConfigError("lora.targets: expected at least one name, got none")
    if not 0 <= lora.dropout < 1:
        raise ConfigError(f"lora.dropout: expected at least 0 and below 1, got {lora.dropout:g}")
    if not 0 < lora.alpha < math.inf:
        raise ConfigError(f"lora.alpha: expected above 0, got {lora.alpha:g}")
    if not 0 < optimizer.layer_decay <= 1:
        raise ConfigError(f"optimizer.layer_decay: expected above 0 and at most 1, got {optimizer.layer_decay:g}")
    if optimizer.ema_decay is not None and not 0 < optimizer.ema_decay < 1:
        raise ConfigError(f"optimizer.ema_decay: expected above 0 and below 1, got {optimizer.ema_decay:g}")


# The names of what a run writes into its folder. Its name alone may have been given to what a scheduler writes there.
RUN_FILES = (
    "config.toml", "metrics.jsonl", "checkpoint_*", "events.out.tfevents.*", "non_finite_rank*.json", "results.json",
    "curves.png", "report.html", "attention", "global_only",
)  # fmt: skip


# Settings that a resumed run must have as they were: others make another model, train other parts of it, or take other
# samples. The order of the data source has the rest of what its samples depend on.
FIXED_SETTINGS = (
    "model.name", "model.context_length", "model.pool_heads", "model.pool_norm_inputs", "model.pool_norm_qkv",
    "model.pool_add_zero_attn", "model.pool_mlp_ratio", "model.attended_patches",
    "data.kind", "data.scenes_seed", "data.shuffle", "lora.rank", "lora.alpha", "lora.targets", "optimizer.layer_decay",
    "lock.image", "lock.image_unlocked_groups", "lock.image_freeze_layer_norm",
    "lock.text", "lock.text_unlocked_layers", "lock.text_freeze_layer_norm",
)  # fmt: skip


def is_fixed(setting: str) -> bool:
    """Whether a resumed run must have a setting as it was: one of FIXED_SETTINGS, or its like in a mixture's set."""
    if setting.startswith("data.mixture."):
        return setting.endswith((".kind", ".scenes_seed", ".shuffle", ".weight"))
    return setting in FIXED_SETTINGS


def check_resume(run: RunConfig) -> None:
    """Raise ConfigError for a folder with a run's files, unless the run is resumed."""
    assert run.name is not None
    folder = run.folder / run.name
    found = [path.name for name in RUN_FILES for path in sorted(folder.glob(name))]
    if found and not run.resume:
        raise ConfigError(
            f"run.name: {folder} already holds a run ({found[0]}); give --run.resume to continue it, or another name"
        )


def check_schedules(config: OptimizerConfig, steps: int) -> None:
    """Raise ConfigError for a warm-up that does not end within the run."""
    for part in ("backbone", "pool"):
        warmup = getattr(config, part).warmup
        if not 0 <= warmup < steps:
            raise ConfigError(
                f"optimizer.{part}.warmup: expected 0 to {steps - 1}, to end within the run of {steps} updates, "
                f"got {warmup}"
            )
