"""The plan of packed texts: each distinct prefix is one node, each text is found in the tree, rows are fewest."""

import pickle
import random
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from betaclip.model.packing import MAX_BUCKETS, Packing, Rows, choose_buckets
from betaclip.model.texts import RaggedTexts

END = 70000  # beyond 16 bits


def random_texts(seed: int, images: int = 7, words: int = 3, longest: int = 9) -> list[list[list[int]]]:
    """Texts of few words, so that many begin alike and some are equal; some have one token, some images none."""
    rng = random.Random(seed)
    return [
        [[*rng.choices(range(words), k=rng.randrange(longest)), END] for _ in range(rng.randrange(6))]
        for _ in range(images)
    ]


CASES = {
    "shared": random_texts(0),
    "short": random_texts(1, words=2, longest=3),
    "unlike": random_texts(2, words=60000),
    "long": random_texts(3, longest=100),
    "one text": [[[1, 2, END]]],
    "one token": [[[END]]],
    "the same text": [[[0, 0, END]] * 3, [[0, 0, END]]],
    "one a prefix of another": [[[0, 1], [0, 1, 2], [0, 1, 2, 2], [0]]],
    "no texts": [[], []],
    "no images": [],
}


@pytest.fixture(params=CASES)
def texts(request) -> list[list[list[int]]]:
    return CASES[request.param]


def flat(texts: list[list[list[int]]]) -> list[tuple[int, ...]]:
    return [tuple(text) for image in texts for text in image]


def spelled(plan: Packing, nodes: list[int]) -> list[tuple[int, int]]:
    return list(zip(plan.positions[nodes].tolist(), plan.tokens[nodes].tolist(), strict=True))


def test_every_prefix_is_one_node(texts):
    plan = RaggedTexts.of(texts).packing
    prefixes = {text[:end] for text in flat(texts) for end in range(1, len(text) + 1)}
    assert len(plan.tokens) == len(plan.positions) == len(prefixes)
    paths = [tuple(path.tolist()) for path in plan.path.split(plan.lengths.tolist())]
    assert len({path[: i + 1] for path in paths for i in range(len(path))}) == len(prefixes)


def test_texts_are_found_in_the_tree(texts):
    plan = RaggedTexts.of(texts).packing
    paths = [path.tolist() for path in plan.path.split(plan.lengths.tolist())]
    assert len(paths) == len(set(flat(texts))) == len(plan.ends)
    assert plan.lengths.tolist() == sorted(plan.lengths.tolist())
    assert plan.ends.tolist() == [path[-1] for path in paths]
    found = [spelled(plan, paths[which]) for which in plan.distinct.tolist()]
    assert found == [list(enumerate(text)) for text in flat(texts)]


def check_rows(rows: Rows, nodes: int, exists: list[bool]) -> None:
    """``users`` are the rows that exist, by node; each node takes one of its own."""
    assert len(rows.node) == len(exists)
    assert sorted(rows.users.tolist()) == [row for row, real in enumerate(exists) if real]
    owner = np.repeat(np.arange(nodes), np.diff([*rows.starts.tolist(), len(rows.users)]))
    assert rows.node[rows.users].tolist() == owner.tolist()
    assert rows.node[rows.row].tolist() == list(range(nodes))
    assert set(rows.row.tolist()) <= set(rows.users.tolist())
    assert not nodes or 0 <= int(rows.node.min()) <= int(rows.node.max()) < nodes


def test_flat_rows(texts):
    plan = RaggedTexts.of(texts).packing
    check_rows(plan.flat_rows, len(plan.tokens), [True] * len(plan.path))
    assert plan.flat_rows.node.tolist() == plan.path.tolist()


def test_padded_rows(texts):
    """Bucket after bucket, text after text, each text's tokens first."""
    plan = RaggedTexts.of(texts).packing
    assert sum(bucket.num_texts for bucket in plan.buckets) == len(plan.lengths)
    lengths, paths = iter(plan.lengths.tolist()), iter(plan.path.split(plan.lengths.tolist()))
    exists, row = [], 0
    for count, longest in plan.buckets:
        for _ in range(count):
            length = next(lengths)
            exists += [i < length for i in range(longest)]
            assert plan.padded_rows.node[row : row + length].tolist() == next(paths).tolist()
            row += longest
    check_rows(plan.padded_rows, len(plan.tokens), exists)


def cost(lengths: list[int], ends: tuple[int, ...], call_rows: int) -> int:
    return sum((j - i) * lengths[j - 1] + call_rows for i, j in pairwise((0, *ends, len(lengths))))


@pytest.mark.parametrize("max_buckets", [1, 2, 3, 8])
@pytest.mark.parametrize("call_rows", [0, 5, 64])
@pytest.mark.parametrize("seed", range(4))
def test_buckets_are_the_cheapest(seed, call_rows, max_buckets):
    """Among all ways to cut ten texts into at most that many buckets."""
    rng = random.Random(seed)
    lengths = sorted(rng.choice([rng.randint(1, 7), rng.randint(1, 80)]) for _ in range(10))
    chosen = choose_buckets(np.array(lengths), max_buckets, call_rows)
    assert 1 <= len(chosen) <= max_buckets
    ends = np.cumsum([bucket.num_texts for bucket in chosen]).tolist()
    assert ends[-1] == 10 and [longest for _, longest in chosen] == [lengths[end - 1] for end in ends]
    cuts = [cut for count in range(max_buckets) for cut in combinations(range(1, 10), count)]
    best = min(cost(lengths, cut, call_rows) for cut in cuts)
    assert cost(lengths, tuple(ends[:-1]), call_rows) == best


def test_at_most_eight_buckets():
    chosen = choose_buckets(np.arange(1, 249))
    assert len(chosen) == MAX_BUCKETS == 8 and sum(bucket.num_texts for bucket in chosen) == 248


def test_plan_is_made_once_and_travels():
    """A data worker may make it; pickle, as the worker's queue does it, keeps it."""
    texts = RaggedTexts.of(CASES["shared"])
    assert texts.packing is texts.packing
    rows = texts.packing.padded_rows
    again = pickle.loads(pickle.dumps(texts))
    assert "packing" in vars(again) and "padded_rows" in vars(vars(again)["packing"])
    assert torch.equal(again.packing.padded_rows.users, rows.users)
