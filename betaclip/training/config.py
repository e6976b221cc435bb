"""The settings of a training run. The defaults train on rendered scenes, on a CPU."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import DisallowNone

from betaclip.data.registry import DataConfig
from betaclip.errors import ConfigError, not_one_of
from betaclip.kernels.backends import resolve
from betaclip.kernels.similarity import operators as similarity
from betaclip.model.beta_clip import ModelConfig
from betaclip.settings import bounded, check_numbers


@dataclass(frozen=True)
class LossConfig:
    """The loss terms. betaclip.BetaCALLoss explains form, beta and alpha."""

    form: Literal["ce", "bce"] = "ce"
    """Softmax or sigmoid form of β-CAL."""
    beta: float = bounded(0.5, at_least=0)
    """Weight of the other texts of the same image."""
    alpha: float = bounded(1.0, at_least=0)
    """Weight of the own text."""
    global_weight: float = bounded(1.0, at_least=0)
    """Weight of CLIP's loss between images and captions; 0 leaves it out."""
    beta_cal_weight: float = bounded(1.0, at_least=0)
    """Weight of β-CAL; 0 leaves it out and, unless another term reads them, all texts but the captions, and freezes the
    pooling block."""
    conditioned_negatives: int = bounded(0, at_least=0)
    """Number of other pictures that each text also pools, as negatives under the same text; 0 for none. They are drawn
    among the pictures that are encoded together. The loss term is called conditioned, and its weight is 1 unless
    loss.weights has another."""
    text_queue: int = bounded(0, at_least=0)
    """Number of texts of earlier updates (with run.accumulation mean, of earlier micro-batches) that β-CAL has as
    further negatives, over all ranks; 0 for none. Their embeddings are as the model was then. Take fewer than an epoch
    has, or a text meets itself."""
    sampled_pictures: int | None = bounded(None, at_least=1)
    """The loss term text_conditioned: number of other pictures of which each picture pools a random text, among the
    pictures that are encoded together; by default all of these, as in FLAIR."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of further loss terms, by name: multi_positive and text_conditioned are FLAIR's."""
    equal_texts: Literal["negatives", "left_out"] = "negatives"
    """What texts of different images with equal tokens are. negatives: each other's negatives, as in the released code.
    left_out: neither positives nor negatives of each other's images in β-CAL, its text_queue and the global loss."""
    padding: Literal["ignore", "published"] = "ignore"
    """Images may have different numbers of texts. ignore: β-CAL contrasts the texts that there are. published: each
    image gets as many sentences and phrases as the richest one by padding texts, which are encoded, stay in the softmax
    denominators and count in the sigmoid form's divisor, as in the released code."""
    gather: Literal["auto", "all_gather", "ring", "local"] = "auto"
    """How to contrast with the images of all ranks; auto takes the default way. local: β-CAL sees the rank's own images
    alone, and only the global loss those of all ranks, as in the published code."""
    gather_global: Literal["auto", "published"] = "auto"
    """How the global loss contrasts over several ranks; auto: as gather says, with the gradients of the whole batch.
    published: each rank takes what the others send as constants, so that gradients have about half their norm."""
    backend: str = "auto"
    """Backend of the losses: auto, triton, cuda, blockwise or reference; betaclip env says which can run here."""
    strict: bool = False
    """On a GPU, stop where the automatic choice would leave a loss to a slower backend than the fused one."""

    def term_weights(self) -> dict[str, float]:
        conditioned = {"conditioned": 1.0} if self.conditioned_negatives else {}
        return {"global": self.global_weight, "beta_cal": self.beta_cal_weight, **conditioned, **self.weights}


