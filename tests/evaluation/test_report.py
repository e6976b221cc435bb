import csv
import json
import math

import pytest

from betaclip.evaluation.intervals import wilson
from betaclip.evaluation.report import FORMATS, OWN_TEXT_NOTE, table, write_json, write_results

RECALLS = {f"{direction}_r{k}": k / 10 for direction in ("t2i", "i2t") for k in (1, 5, 10)}
RESULTS = {
    "scenes": {
        "retrieval/images": 20.0,
        "retrieval/texts": 20.0,
        "retrieval/left_out": 0.0,
        **{f"retrieval/{name}": value for name, value in RECALLS.items()},
        **{f"retrieval/conditioned_{name}": value / 2 for name, value in RECALLS.items()},
        "choices/hard": 0.305,
        "choices/hard_conditioned": 0.25,
        "choices/hard_chance": 1 / 11,
        "choices/hard_questions": 200.0,
        "choices/hard_left_out": 0.0,
        "pointing/mass_in_box": 0.52,
        "pointing/box_share": 0.104,
        "pointing/ratio": 5.0,
        "pointing/phrases": 1234.0,
        "leak/own_picture": 0.95,
        "leak/other_picture": 0.64,
        "leak/own_pictures": 160.0,
        "leak/other_pictures": 150.0,
        "leak/texts": 169.0,
    },
    "urban1k": {
        "retrieval/images": 997.0,
        "retrieval/texts": 998.0,
        "retrieval/left_out": 3.0,
        **{f"retrieval/{name}": 0.5 for name in RECALLS},
    },
    "zero_shot": {
        "zero_shot/top1": 0.683,
        "zero_shot/top5": 0.919,
        "zero_shot/mean_per_class": 0.68,
        "zero_shot/chance": 0.001,
        "zero_shot/classes": 1000.0,
        "zero_shot/images": 49999.0,
        "zero_shot/left_out": 1.0,
    },
}

TABLE = """\
Retrieval, %
set      by                      images  texts  left out  text to image R@1   R@5   R@10  image to text R@1   R@5   R@10
scenes   CLS                         20     20         0               10.0  50.0  100.0               10.0  50.0  100.0
scenes   conditioned, all pairs      20     20         0                5.0  25.0   50.0                5.0  25.0   50.0
urban1k  CLS                        997    998         3               50.0  50.0   50.0               50.0  50.0   50.0

Choices, % right
set     questions of  number  left out  by region  text-conditioned  chance
scenes  hard             200         0       30.5              25.0     9.1

Zero-shot classification, %
set        classes  images  left out  top 1  top 5  top 1, mean of the classes  chance
zero_shot     1000   49999         1   68.3   91.9                        68.0     0.1

Pointing, % of the attention of a phrase that is in its box
set     phrases  in the box  box's share of the picture  ratio
scenes     1234        52.0                        10.4   5.00

Leak, % of texts identified from what they pool from a picture
set     texts  own picture  another picture  chance
scenes    169         95.0             64.0     0.6"""


def test_table():
    assert table(RESULTS) == TABLE
    assert table({"urban1k": RESULTS["urban1k"]}).count("\n\n") == 0


def words(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_ways_of_conditioning():
    """Each is named, and what is not comparable is said to be."""
    ways = {
        f"retrieval/{way}{name}": 0.25 for way in ("conditioned_own_text_", "conditioned_top128_") for name in RECALLS
    }
    lines = words(table({"urban1k": RESULTS["urban1k"] | ways}))
    assert "urban1k conditioned, top 128 997 998 3 25.0 25.0 25.0 25.0 25.0 25.0" in lines
    assert "urban1k conditioned, own text 997 998 3 25.0 25.0 25.0 25.0 25.0 25.0" in lines
    assert not any("all pairs" in line for line in lines) and lines[-1] == OWN_TEXT_NOTE
    assert OWN_TEXT_NOTE not in table(RESULTS)


def test_a_model_without_pooling():
    """Beside one with it: what it has no value of is a dash, and columns of numbers stay aligned to the right."""
    plain = {name: value for name, value in RESULTS["scenes"].items() if "conditioned" not in name}
    lines = table({"scenes": RESULTS["scenes"], "scenes, ViT-B-16 openai": plain}).splitlines()
    choices = lines[lines.index("Choices, % right") + 1 :][:3]
    assert choices[2].split()[-3:] == ["30.5", "-", "9.1"]
    assert choices[1].index("25.0") + 4 == choices[2].index(" - ") + 2


def test_intervals():
    shown = table(RESULTS, intervals=True)
    assert "scenes hard 200 0 30.5 (24.5–37.2) 25.0 (19.5–31.4) 9.1" in words(shown)
    assert "zero_shot 1000 49999 1 68.3 (67.9–68.7) 91.9 (91.7–92.1) 68.0 0.1" in words(shown)
    assert "Choices, % right, with 95 % intervals (Wilson)" in shown


def test_json(tmp_path):
    file = tmp_path / "a" / "results.json"
    write_json(RESULTS, file)
    assert json.loads(file.read_text()) == RESULTS
    with pytest.raises(ValueError, match="JSON"):
        write_json({"scenes": {"x": math.nan}}, file)


def test_files(tmp_path):
    for suffix in FORMATS:
        write_results(RESULTS, tmp_path / f"new/results{suffix}")
    content = json.loads((tmp_path / "new/results.json").read_text())
    assert all(content[name].items() >= values.items() for name, values in RESULTS.items())
    low, high = wilson(0.305, 200)
    found = content["scenes"]
    assert (found["choices/hard_low"], found["choices/hard_high"]) == (low, high)
    assert "choices/hard_chance_low" not in found and "retrieval/images_low" not in found
    with (tmp_path / "new/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(map(len, RESULTS.values()))
    assert {"set": "scenes", "task": "choices", "measure": "hard", "value": "0.305", "low": str(low),
            "high": str(high), "number": "200"} in rows  # fmt: skip
    assert [row["low"] for row in rows if row["measure"] == "ratio"] == [""]
    lines = (tmp_path / "new/results.md").read_text().splitlines()
    assert "| scenes | hard | 200 | 0 | 30.5 (24.5–37.2) | 25.0 (19.5–31.4) | 9.1 |" in lines
    assert "|---|---|---:|---:|---:|---:|---:|" in lines
    write_results({"a|b": RESULTS["urban1k"]}, tmp_path / "x.md")
    assert "| a\\|b | CLS |" in (tmp_path / "x.md").read_text()
