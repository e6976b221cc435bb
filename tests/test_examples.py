"""The examples run, they learn, and their losses are right."""

import os
import runpy
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.paths import ROOT
from support.programs import load_program
from torch import Tensor, nn
from torch.distributed.run import get_args_parser

from betaclip import cli
from betaclip.errors import Stopped
from betaclip.train import TrainConfig

EXAMPLES = ROOT / "examples"
IMAGES, TEXTS, PATCHES, WIDTH = 16, 3, 16, 32


@pytest.fixture(params=["open_clip", "transformers"])
def library(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param, reason=f"needs {request.param}, of the extra 'test'")
    return request.param


@pytest.fixture
def path(library: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a script
    return EXAMPLES / f"{library}_drop_in.py"


@pytest.fixture
def example(path: Path) -> ModuleType:
    return load_program(path)


@pytest.fixture
def batch(example: ModuleType) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and texts (B, K, L)."""
    import toy

    images, texts = toy.random_batch()
    assert images.shape == (IMAGES, 3, 32, 32) and texts.shape[:2] == (IMAGES, TEXTS)
    return images, texts


def beta_clip(example: ModuleType, beta: float = 0.5) -> nn.Module:
    """The example's model, with the same weights in each call."""
    torch.manual_seed(1)
    model: nn.Module = example.BetaCLIPLoss(example.tiny_model(), beta)
    return model


def own_loss(library: str, clip: nn.Module, images: Tensor, captions: Tensor) -> Tensor:
    """The loss that the library itself computes for images and one text of each."""
    if library == "transformers":
        loss: Tensor = clip(captions, images, return_loss=True).loss
        return loss
    import open_clip

    clip.visual.output_tokens = False
    return open_clip.ClipLoss()(*clip(images, captions))


def gradients(loss: Tensor, model: nn.Module) -> tuple[Tensor, dict[str, Tensor | None]]:
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(actual: tuple[Tensor, dict[str, Tensor | None]], expected: tuple[Tensor, dict[str, Tensor | None]]):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=0)
    assert all(gradient is not None for gradient in expected[1].values())
    # The largest elements are between 2 and 4, and their sums round; those of the keys' biases are all rounding.
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-5)


class NoLoss(nn.Module):
    def forward(self, *embeds: Tensor) -> float:
        return 0.0


def dense_beta_cal(image: Tensor, text: Tensor, logit_scale: Tensor, beta: float) -> Tensor:
    """β-CAL's softmax form as published, on the dense matrix of similarities."""
    v, t = (F.normalize(e, dim=-1).flatten(0, 1) for e in (image, text))
    s = logit_scale * v @ t.T
    w = torch.block_diag(*[beta + (1 - beta) * torch.eye(TEXTS)] * IMAGES)
    w = w / w.sum(1, keepdim=True)
    return (F.cross_entropy(s, w) + F.cross_entropy(s.T, w)) / 2


class Pooling(NamedTuple):
    patches: Tensor
    texts: Tensor
    pooled: Tensor


def pooling_of(model: nn.Module, images: Tensor, texts: Tensor) -> Pooling:
    """The pooling block's arguments and result in a forward of the model."""
    seen: list[Pooling] = []
    model.pool.register_forward_hook(lambda module, inputs, output: seen.append(Pooling(*inputs, output)))
    model(images, texts)
    (one,) = seen
    return one


def test_script_prints_falling_losses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    first, *_, last = map(float, capsys.readouterr().out.split())
    assert last < 0.7 * first


def test_global_loss_is_the_librarys(library: str, example: ModuleType, batch: tuple[Tensor, Tensor]) -> None:
    images, texts = batch
    ours = beta_clip(example)
    ours.beta_cal_loss = NoLoss()
    theirs = example.tiny_model()
    expected = gradients(own_loss(library, theirs, images, texts[:, 0]), theirs)
    loss, found = gradients(ours(images, texts), ours)
    of_clip = {name.removeprefix("clip."): gradient for name, gradient in found.items() if name.startswith("clip.")}
    assert_same((loss, of_clip), expected)


