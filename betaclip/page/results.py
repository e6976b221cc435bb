"""The results of a run that a newcomer should see first, each beside chance and beside the other runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from betaclip.evaluation.report import Results

SCENES = "scenes"
# Joins a result's set and its run in results.json. Results on scenes have the run alone.
JOINT = ", "


@dataclass(frozen=True)
class Measure:
    """A quantity that was measured: its values by run, and the value that chance gives, as shares of 1."""

    title: str
    note: str
    values: dict[str, float]
    chance: float
    chance_name: str = "chance"


def by_set(results: Results) -> dict[str, dict[str, Mapping[str, float]]]:
    """The values by set, then by run."""
    sets: dict[str, dict[str, Mapping[str, float]]] = {}
    for name, values in results.items():
        found, joint, run = name.rpartition(JOINT)
        sets.setdefault(found if joint else SCENES, {})[run] = values
    return sets


def headlines(values: Mapping[str, float]) -> Iterator[tuple[str, str, str, float, str]]:
    """The names of the values to show first, each with a title, a note, and chance's value and name."""
    if "retrieval/images" in values:
        images, texts = values["retrieval/images"], values["retrieval/texts"]
        yield "retrieval/t2i_r1", "The picture of a caption", f"found first among {images:.0f}", 1 / images, "chance"
        # An image with m of the texts finds one of them with probability m / texts; the mean of m is texts / images.
        yield "retrieval/i2t_r1", "The caption of a picture", f"found first among {texts:.0f}", 1 / images, "chance"
    for key in values:
        task, _, name = key.partition("/")
        if task == "choices" and name.endswith("_chance"):
            kind, chance = name.removesuffix("_chance"), values[key]
            note = f"chosen among {1 / chance:.0f} or so by what its box shows"
            if abs(1 / chance - round(1 / chance)) < 1e-3:
                note = note.replace(" or so", "")
            yield f"choices/{kind}", f"The true text of a thing: {kind} choices", note, chance, "chance"
    if "zero_shot/top1" in values:
        note = f"by their names, among {values['zero_shot/classes']:.0f}"
        yield "zero_shot/top1", "Classes of pictures", note, values["zero_shot/chance"], "chance"
    if "pointing/mass_in_box" in values:
        note = "of a phrase inside the box of what it names"
        yield "pointing/mass_in_box", "Attention", note, values["pointing/box_share"], "if it were even"
    if "leak/other_picture" in values:
        note = "texts that are identified from what they pool from another picture; lower is better"
        yield "leak/other_picture", "Leak", note, 1 / values["leak/texts"], "chance"


def measures(runs: Mapping[str, Mapping[str, float]]) -> list[Measure]:
    """The first values of a set, whose results are given by run."""
    first = next(iter(runs.values()))
    return [
        Measure(title, note, {run: v[key] for run, v in runs.items() if key in v}, chance, chance_name)
        for key, title, note, chance, chance_name in headlines(first)
    ]
