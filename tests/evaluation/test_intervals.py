"""Wilson's intervals against published ones, and the numbers behind shares."""

import pytest

from betaclip.evaluation.intervals import interval, number_behind, wilson

# Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3.
NEWCOMBE = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}


@pytest.mark.parametrize("counts", NEWCOMBE)
def test_published_values(counts):
    right, number = counts
    assert wilson(right / number, number) == pytest.approx(NEWCOMBE[counts], abs=5e-5)
    low, high = wilson(1 - right / number, number)
    assert (1 - high, 1 - low) == pytest.approx(NEWCOMBE[counts], abs=5e-5)


def test_bounds_are_shares():
    for number in (1, 3, 1e6):
        assert wilson(0, number)[0] == 0 and wilson(1, number)[1] == 1
        assert wilson(0, number)[1] == pytest.approx(1 - wilson(1, number)[0])


@pytest.mark.parametrize(
    "task, name, number",
    [
        ("retrieval", "t2i_r1", 50),
        ("retrieval", "conditioned_i2t_r10", 10),
        ("retrieval", "conditioned_top128_t2i_r5", 50),
        ("retrieval", "images", None),
        ("choices", "hard", 7),
        ("choices", "hard_conditioned", 7),
        ("choices", "hard_chance", None),
        ("choices", "hard_questions", None),
        ("zero_shot", "top5", 10),
        ("zero_shot", "mean_per_class", None),
        ("leak", "other_picture", 9),
        ("pointing", "mass_in_box", None),
    ],
)
def test_number_behind(task, name, number):
    values = {"texts": 50.0, "images": 10.0, "hard_questions": 7.0, "other_pictures": 9.0, name: 0.5}
    assert number_behind(task, name, values) == number
    assert interval(task, name, values) == (None if number is None else wilson(0.5, number))
