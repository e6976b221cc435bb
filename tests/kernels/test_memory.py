"""Scratch memory that the CPU backends keep."""

import torch

from betaclip.kernels import memory as module
from betaclip.kernels.memory import forget, kept_bytes, scratch

CPU = torch.device("cpu")


def test_the_same_memory_in_every_call():
    forget()
    a, b = scratch([(3, 4), (5,)], torch.float32, CPU)
    assert a.shape == (3, 4) and b.shape == (5,) and kept_bytes() == 4 * 17
    (c,) = scratch([(2, 2)], torch.float32, CPU)
    assert c.data_ptr() == a.data_ptr() and kept_bytes() == 4 * 17
    (other,) = scratch([(2, 2)], torch.float64, CPU)  # of another dtype: its own
    assert other.dtype == torch.float64 and kept_bytes() == 4 * 17 + 8 * 4
    forget()
    assert kept_bytes() == 0


def test_parts_do_not_overlap():
    parts = scratch([(2, 3), (4,), (0, 7)], torch.float32, CPU)
    for i, part in enumerate(parts):
        part.fill_(i)
    assert [set(part.flatten().tolist()) for part in parts] == [{0.0}, {1.0}, set()]


def test_large_scratch_is_not_kept(monkeypatch):
    monkeypatch.setattr(module, "MOST_KEPT_BYTES", 100)
    forget()
    (large,) = scratch([(26,)], torch.float32, CPU)
    assert large.shape == (26,) and kept_bytes() == 0
    scratch([(25,)], torch.float32, CPU)
    assert kept_bytes() == 100


def test_made_in_inference_mode_it_serves_training():
    forget()
    with torch.inference_mode():
        scratch([(4,)], torch.float32, CPU)
    (x,) = scratch([(4,)], torch.float32, CPU)
    assert not x.is_inference()
