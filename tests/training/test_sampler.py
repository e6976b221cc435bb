from collections import Counter

import pytest
import torch

from betaclip.training.sampler import BatchSampler, mix


def drawn(first: int, last: int, rank: int = 0, ranks: int = 1, seed: int = 5) -> list[list]:
    return list(BatchSampler(11, 4, seed, first, last, rank, ranks))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_epoch_draws_every_image_once(ranks):
    per_rank = [drawn(0, 6, rank, ranks) for rank in range(ranks)]
    for epoch in (0, 1):
        draws = [d for batches in per_rank for batch in batches[3 * epoch : 3 * epoch + 3] for d in batch]
        assert Counter(d.index for d in draws) == Counter(range(11))
    sizes = [[len(batches[step]) for batches in per_rank] for step in range(6)]
    assert [sum(s) for s in sizes] == [4, 4, 3] * 2
    assert all(max(s) - min(s) <= 1 for s in sizes)


def test_ranks_share_one_order():
    whole = drawn(0, 6)
    for ranks in (2, 3):
        per_rank = [drawn(0, 6, rank, ranks) for rank in range(ranks)]
        assert [[d for batches in per_rank for d in batches[step]] for step in range(6)] == whole


def test_goes_on_from_any_step():
    whole = drawn(0, 9)
    for step in range(9):
        assert drawn(step, 9) == whole[step:]


def test_seeds():
    epochs = [[d for batch in drawn(3 * e, 3 * e + 3) for d in batch] for e in range(2)]
    other = [d for batch in drawn(0, 3, seed=6) for d in batch]
    assert [d.index for d in epochs[0]] != [d.index for d in epochs[1]]
    assert [d.index for d in epochs[0]] != [d.index for d in other]
    assert len({d.seed for d in [*epochs[0], *epochs[1], *other]}) == 33
    assert mix(1, 2) == 5934340693050249675 != mix(2, 1)  # for good: a run's data must not change with a version
    assert 0 <= min(mix(-i) for i in range(100))


def test_images():
    sampler = BatchSampler(11, 4, 0, 2, 8, 1, 3)
    assert len(sampler) == 6 == len(list(sampler))
    assert [sampler.images(step) for step in range(6)] == [4, 4, 3, 4, 4, 3]


def test_rejects():
    with pytest.raises(ValueError, match="length, batch_size: expected at least 1, got 0 and 4"):
        BatchSampler(0, 4, 0, 0, 1)


def test_any_default_device():
    expected = drawn(0, 6)
    torch.set_default_device("meta")
    try:
        assert drawn(0, 6) == expected
    finally:
        torch.set_default_device(None)