@dataclass(frozen=True)
class GroupConfig:
    """Schedule and clipping of one part of the model."""

    lr: float = bounded(at_least=0)
    """Learning rate after the warm-up, from which it falls by half a cosine."""
    final_lr: float = bounded(at_least=0)
    """Learning rate of the last update."""
    initial_lr: float = bounded(0.0, at_least=0)
    """Learning rate of the first update, if there is a warm-up."""
    warmup: int | None = bounded(None, at_least=0)
    """Number of updates from initial_lr to lr; by default a tenth of the run's, at most 50."""
    clip_norm: float | None = bounded(None, above=0)
    """Largest norm of the part's gradients; by default they are not clipped."""

    def warmup_steps(self, steps: int) -> int:
        """The warm-up of a run of ``steps`` updates."""
        return min(50, steps // 10) if self.warmup is None else self.warmup


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    backbone: GroupConfig = field(default_factory=lambda: GroupConfig(1.5e-3, 1e-5))
    """Towers, projections and their scale."""
    pool: GroupConfig = field(default_factory=lambda: GroupConfig(1e-4, 1e-5))
    """The pooling block and its scale."""
    betas: tuple[float, float] = bounded((0.9, 0.98), at_least=0, below=1)
    """Decay of AdamW's running means of the gradients and of their squares."""
    eps: float = bounded(1e-8, above=0)
    """Added to the root of the mean square that AdamW divides by."""
    schedule: Literal["exact", "published"] = "exact"
    """exact: the warm-up reaches lr in the update of its number, the fall final_lr in the last update. published: the
    warm-up reaches lr one update earlier, and the fall would reach final_lr one update after the last."""
    weight_decay: float = bounded(0.01, at_least=0)
    """Applied to parameters with more than one dimension: not to biases, norms and scales."""
    layer_decay: float = bounded(1.0, above=0, at_most=1)
    """Factor between the learning rates of a tower's layers: the head has the backbone's rate, each block before it
    this times the rate of the next, and the embeddings the lowest. 1 gives all the same."""
    ema_decay: float | None = bounded(None, above=0, below=1)
    """Also keep an exponential moving average (EMA) of the weights, with this decay per update, such as 0.9998."""


@dataclass(frozen=True)
class LockConfig:
    """Parts of the towers that are not trained, by open_clip's names."""

    image: bool = False
    """Freeze the image tower."""
    image_unlocked_groups: int = bounded(0, at_least=0)
    """Number of the image tower's last groups that are trained nevertheless: 1 is the projection, 2 also the last block
    with the norm after it, each further one a block, and the last group the embeddings."""
    image_freeze_layer_norm: bool = True
    """Freeze the LayerNorms of the frozen groups as well."""
    text: bool = False
    """Freeze the text tower."""
    text_unlocked_layers: int = bounded(0, at_least=0)
    """Number of the text tower's last groups that are trained nevertheless, counted as in the image tower."""
    text_freeze_layer_norm: bool = True
    """Freeze the LayerNorms of the frozen groups as well."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) in the towers, by the library peft. Only they and the pooling block are trained."""

    rank: int = bounded(0, at_least=0)
    """Rank of the adapters (PEFT's r); 0 adds none."""
    alpha: float = bounded(16.0, above=0)
    """What adapters compute is multiplied by alpha / rank (PEFT's lora_alpha)."""
    targets: tuple[str, ...] = ("out_proj", "c_fc", "c_proj")
    """Names of the towers' linear layers that get adapters (PEFT's target_modules)."""
    dropout: float = bounded(0.0, at_least=0, below=1)
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
    steps: int | None = bounded(None, at_least=1)
    """Number of updates, in place of epochs."""
    epochs: int = bounded(1, at_least=1)
    """Number of passes over the data."""
    batch_size: int = bounded(32, at_least=1)
    """Images of one update, over all ranks."""
    micro_batch_size: int | None = field(default=None, metadata={"was": "chunk", "at_least": 1})
    """Images that a rank encodes at a time; by default its whole share of the batch."""
    chunk_tokens: int | None = bounded(None, at_least=1)
    """Tokens that a rank encodes at a time, patches and texts together, in place of micro_batch_size: micro-batches of
    gradient caching then have fewer images where texts are long. An image with more tokens is encoded alone."""
    accumulation: Literal["grad_cache", "mean"] = field(default="grad_cache", metadata={"was": "chunks"})
    """Over several micro-batches: one loss of all of them by gradient caching, or the mean of each one's loss."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of autocast; fp16 adds a gradient scaler, and is slow on a CPU."""
    compile: bool = False
    """torch.compile of the vision tower's blocks, which have the same shapes in every batch."""
    device: str = "auto"
    """cpu, cuda, or auto, which takes a GPU if there is one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Data parallelism under torchrun: DistributedDataParallel or fully_shard."""
    seed: int = 0
    """Seed of the model's random weights, of the order of the data and of everything random in them."""
    workers: int | None = bounded(None, at_least=0)
    """Processes per rank that read data; 0 reads between the steps. By default 1 with a GPU and 0 on a CPU, where they
    would compete with the model for its cores."""
    log_every: int = bounded(10, at_least=1)
    """Updates between lines of the log."""
    checkpoint_every: int = bounded(500, at_least=1)
    """Updates between checkpoints; one is also written after the last update and when a signal stops the run."""
    keep: int = bounded(2, at_least=1)
    """Number of latest checkpoints to keep."""
    compare_global: Annotated[bool | None, DisallowNone] = None
    """Then train the same model with the global loss alone, and print both results; by default if the data are
    scenes."""
    non_finite: Literal["stop", "skip"] = "stop"
    """If a loss or gradient is not finite, its update is skipped, and then the run stops or continues."""
    tensorboard: bool = True
    """Write the metrics, the settings and pictures of attention for TensorBoard into the run's folder."""
    wandb: str | None = None
    """Project to log to at Weights & Biases."""

    def workers_with(self, device: torch.device) -> int:
        """The number of processes that read data where the model computes on ``device``."""
        return int(device.type != "cpu") if self.workers is None else self.workers


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of a run."""

    model: ModelConfig = field(
        # LayerNorms and a start from identities let towers that start at random learn in minutes.
        default_factory=lambda: ModelConfig(pool_heads=4, pool_norm_inputs=True, pool_identity=True)
    )
    data: DataConfig = field(default_factory=DataConfig)
    # The lower β is, the more a thing must be told from those beside it. Without other pictures under the same text,
    # embeddings tell texts apart without looking, above all at a β of 0 or with a pooling block that learns fast.
    loss: LossConfig = field(default_factory=lambda: LossConfig(beta=0.1, conditioned_negatives=4))
    lock: LockConfig = field(default_factory=LockConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)


def check(config: TrainingConfig, ranks: int) -> None:
    """Raise ConfigError for values that no run can have."""
    check_numbers(config)
    run = config.run
    if run.batch_size < ranks:
        raise ConfigError(f"run.batch_size: expected at least {ranks}, one for each rank, got {run.batch_size}")
    if run.chunk_tokens is not None and run.micro_batch_size is not None:
        raise ConfigError(f"run.chunk_tokens: expected no run.micro_batch_size with it, got {run.micro_batch_size}; "
                          "give --run.micro-batch-size None")  # fmt: skip
    if run.chunk_tokens is not None and run.accumulation == "mean":
        raise ConfigError("run.chunk_tokens: expected run.accumulation grad_cache, as the mean would weigh images by "
                          "the length of their neighbours' texts, got mean")  # fmt: skip
    if run.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("run.wandb: wandb is not installed: pip install wandb")
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
    lock, lora = config.lock, config.lora
    for option, value in vars(lock).items():
        tower = option.partition("_")[0]
        if value != getattr(LockConfig(), option) and not getattr(lock, tower):
            raise ConfigError(f"lock.{option}: expected lock.{tower} with it, which freezes the tower")
    if lora.rank and (lock.image or lock.text):
        raise ConfigError("lora.rank: expected no lock.image or lock.text with it, as adapters leave the towers frozen")
    if not lora.rank and lora != LoraConfig():
        raise ConfigError("lora.rank: expected at least 1 with other settings of lora, got 0")
    if lora.rank and not lora.targets:
        raise ConfigError("lora.targets: expected at least one name, got none")


def check_backend(config: LossConfig, device: torch.device) -> None:
    """Raise ConfigError for a backend that there is not, or that cannot compute the losses on the device."""
    if config.backend not in (names := ("auto", *similarity.BACKENDS)):
        raise ConfigError(f"loss.backend: {not_one_of(config.backend, names)}")
    operation = "similarity_logsumexp" if config.form == "ce" else "similarity_softplus"
    probe = torch.zeros(2, 64, device=device)
    try:
        resolve(operation, config.backend, similarity.BACKENDS, probe, probe, strict=config.strict)
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(f"loss.backend: {' '.join(str(error).split())}") from error


# The names of what a run writes into its folder. Its name alone may have been given to what a scheduler writes there.
RUN_FILES = (
    "config.toml", "log.txt", "metrics.jsonl", "checkpoint_*", "model.safetensors", "events.out.tfevents.*",
    "non_finite_rank*.json", "results.json", "curves.png", "report.html", "attention", "global_only",
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
        warmup = getattr(config, part).warmup_steps(steps)
        if not 0 <= warmup < steps:
            raise ConfigError(
                f"optimizer.{part}.warmup: expected 0 to {steps - 1}, to end within the run of {steps} updates, "
                f"got {warmup}"
            )
