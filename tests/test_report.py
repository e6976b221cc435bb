"""``betaclip report`` for runs in every state. The page itself is tested in tests/page."""

import json
from pathlib import Path

import pytest
from support import colours

from betaclip import report
from betaclip.cli import main
from betaclip.data.registry import DataConfig
from betaclip.settings import to_toml
from betaclip.train import TrainConfig, TrainEvaluationConfig

METRICS = '{"step": 10, "loss": 2.5, "epoch": 0.5}\n'


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run of the colour model that has come to its end, with that of its comparison."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "load_checkpoint", lambda folder, device: colours.ColourModel().eval())
    folder = Path("runs", "a")
    (folder / "global_only").mkdir(parents=True)
    config = TrainConfig(evaluation=TrainEvaluationConfig(scenes=2))
    (folder / "config.toml").write_text(to_toml(config))
    for one in (folder, folder / "global_only"):
        (one / "metrics.jsonl").write_text(METRICS)
    results = {"leak/own_picture": 0.875, "leak/other_picture": 0.625, "leak/texts": 16.0}
    (folder / "results.json").write_text(json.dumps({"β-CLIP": results, "global loss only": results}))
    return folder


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["report", *arguments, "--device", "cpu"])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith("betaclip report: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize("name", ["a", "runs/a"])
def test_by_name_and_by_folder(run, name, capsys):
    main(["report", name, "--device", "cpu"])
    assert capsys.readouterr().out == "wrote runs/a/report.html; open it in a browser\n"
    page = (run / "report.html").read_text("utf-8")
    for part in ("results", "pictures", "mistakes", "curves", "settings"):
        assert f'<section id="{part}">' in page
    assert "62.5 %" in page and "loss, global loss only" in page


def test_out(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    main(["report", "a", "--device", "cpu", "--out", str(out)])
    assert out.exists() and not (run / "report.html").exists()
    with pytest.raises(SystemExit) as stopped:
        main(["report", "a", "--device", "cpu", "--out", str(out / "page.html")])
    assert stopped.value.code == 1 and "cannot be written" in capsys.readouterr().err


@pytest.fixture
def no_checkpoint(monkeypatch):
    def none(folder, device):
        raise FileNotFoundError(f"{folder}: no checkpoint_*.pt in this folder")

    monkeypatch.setattr(report, "load_checkpoint", none)


def test_a_run_that_was_stopped(run, no_checkpoint):
    """Before its first checkpoint, and before there were results: curves alone."""
    (run / "results.json").unlink()
    main(["report", "a", "--device", "cpu"])
    page = (run / "report.html").read_text("utf-8")
    assert [part in page for part in ('id="curves"', 'id="results"', 'id="pictures"')] == [True, False, False]


def test_nothing_is_there(run, no_checkpoint, capsys):
    assert "expected the folder of a run, or the name of one in runs/, got b" in fails(capsys, "b")
    Path("empty").mkdir()
    assert "empty holds no run: it has no config.toml" in fails(capsys, "empty")
    assert "got the file runs/a/metrics.jsonl; it may be in runs/a" in fails(capsys, str(run / "metrics.jsonl"))
    (run / "metrics.jsonl").write_text("")
    assert "runs/a has logged nothing yet, and has no checkpoint" in fails(capsys, "a")


def test_damaged_files(run, capsys, monkeypatch):
    for content in ("{", "[]", '{"a": 3}', '{"a": {"b": "c"}}'):
        (run / "results.json").write_text(content)
        assert "runs/a/results.json: expected what betaclip train writes there" in fails(capsys, "a")
    (run / "config.toml").write_text("[run]\nstep = 3\n")
    assert "config.toml: unknown key 'run.step'; the nearest is 'run.steps'" in fails(capsys, "a")


def test_data_that_are_gone_are_left_out(run, capsys, caplog):
    """The curves and the results stay, and warnings say what is missing."""
    config = TrainConfig(data=DataConfig(kind="pairs", annotations=Path("gone")),
                         evaluation=TrainEvaluationConfig(fg_ovd=Path("lost")))  # fmt: skip
    (run / "config.toml").write_text(to_toml(config))
    main(["report", "a", "--device", "cpu"])
    page = (run / "report.html").read_text("utf-8")
    assert [part in page for part in ('id="curves"', 'id="results"', 'id="pictures"')] == [True, True, False]
    assert "left out the choices: evaluation: " in caplog.text and "left out the pictures: data: " in caplog.text