def test_beta_cal_is_the_published(example: ModuleType, batch: tuple[Tensor, Tensor]) -> None:
    ours, theirs = beta_clip(example), beta_clip(example)
    ours.clip_loss = NoLoss()
    seen = pooling_of(theirs, *batch)
    expected = dense_beta_cal(seen.pooled, seen.texts, theirs.pool.logit_scale.exp(), beta=0.5)
    theirs.clip.logit_scale.grad = ours.clip.logit_scale.grad = torch.zeros(())  # of the other loss alone
    assert_same(gradients(ours(*batch), ours), gradients(expected, theirs))


def test_beta_acts(example: ModuleType, batch: tuple[Tensor, Tensor]) -> None:
    """In the softmax form it does nothing where one image embedding serves all texts of an image."""
    losses = [beta_clip(example, beta)(*batch).item() for beta in (0.0, 0.5)]
    assert abs(losses[1] - losses[0]) > 0.01 * losses[0]


def test_each_text_pools_the_projected_patches(example: ModuleType, batch: tuple[Tensor, Tensor]) -> None:
    patches, texts, pooled = pooling_of(beta_clip(example), *batch)
    assert patches.shape == (IMAGES, PATCHES, WIDTH)
    assert texts.shape == pooled.shape == (IMAGES, TEXTS, WIDTH)
    assert F.cosine_similarity(pooled[:, 0], pooled[:, 1], dim=-1).max() < 0.9999


def test_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


# The same model in other libraries' trainers


@pytest.fixture
def trainer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    name, *packages = request.param
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package}, of the extra 'test' or 'integrations'")
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60
    return load_program(EXAMPLES / f"{name}.py")


def in_a_loop(module: ModuleType) -> list[float]:
    """The losses of the example's model in a loop of our own."""
    import toy

    return toy.train(module.BetaCLIPLoss(module.tiny_model()), steps=3)


@pytest.mark.parametrize("trainer", [("hf_trainer", "transformers", "accelerate")], indirect=True)
def test_transformers_trainer(trainer: ModuleType, tmp_path: Path) -> None:
    model = trainer.ModelWithLoss(trainer.BetaCLIPLoss(trainer.tiny_model()))
    losses = trainer.train(model, tmp_path, steps=3)
    assert [float(loss) for loss in losses] == pytest.approx(in_a_loop(trainer), rel=1e-3)


@pytest.mark.parametrize("trainer", [("lightning_trainer", "open_clip", "lightning")], indirect=True)
def test_lightning(trainer: ModuleType) -> None:
    model = trainer.BetaCLIP(trainer.BetaCLIPLoss(trainer.tiny_model()))
    losses = trainer.train(model, steps=3, accelerator="cpu")
    assert losses == pytest.approx(in_a_loop(trainer), rel=1e-5)


@pytest.mark.parametrize("trainer", [("sentence_transformers_loss", "sentence_transformers")], indirect=True)
def test_sentence_transformers(trainer: ModuleType) -> None:
    from sentence_transformers.losses import MultipleNegativesSymmetricRankingLoss

    losses = []
    for kind in (trainer.SymmetricLoss, MultipleNegativesSymmetricRankingLoss):
        model = trainer.tiny_model()
        losses.append(trainer.train(model, kind(model), steps=3))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][2] < 0.95 * losses[0][0]


# On a SLURM cluster


