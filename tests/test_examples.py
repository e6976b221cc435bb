"""The examples as a reader would use them: they run, they learn, and the losses in them are the right ones."""

import importlib.util
import runpy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from support.paths import ROOT
from torch import Tensor

EXAMPLES = ROOT / "examples"


@pytest.fixture(params=["open_clip", "transformers"])
def library(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param, reason=f"needs {request.param}, of the extra 'test'")
    return request.param


@pytest.fixture
def path(library: str) -> Path:
    return EXAMPLES / f"{library}_drop_in.py"


@pytest.fixture
def example(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def batch(example: ModuleType) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and texts (B, K, L)."""
    texts = torch.randint(example.VOCABULARY - 1, (example.B, example.K, example.L))
    texts[..., -1] = example.VOCABULARY - 1
    return torch.randn(example.B, 3, 32, 32), texts


def loss_and_gradients(
    example: ModuleType, step: Callable[..., Tensor], images: Tensor, texts: Tensor
) -> tuple[Tensor, dict[str, Tensor | None]]:
    model = example.tiny_model()
    loss = step(model, images, texts)
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(actual: tuple[Tensor, dict[str, Tensor | None]], expected: tuple[Tensor, dict[str, Tensor | None]]):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=0)
    assert all(gradient is not None for gradient in expected[1].values())
    # The largest elements are between 2 and 4, and their sums round; those of the keys' biases are all rounding.
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-5)


def dense_beta_cal(beta: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """β-CAL's softmax form as published, on the dense matrix of similarities."""

    def loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        images, texts, _ = text.shape
        assert torch.equal(image, image[:, :1].expand_as(image))  # texts stand beside their own image
        v, t = (F.normalize(e, dim=-1).flatten(0, 1) for e in (image, text))
        s = logit_scale * v @ t.T
        w = torch.block_diag(*[beta + (1 - beta) * torch.eye(texts)] * images)
        w = w / w.sum(1, keepdim=True)
        return (F.cross_entropy(s, w) + F.cross_entropy(s.T, w)) / 2

    return loss


def test_runs_as_a_script(library: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    before, after, many_texts = (line.split() for line in capsys.readouterr().out.splitlines())
    assert [before[0], after[0], many_texts[0]] == [f"{library}_loss", "clip_loss", "beta_cal_loss"]
    assert len(before) == len(after) == len(many_texts) > 3
    assert float(after[1]) == pytest.approx(float(before[1]), abs=2e-5)


@pytest.mark.parametrize("name", ["clip_loss", "beta_cal_loss"])
def test_loss_falls(example: ModuleType, name: str) -> None:
    first, *_, last = example.main(steps=4)[name]
    assert last < 0.9 * first


def test_clip_loss_is_the_librarys(library: str, example: ModuleType, batch: tuple[Tensor, Tensor]) -> None:
    images, texts = batch
    own, ours = (
        loss_and_gradients(example, getattr(example, name), images, texts[:, 0])
        for name in (f"{library}_loss", "clip_loss")
    )
    assert_same(ours, own)


def test_beta_cal_loss_is_the_published(
    example: ModuleType, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = loss_and_gradients(example, example.beta_cal_loss, *batch)
    monkeypatch.setattr(example, "BetaCALLoss", dense_beta_cal)
    assert_same(ours, loss_and_gradients(example, example.beta_cal_loss, *batch))


def test_short_with_few_changes(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 60
    assert 1 <= sum("# changed: " in line for line in lines) <= 3
