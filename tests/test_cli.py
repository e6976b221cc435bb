import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import forkserver

import betaclip
from betaclip import checkpoint, train
from betaclip.cli import main
from betaclip.files import lock_folder
from betaclip.model.beta_clip import create_model
from betaclip.published import load_published
from betaclip.settings import config_path, read
from betaclip.train import TrainConfig

MODEL = json.dumps(
    {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }
)
TINY = f"""
[model]
name = '{MODEL}'
pool_heads = 1
[data]
scenes = 12
[optimizer.backbone]
warmup = 1
[optimizer.pool]
warmup = 1
[run]
steps = 2
batch_size = 4
workers = 0
[evaluation]
scenes = 4
"""


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == code
    return capsys.readouterr().err


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    return ["train", "--config", str(tmp_path / "tiny.toml"), "--run.folder", str(tmp_path), "--run.name", "a"]


def test_train_and_what_follows(tiny, tmp_path, capsys):
    """A file overrides defaults, an option the file; the run, its comparison run, and all their files exist, and other
    commands take its checkpoint."""
    main([*tiny, "--run.steps", "3", "--optimizer.pool.lr", "0.5"])
    out = capsys.readouterr().out
    saved = read(TrainConfig(), tmp_path / "a" / "config.toml")
    assert (saved.run.steps, saved.run.batch_size, saved.optimizer.pool.lr) == (3, 4, 0.5)
    assert saved.run.keep == TrainConfig().run.keep and saved.model.name == MODEL
    for folder in (tmp_path / "a", tmp_path / "a" / "global_only"):
        names = {path.name for path in folder.iterdir()}
        assert {"config.toml", "metrics.jsonl", "checkpoint_00000003.pt", "attention"} <= names
        assert len(list((folder / "attention").glob("*.png"))) == 6
    assert (tmp_path / "a" / "curves.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert set(results) == {"β-CLIP", "global loss only"}
    assert {"choices/hard", "pointing/mass_in_box"} <= results["β-CLIP"].keys()
    table = out[out.rindex("Choices") :]
    assert "β-CLIP" in table and "global loss only" in table
    assert out.endswith(f"open {tmp_path}/a/report.html in a browser\n")
    main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "again.html")])
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "a" / "report.html").read_bytes()
    main(["evaluate", str(tmp_path / "a"), "--scenes", "4", "--no-conditioned"])
    assert "Choices" in capsys.readouterr().out
    picture = str(next((tmp_path / "a" / "attention").glob("*.png")))
    main(["visualize", str(tmp_path / "a"), picture, "a red ring", "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").exists()


@pytest.fixture
def twenty(tmp_path):
    """Twenty pictures in a folder, each with a text file beside it, and JSON lines about them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i in range(20):
        Image.new("RGB", (40, 30), (12 * i, 90, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"A cat sits on {i} mats. A dog sleeps.")
        rows.append({"image": f"pictures/{i}.png", "captions": [f"A cat sits on {i} mats.", f"A dog has {i} balls."]})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_twenty_pictures_train(tiny, twenty, capsys, monkeypatch):
    monkeypatch.setattr(train, "write_curves", lambda *_: None)  # slow, and tested above
    data = ["--data.kind", "pairs", "--data.annotations", str(twenty / "pictures"), "--data.test-rows", "5"]
    evaluation = ["--evaluation.pairs", str(twenty / "pictures"), "--evaluation.pairs-rows", "5"]
    main([*tiny, *data, "--data.phrase-extractor", "rules", *evaluation, "--run.no-tensorboard"])
    assert "Pictures that were left out of the training." in (twenty / "a" / "report.html").read_text("utf-8")
    results = json.loads((twenty / "a" / "results.json").read_text())
    assert results["pairs, β-CLIP"]["retrieval/images"] == 5
    rest = ["--run.name", "b", "--data.kind", "pairs", "--data.annotations", "nowhere.csv"]
    message = fails(capsys, *tiny, *rest)
    assert message == "betaclip train: data: annotations: nowhere.csv is not a file\n"


def test_a_mixture_trains_and_goes_on(tiny, twenty, capsys, monkeypatch):
    """The sets are in the file, an option changes one of them; the resumed run is the uninterrupted one."""
    for slow in ("write_curves", "write_page"):
        monkeypatch.setattr(train, slow, lambda *_: None)
    common = 'kind = "pairs"\nphrase_extractor = "rules"\n'
    mixture = f"""
[data]
kind = "mixture"
[data.mixture.folder]
{common}annotations = "{twenty}/pictures"
[data.mixture.lines]
{common}annotations = "{twenty}/captions.jsonl"
"""
    file = twenty / "tiny.toml"
    file.write_text(file.read_text().replace("[data]\nscenes = 12\n", mixture).replace("scenes = 4", ""))
    run = [*tiny, "--run.steps", "3", "--run.checkpoint-every", "1", "--run.keep", "9", "--run.no-tensorboard"]
    weight = ["--data.mixture.lines.weight", "3"]
    main([*run, *weight])
    assert read(TrainConfig(), twenty / "a" / "config.toml").data.mixture["lines"].weight == 3
    last = twenty / "a" / "checkpoint_00000003.pt"
    whole = checkpoint.read(last)
    last.unlink()
    message = fails(capsys, *run, "--run.resume")
    assert "run.resume: data.mixture.lines.weight: 3.0 -> 1.0 since the checkpoint, which makes it another" in message
    main([*run, *weight, "--run.resume"])
    assert all(torch.equal(whole["model"][name], value) for name, value in checkpoint.read(last)["model"].items())


def test_adapters_and_averages(tiny, tmp_path, capsys, monkeypatch):
    """Every command takes a run's adapters merged, and the average of its weights unless it is told otherwise."""
    pytest.importorskip("peft", reason="needs peft, of the extra 'test'")
    monkeypatch.setattr(train, "PICTURES", 1)
    published = ["--model.context-length", "248", "--model.quick-gelu", "--model.no-pool-norm-inputs"]
    trained = ["--lora.rank", "2", "--lora.targets", "out_proj", "c_fc", "--optimizer.ema-decay", "0.5"]
    main([*tiny, *published, *trained, "--optimizer.layer-decay", "0.8", "--run.compare-global", "False"])
    monkeypatch.setitem(sys.modules, "peft", None)  # only training needs it
    run = str(tmp_path / "a")
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert set(results) == {"β-CLIP", "β-CLIP, EMA"}
    raw, average, chosen = (betaclip.load(run, weights=weights).model for weights in ("raw", "ema", "auto"))
    assert not raw.averaged and average.averaged and chosen.averaged
    layer = "clip.visual.transformer.resblocks.0.attn.out_proj.weight"
    for name in (layer, "pool.mlp.c_fc.weight"):
        states = [model.state_dict()[name] for model in (raw, average, chosen)]
        assert torch.equal(states[1], states[2]) and not torch.equal(states[0], states[1])
    capsys.readouterr()
    for options, name in (([], "β-CLIP, EMA"), (["--weights", "raw"], "β-CLIP")):
        main(["evaluate", run, "--scenes", "4", "--no-conditioned", "--output", str(tmp_path / "x.json"), *options])
        assert (checkpoint.AVERAGED in capsys.readouterr().out) is (not options)
        found = json.loads((tmp_path / "x.json").read_text())["scenes"]
        assert found["pointing/mass_in_box"] == pytest.approx(results[name]["pointing/mass_in_box"])
    main(["export", run, str(tmp_path / "x.safetensors"), "--to", "published"])
    exported = load_published(tmp_path / "x.safetensors", head_width=8, pool_heads=1)
    started = create_model(replace(average.config, pretrained=str(checkpoint.latest(tmp_path / "a"))))
    for other in (exported, started):
        assert all(torch.equal(tensor, average.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_no_comparison(tiny, tmp_path):
    options = ["--run.compare-global", "False", "--run.steps", "1", "--evaluation.scenes", "0"]
    main([*tiny, *options, "--optimizer.backbone.warmup", "0", "--optimizer.pool.warmup", "0"])
    assert not (tmp_path / "a" / "global_only").exists()


def test_errors_are_one_line(tiny, tmp_path, capsys):
    assert fails(capsys, "trian") == "betaclip: no command 'trian'; the nearest is 'train'\n"
    assert "nowhere.toml: No such file" in fails(capsys, "train", "--config", "nowhere.toml")
    for options, message in (
        (["--run.chunk-tokens", "0"], "run.chunk_tokens: expected at least 1, got 0"),
        (["--lock.image", "--lock.image-unlocked-groups", "9"], "lock.image_unlocked_groups: expected 0 to 3"),
        (["--lora.rank", "2", "--lora.targets", "attn"], "lora.targets: expected names of linear layers"),
        (["--optimizer.layer-decay", "2"], "optimizer.layer_decay: expected above 0 and at most 1, got 2"),
        (["--optimizer.ema-decay", "nan"], "optimizer.ema_decay: expected above 0 and below 1, got nan"),
    ):
        error = fails(capsys, *tiny, *options)
        assert error.startswith(f"betaclip train: {message}") and error.count("\n") == 1
    assert "--config: expected a file" in fails(capsys, "train", "--config")
    (tmp_path / "odd.toml").write_text("[run]\nbatchsize = 3\n")
    message = fails(capsys, "train", f"--config={tmp_path / 'odd.toml'}")
    assert message.endswith("odd.toml: unknown key 'run.batchsize'; the nearest is 'run.batch_size'\n")
    message = fails(capsys, *tiny, "--data.kind", "sharegpt4v")
    assert message == "betaclip train: data: annotations: kind 'sharegpt4v' needs the file of the captions\n"
    folder, file = str(tmp_path / "no"), str(tmp_path / "no.json")
    message = fails(capsys, *tiny, "--data.kind", "sharegpt4v", "--data.root", folder, "--data.annotations", file)
    assert message.startswith("betaclip train: data: ") and "no" in message and message.count("\n") == 1
    message = fails(capsys, *tiny, "--model.name", "ViT-B-61")
    assert "model: name: expected scenes, JSON, or a model of open_clip, got 'ViT-B-61'; the nearest are " in message
    assert "device: expected auto or cpu, as no CUDA device" in fails(capsys, *tiny, "--run.device", "cuda:99")
    assert "nowhere.json" in fails(capsys, "prepare", "--annotations", "nowhere.json", "--out", str(tmp_path / "x"))
    assert "no such file" in fails(capsys, "evaluate", str(tmp_path / "no.pt"), "--scenes", "3")


def test_folder_of_another_run(tiny, tmp_path, capsys):
    """A run that is at work keeps its folder to itself; one that has ended is resumed or left alone."""
    with lock_folder(tmp_path / "a"):
        message = fails(capsys, *tiny, "--run.resume")
    assert message.startswith(f"betaclip train: {tmp_path}/a is in use by process {os.getpid()}: wait for it")
    assert message.count("\n") == 1
    (tmp_path / "a" / "metrics.jsonl").touch()
    message = fails(capsys, *tiny)
    assert "a already holds a run (metrics.jsonl); give --run.resume to continue it, or another name" in message
    assert {path.name for path in (tmp_path / "a").iterdir()} == {".lock", "metrics.jsonl"}


def test_run_folder_that_cannot_be_written(tiny, tmp_path, capsys):
    (tmp_path / "a").touch()
    message = fails(capsys, *tiny, code=1)
    assert message == f"betaclip train: {tmp_path}/a: cannot be written: File exists\n"


def test_signal(tiny, tmp_path):
    """The command saves, says so in one line, and exits with the signal's code, workers and all."""
    options = ["--run.steps", "100000", "--run.log-every", "1", "--run.workers", "1"]
    run = forkserver.start(tmp_path, main, [*tiny, *options])
    metrics = tmp_path / "a" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert run.is_alive()
        time.sleep(0.1)
    os.kill(run.pid, signal.SIGHUP)
    run.join(forkserver.HANG_S)
    message = (tmp_path / "stderr").read_text()
    assert run.exitcode == 128 + signal.SIGHUP
    assert "betaclip train: stopped by SIGHUP after step" in message and "Traceback" not in message
    assert len(list((tmp_path / "a").glob("checkpoint_*.pt"))) == 1


def test_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    message = fails(capsys, "train", code=1)
    assert message == "betaclip train: the package tyro is missing: pip install 'betaclip[train]'\n"


def test_env(capsys):
    main(["env"])
    assert capsys.readouterr().out.startswith("versions\n  betaclip ")
    assert fails(capsys, "env", "--all") == "betaclip env: expected no arguments, got --all\n"
    main(["env", "--help"])
    assert "for a bug report" in capsys.readouterr().out


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"betaclip {betaclip.__version__}\n"


def without_reader(*arguments: str) -> None:
    """The command, where the reader is gone before anything is written."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.close(write)
    main(list(arguments))


@pytest.mark.parametrize("arguments", [["env"], ["train", "--help"]])
def test_reader_that_leaves(tmp_path, arguments):
    """As in ``betaclip env | head -n 1``: no traceback."""
    done = forkserver.run(tmp_path, without_reader, *arguments)
    assert done.stderr == ""


def test_recipe_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for form in ("ce", "bce"):
        config = read(TrainConfig(), config_path(f"vit_b16_sharegpt4v_{form}"))
        assert config.model.name == "ViT-B-16" and config.loss.form == form
    message = fails(capsys, "train", "--config", "vit")
    assert (
        "expected a TOML file or one of flair, scenes, vit_b16_sharegpt4v_bce, vit_b16_sharegpt4v_ce, " in message
        and "got 'vit'" in message
    )
    (tmp_path / "scenes").write_text("")  # a file goes before a recipe
    assert config_path("scenes") == Path("scenes")


def test_help_is_light():
    """Help imports no more than the package itself does."""
    code = "import sys; from betaclip.cli import main; main(['--help']); "
    code += "print({'tyro', 'open_clip', 'torch._dynamo'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("usage: betaclip COMMAND") and "  prepare" in out and out.endswith("set()\n")
