"""Scratch memory that the CPU keeps, and aligned copies."""

import pytest
import torch

from betaclip.kernels.memory import aligned, forget, kept_bytes, on_huge_pages, scratch

CPU = torch.device("cpu")


def test_the_same_memory_in_every_call():
    forget()
    with scratch([(3, 4), (5,)], torch.float32, CPU) as (a, b):
        assert a.shape == (3, 4) and b.shape == (5,) and kept_bytes() == 4 * 17
    with scratch([(2, 2)], torch.float32, CPU) as (c,):
        assert c.data_ptr() == a.data_ptr() and kept_bytes() == 4 * 17
    with scratch([(2, 2)], torch.float64, CPU) as (other,):  # another dtype has memory of its own
        assert other.dtype == torch.float64 and kept_bytes() == 4 * 17 + 8 * 4
    forget()
    assert kept_bytes() == 0


def test_parts_do_not_overlap():
    with scratch([(2, 3), (4,), (0, 7)], torch.float32, CPU) as parts:
        for i, part in enumerate(parts):
            part.fill_(i)
        assert [set(part.flatten().tolist()) for part in parts] == [{0.0}, {1.0}, set()]


def test_nested_blocks_have_memory_of_their_own():
    forget()
    with scratch([(4,)], torch.float32, CPU) as (outer,):
        outer.fill_(1)
        with scratch([(3,)], torch.float32, CPU) as (inner,):
            inner.fill_(2)
        with scratch([(2,)], torch.float32, CPU) as (again,):
            assert again.data_ptr() == inner.data_ptr()
        assert outer.tolist() == [1] * 4 and kept_bytes() == 4 * 7
    with pytest.raises(ValueError, match="fails"), scratch([(4,)], torch.float32, CPU):
        raise ValueError("fails")
    with scratch([(4,)], torch.float32, CPU) as (after,):  # a block that failed is closed
        assert after.data_ptr() == outer.data_ptr()


def test_large_scratch_is_not_kept():
    forget()
    with scratch([(26,)], torch.float32, CPU, max_kept_bytes=100) as (large,):
        assert large.shape == (26,) and kept_bytes() == 0
    with scratch([(25,)], torch.float32, CPU, max_kept_bytes=100):
        assert kept_bytes() == 100


def test_made_in_inference_mode_it_serves_training():
    forget()
    with torch.inference_mode(), scratch([(4,)], torch.float32, CPU):
        pass
    with scratch([(4,)], torch.float32, CPU) as (x,):
        assert not x.is_inference()


@pytest.mark.parametrize("elements", [0, 7, 3 * 2**20 + 5])
def test_advice_about_pages_changes_nothing_else(elements):
    t = torch.arange(elements, dtype=torch.float32)
    assert on_huge_pages(t) is t and torch.equal(t, torch.arange(elements, dtype=torch.float32))


@pytest.mark.parametrize(
    "rows, copied",
    [
        (torch.arange(64.0).view(4, 16), False),
        (torch.arange(128.0).view(4, 32)[:, :16], False),
        (torch.arange(52.0).view(4, 13), True),  # depth
        (torch.arange(80.0).view(4, 20)[:, :16], True),  # stride
        (torch.arange(132.0)[1:65].view(4, 16), True),  # first row
        (torch.arange(64.0).view(16, 4).T, True),
        (torch.arange(16.0).expand(4, 16), True),
    ],
)
def test_aligned(rows, copied):
    out = aligned(rows, 16)
    assert (out.data_ptr() != rows.data_ptr()) == copied
    assert torch.equal(out[:, : rows.shape[1]], rows) and not out[:, rows.shape[1] :].any()
    assert out.shape[1] % 16 == 0 and out.stride(0) % 16 == 0 and out.stride(1) == 1 and out.data_ptr() % 16 == 0
