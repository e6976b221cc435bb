"""The first results of a run, beside chance."""

from betaclip.page.results import by_set, measures

VALUES = {
    "retrieval/images": 50.0, "retrieval/texts": 100.0, "retrieval/t2i_r1": 0.5, "retrieval/i2t_r1": 0.25,
    "choices/hard": 0.75, "choices/hard_conditioned": 0.5, "choices/hard_chance": 0.0909090936,
    "pointing/mass_in_box": 0.25, "pointing/box_share": 0.125, "leak/other_picture": 0.1, "leak/texts": 20.0,
}  # fmt: skip


def test_sets_and_runs():
    results = {"β-CLIP": {"a": 1.0}, "global loss only": {"a": 2.0}, "urban1k, β-CLIP": {"b": 3.0}}
    results |= {"β-CLIP (EMA)": {"a": 1.5}, "urban1k, β-CLIP (EMA)": {"b": 2.5}}
    assert by_set(results) == {
        "scenes": {"β-CLIP": {"a": 1.0}, "global loss only": {"a": 2.0}, "β-CLIP (EMA)": {"a": 1.5}},
        "urban1k": {"β-CLIP": {"b": 3.0}, "β-CLIP (EMA)": {"b": 2.5}},
    }


def test_measures():
    found = measures({"ours": VALUES, "other": {"retrieval/t2i_r1": 0.125}})
    values = [(measure.values, measure.chance) for measure in found]
    assert values == [
        ({"ours": 0.5, "other": 0.125}, 1 / 50),
        ({"ours": 0.25}, 1 / 50),  # of 100 texts each picture has 2
        ({"ours": 0.75}, 0.0909090936),
        ({"ours": 0.25}, 0.125),
        ({"ours": 0.1}, 1 / 20),
    ]
    assert [measure.chance_name for measure in found] == ["chance"] * 3 + ["if it were even", "chance"]
    assert found[2].title.endswith("hard choices") and "among 11 by" in found[2].note
    assert (
        measures({"ours": {"zero_shot/top1": 0.5, "zero_shot/classes": 4.0, "zero_shot/chance": 0.25}})[0].chance
        == 0.25
    )
    assert measures({"ours": {}}) == []
    several = measures({"ours": {"choices/all": 0.5, "choices/all_chance": 0.2857}})
    assert "among 4 or so" in several[0].note  # questions with different numbers of candidates