class Cluster:
    """SLURM's commands and torchrun, replaced by scripts; what they are called with goes to files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("srun", 'exec "$@"')
        self.write(
            "scontrol", f'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" > {folder}/scontrol.txt; fi'
        )
        self.torchrun("exit 0")

    def write(self, name: str, script: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def torchrun(self, then: str) -> None:
        """torchrun's own help; else what it is called with, and then this."""
        called, helps = self.folder / "torchrun.txt", self.folder / "help.txt"
        helps.write_text(get_args_parser().format_help())
        self.write("torchrun", f'[ "$*" = --help ] && exec cat {helps}\nprintf \'%s\\n\' "$@" > {called}\n{then}')

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        slurm = {"JOB_ID": "12", "JOB_NAME": "betaclip", "JOB_NODELIST": "node[7-8]", "JOB_NUM_NODES": "2"}
        environment = {f"SLURM_{name}": value for name, value in slurm.items()} | {"SLURM_GPUS_ON_NODE": "4"}
        environment |= {"PATH": f"{self.folder}:{os.environ['PATH']}"}
        return subprocess.Popen(["bash", str(EXAMPLES / "slurm.sh"), *options], env=environment)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_slurm_script_calls_torchrun(cluster: Cluster) -> None:
    """With arguments that torchrun and the trainer take."""
    assert len((EXAMPLES / "slurm.sh").read_text(encoding="utf-8").splitlines()) < 60
    assert cluster.start("--config", "scenes", "--run.seed", "3").wait() == 0
    called = get_args_parser().parse_args((cluster.folder / "torchrun.txt").read_text().splitlines())
    assert (called.nnodes, called.nproc_per_node, called.rdzv_endpoint) == ("2", "4", "node7:29500")
    assert "SIGUSR1" in called.signals_to_handle.split(",") and called.module and called.training_script == "betaclip"
    command, *options = called.training_script_args
    assert command == "train" and not (cluster.folder / "scontrol.txt").exists()
    config = cli._parse("train", TrainConfig, "train", options)
    assert (config.run.name, config.run.resume, config.run.seed) == ("betaclip-12", True, 3)


@pytest.mark.parametrize(("sent", "code"), [("USR1", 1), ("USR1", 0), ("TERM", 143)])
def test_slurm_script_passes_signals_on(cluster: Cluster, sent: str, code: int) -> None:
    """At the end of its time a job is queued again, unless training has ended. A preempted one SLURM queues itself."""
    cluster.torchrun(f"trap 'exit {code}' {sent}; touch {cluster.folder}/started; while true; do sleep 0.02; done")
    script = cluster.start()
    while not (cluster.folder / "started").exists():
        assert script.poll() is None
        time.sleep(0.01)
    script.send_signal(getattr(signal, f"SIG{sent}"))
    queued = (sent, code) == ("USR1", 1)
    assert script.wait() == (0 if queued else code)
    assert (cluster.folder / "scontrol.txt").exists() is queued
    assert not queued or (cluster.folder / "scontrol.txt").read_text() == "requeue 12\n"


def test_slurm_script_reports_failures(cluster: Cluster) -> None:
    cluster.torchrun("exit 3")
    assert cluster.start().wait() == 3 and not (cluster.folder / "scontrol.txt").exists()


@pytest.fixture
def user_signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("trainer", [("slurm_submitit", "submitit")], indirect=True)
@pytest.mark.usefixtures("user_signals")
def test_submitit(trainer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitit's signal becomes the trainer's; when the trainer has saved, submitit queues the same options again."""
    events: list[object] = []

    def train(arguments: list[str]) -> None:
        events.append(arguments)
        signal.signal(signal.SIGUSR1, lambda *_: events.append("saves"))
        signal.raise_signal(signal.SIGUSR2)
        raise Stopped(signal.SIGUSR1)

    signal.signal(signal.SIGUSR2, lambda *_: events.append("queues again"))
    monkeypatch.setattr(trainer.cli, "main", train)
    run = trainer.Train("--run.name", "first")
    assert run.checkpoint().function.options == run.options
    trainer.executor(tmp_path, "debug").submit(run).result()
    assert events == [["train", "--run.resume", "--run.name", "first"], "saves", "queues again"]
