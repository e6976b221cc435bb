"""The figures behind the cost of a run are those of known cases."""

import torch
from support.paths import ROOT
from support.programs import load_program
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

training_cost = load_program(ROOT / "tools" / "training_cost.py")


def test_extrapolated() -> None:
    def count(layers: int, images: int) -> int:
        return 5 + 3 * images + layers * (7 + 2 * images)

    assert training_cost.extrapolated(count, 12) == (3 + 12 * 2, 5 + 12 * 7)


def test_read() -> None:
    seen: list[str] = []

    def phrases(sentence: str) -> list[object]:
        seen.append(sentence)
        return [training_cost.Phrase("a red mug", 0)]

    assert training_cost.read_s(["A red mug stands here. It is full."], phrases, (64, 48)) > 0
    assert len(seen) == 2 * training_cost.ROUNDS


def test_flop_of_transformers() -> None:
    """One block, counted, without padding."""
    width, tokens = 64, 10
    block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0, batch_first=True)
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        block(torch.randn(3, tokens, width))
    assert counter.get_total_flops() == 3 * training_cost.transformer_flop(width, 1, torch.full((tokens,), tokens))
