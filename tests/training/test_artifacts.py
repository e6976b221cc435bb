import json

from PIL import Image

from betaclip.training.artifacts import write_curves


def test_curves(tmp_path):
    """Of runs with other columns, evaluations between the steps, and one that has logged nothing."""
    rows = [{"step": s, "loss": 9 / s, "beta_cal_loss": 4 / s, "norm_pool": 0.1, "lr_pool": 1e-3} for s in (1, 2, 3)]
    runs = {"a": rows, "b": [{"step": 1, "loss": 3.0}, {"step": 1, "scenes/choices/hard": 0.5}], "c": []}
    for name, some in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    write_curves({name: tmp_path / name for name in runs}, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        colours = image.convert("RGB").getcolors(2**24)
    assert image.size == (1320, 840) and colours is not None and len(colours) > 50
