import json
import math

import pytest

from betaclip.evaluation.report import table, write_json

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
set      by                images  texts  left out  text to image R@1   R@5   R@10  image to text R@1   R@5   R@10
scenes   CLS                   20     20         0               10.0  50.0  100.0               10.0  50.0  100.0
scenes   text-conditioned      20     20         0                5.0  25.0   50.0                5.0  25.0   50.0
urban1k  CLS                  997    998         3               50.0  50.0   50.0               50.0  50.0   50.0

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


def test_json(tmp_path):
    file = tmp_path / "a" / "results.json"
    write_json(RESULTS, file)
    assert json.loads(file.read_text()) == RESULTS
    with pytest.raises(ValueError, match="JSON"):
        write_json({"scenes": {"x": math.nan}}, file)
