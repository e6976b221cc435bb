import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from support import forkserver

import betaclip
from betaclip import checkpoint, train
from betaclip.arguments import _options
from betaclip.cli import COMMANDS, main
from betaclip.files import lock_folder
from betaclip.model.beta_clip import create_model
from betaclip.published import load_published
from betaclip.settings import config_path, read, to_dict
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
    assert f"\n{tmp_path}/a/report.html: a page about this run, to open in a browser\n" in out
    main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "again.html")])
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "a" / "report.html").read_bytes()
    main(["evaluate", str(tmp_path / "a"), "--scenes", "4", "--no-conditioned"])
    assert "Choices" in capsys.readouterr().out
    picture = str(next((tmp_path / "a" / "attention").glob("*.png")))
    main(["visualize", str(tmp_path / "a"), picture, "a red ring", "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").exists()


def test_smoke(tmp_path, capsys, monkeypatch):
    """The preset shows everything: what the run says before, during and after, and all of it in its log file; the files
    that it names are there, and the weights alone do all that a checkpoint does."""
    monkeypatch.setattr(train, "write_curves", lambda _, file: file.touch())  # both are slow, and tested above
    monkeypatch.setattr(train, "attention_figure", lambda *_: Figure((1, 1)))
    run, smoke = tmp_path / "a", ["train", "--smoke", "--model.name", MODEL, "--model.pool-heads", "1"]
    main([*smoke, "--run.folder", str(tmp_path), "--run.name", "a", "--run.workers", "0"])
    out = capsys.readouterr().out
    first, rest = out.split(f"run: {run}/global_only")
    for words in (
        f"run: {run}; config.toml has its settings", "device: cpu", "vision tower", "text tower", "pooling block",
        "data: scenes, 96 samples; 12 updates of 8 images, 1 epochs", "tokens per step", "step 4/12", " to go",
        "step 6/12, evaluated", "step 12/12",
    ):  # fmt: skip
        assert words in first, words
    log = (run / "log.txt").read_text()
    assert log.startswith(first) and log.endswith(rest[rest.index("Retrieval, %", rest.index("step 12/12")) :])
    named = [Path(line.partition(": ")[0]) for line in log[log.rindex(f"{run}/model.safetensors") :].splitlines()]
    assert [place.name for place in named[:-1]] == [
        "model.safetensors", "checkpoint_*.pt", "results.json", "curves.png", "scene_0.png", "log.txt"
    ]  # fmt: skip
    assert all(place.exists() or list(place.parent.glob(place.name)) for place in named[:-1])
    assert str(named[-1]) == f"tensorboard --logdir {run}" and list(run.glob("events.out.tfevents.*"))

    whole = checkpoint.load_checkpoint(run).state_dict()
    for file in run.glob("checkpoint_*.pt"):
        file.unlink()
    for place in (run, run / "model.safetensors"):
        weights = checkpoint.load_checkpoint(place).state_dict()
        assert all(torch.equal(whole[name], weights[name]) for name in whole)
        assert betaclip.load(place).encode_text("a red ring").shape == (1, 8)
    main(["evaluate", str(run / "model.safetensors"), "--scenes", "4", "--no-conditioned"])
    assert "Choices" in capsys.readouterr().out
    message = fails(capsys, "export", str(run), str(tmp_path / "b.safetensors"), "--to", "published")
    assert "positions are not stretched" in message  # it has read the weights


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
    monkeypatch.setattr(train, "write_curves", lambda *_: None)  # both are slow, and tested above
    monkeypatch.setattr(train, "attention_figure", lambda *_: Figure((1, 1)))
    published = ["--model.context-length", "248", "--model.quick-gelu", "--model.no-pool-norm-inputs"]
    trained = ["--lora.rank", "2", "--lora.targets", "out_proj", "c_fc", "--optimizer.ema-decay", "0.5"]
    main([*tiny, *published, *trained, "--optimizer.layer-decay", "0.8", "--run.no-compare-global"])
    monkeypatch.setitem(sys.modules, "peft", None)  # only training needs it
    run = str(tmp_path / "a")
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert set(results) == {"β-CLIP", "β-CLIP (EMA)"} and not (tmp_path / "a" / "global_only").exists()
    raw, average, chosen = (betaclip.load(run, weights=weights).model for weights in ("raw", "ema", "auto"))
    assert not raw.averaged and average.averaged and chosen.averaged
    layer = "clip.visual.transformer.resblocks.0.attn.out_proj.weight"
    for name in (layer, "pool.mlp.c_fc.weight"):
        states = [model.state_dict()[name] for model in (raw, average, chosen)]
        assert torch.equal(states[1], states[2]) and not torch.equal(states[0], states[1])
    capsys.readouterr()
    for options, name in (([], "β-CLIP (EMA)"), (["--weights", "raw"], "β-CLIP")):
        main(["evaluate", run, "--scenes", "4", "--no-conditioned", "--output", str(tmp_path / "x.json"), *options])
        assert (checkpoint.AVERAGED in capsys.readouterr().out) is (not options)
        found = json.loads((tmp_path / "x.json").read_text())["scenes"]
        assert found["pointing/mass_in_box"] == pytest.approx(results[name]["pointing/mass_in_box"])
    main(["export", run, str(tmp_path / "x.safetensors"), "--to", "published"])
    exported = load_published(tmp_path / "x.safetensors", head_width=8, pool_heads=1)
    started = create_model(replace(average.config, pretrained=str(checkpoint.latest(tmp_path / "a"))))
    for other in (exported, started):
        assert all(torch.equal(tensor, average.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_errors_are_one_line(tiny, tmp_path, capsys):
    assert fails(capsys, "trian") == "betaclip: no command 'trian'; the nearest is 'train'\n"
    assert "nowhere.toml: No such file" in fails(capsys, "train", "--config", "nowhere.toml")
    for options, message in (
        (["--run.chunk-tokens", "0"], "run.chunk_tokens: expected at least 1, got 0"),
        (["--lock.image", "--lock.image-unlocked-groups", "9"], "lock.image_unlocked_groups: expected 0 to 3"),
        (["--lora.rank", "2", "--lora.targets", "attn"], "lora.targets: expected names of linear layers"),
        (["--optimizer.layer-decay", "2"], "optimizer.layer_decay: expected more than 0 and at most 1, got 2"),
        (["--optimizer.ema-decay", "nan"], "optimizer.ema_decay: expected a finite number, got nan"),
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
    assert "device: expected auto or cpu, as no CUDA device" in fails(capsys, *tiny, "--run.device", "cuda:99")
    assert "nowhere.json" in fails(capsys, "prepare", "--annotations", "nowhere.json", "--out", str(tmp_path / "x"))
    assert "no such file" in fails(capsys, "evaluate", str(tmp_path / "no.pt"), "--scenes", "3")


RECIPE = ["train", "--config", "vit_b16_sharegpt4v_ce", "--run.precision", "fp32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss.beta", "-1"], "loss.beta: expected at least 0, got -1.0"),
        (["--loss.beta", "nan"], "loss.beta: expected a finite number, got nan"),
        (["--loss.alpha", "inf"], "loss.alpha: expected a finite number, got inf"),
        (["--loss.beta", "much"], "--loss.beta: expected a number, got 'much'"),
        (["--loss.global-weight", "-3"], "loss.global_weight: expected at least 0, got -3.0"),
        (["--loss.weights", "conditioned", "nan"], "loss.weights.conditioned: expected a finite number, got nan"),
        (["--loss.weights", "conditoned", "1"],
         "loss.weights: expected one of global, beta_cal, conditioned, multi_positive, text_conditioned, "
         "got 'conditoned'; the nearest is 'conditioned'"),
        (["--loss.form", "cf"], "--loss.form: expected one of ce, bce, got 'cf'; the nearest is 'ce'"),
        (["--loss.backend", "blockwize"], "loss.backend: expected one of auto, triton, cuda, blockwise, reference, "
         "got 'blockwize'; the nearest is 'blockwise'"),
        (["--optimizer.backbone.lr", "-1e-3"], "optimizer.backbone.lr: expected at least 0, got -0.001"),
        (["--optimizer.pool.clip-norm", "0"], "optimizer.pool.clip_norm: expected more than 0, got 0.0"),
        (["--optimizer.betas", "0.9", "1"], "optimizer.betas: expected at least 0 and less than 1, got 1.0"),
        (["--optimizer.betas", "0.9"], "Missing value for argument '--optimizer.betas'. Expected 2 values."),
        (["--run.steps", "3.5"], "--run.steps: expected an integer, got '3.5'"),
        (["--run.steps", "0"], "run.steps: expected at least 1, got 0"),
        (["--run.workers", "-1"], "run.workers: expected at least 0, got -1"),
        (["--run.resum"], "unknown option --run.resum; the nearest is --run.resume"),
        (["--run.no_resum"], "unknown option --run.no-resum; the nearest is --run.no-resume"),
        (["--loss.bta=1"], "unknown option --loss.bta; the nearest is --loss.beta"),
        (["--run.resume", "False"], "--run.resume: expected no value, got 'False'; --run.no-resume turns it off"),
        (["--run.compare-global", "False"],
         "--run.compare-global: expected no value, got 'False'; --run.no-compare-global turns it off"),
        (["runs/a"], "unexpected argument 'runs/a'"),
        (["--data.kind", "scene"], "--data.kind: expected one of scenes, sharegpt4v, pairs, shards, mixture, "
         "got 'scene'; the nearest is 'scenes'"),
        (["--data.scenes", "0"], "data: scenes: expected at least 1, got 0"),
        (["--evaluation.scenes", "-1"], "evaluation.scenes: expected at least 0, got -1"),
        (["--model.name", "vit-b-61"],
         "model: name: expected scenes, a configuration in JSON, or a model of open_clip, got 'vit-b-61'; "
         "the nearest is 'ViT-B-16'"),
        (["--model.name", '{"vision_cfg": 3}'],
         "model: name: expected the configuration of an open_clip model, got '{\"vision_cfg\": 3}'"),
        (["--model.name", "ViT-B-16", "--model.pretrained", "opnai"], "; got 'opnai'; the nearest is 'openai'"),
        (["--model.pretrained", "no.pt"], "model: pretrained: no.pt is not a file, and scenes has no pretrained tags"),
        (["--model.pool-heads", "7"], "model: pool_heads: expected a divisor of 128, got 7"),
        (["--model.context-length", "0"], "model: context_length: expected 77, or 248 for stretched positions, got 0"),
        (["--config", "vit_b16_sharegpt4v"], "got 'vit_b16_sharegpt4v'; the nearest is 'vit_b16_sharegpt4v_ce'"),
    ],
)  # fmt: skip
def test_wrong_values(tmp_path, capsys, monkeypatch, arguments, message):
    """One line that names the option and what it takes; nothing is written."""
    monkeypatch.chdir(tmp_path)
    error = fails(capsys, "train", *arguments)
    assert error.startswith("betaclip train: ") and error.endswith(f"{message}\n") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_wrong_values_of_other_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["evaluate", "a"], "nothing to evaluate: give --scenes"),
        (["evaluate", "--scenes", "3"], "nothing to evaluate: give a checkpoint, --model and --pretrained, or both"),
        (["evaluate", "a", "--urban_k", "b"], "unknown option --urban-k; the nearest is --urban1k"),
        (["evaluate", "a", "--scenes", "3", "--batch-size", "0"], "batch_size: expected at least 1, got 0"),
        (["evaluate", "a", "--zero-shot-templates", "opnai"], "got 'opnai'; the nearest is 'openai'"),
        (["visualize", "a", "b", "c", "--head-width", "-8"], "head_width: expected at least 1, got -8"),
        (["prepare", "--annotations", "a", "--out", "b", "--workers", "0"], "workers: expected at least 1, got 0"),
        (["prepare", "--annotations", "a", "--out", "b", "--phrase-extractor", "spaci"], "the nearest is 'spacy'"),
        (["export", "a", "b", "--to", "publshed"], "got 'publshed'; the nearest is 'published'"),
        (["trian"], "no command 'trian'; the nearest is 'train'"),
    ):
        error = fails(capsys, *arguments)
        assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_weights_that_cannot_be_fetched(tmp_path, capsys, monkeypatch):
    """Missing data are found before anything is fetched; then the message says what to do without access to the hub."""
    asked = []

    def create_model(*args, **options):
        asked.append(args)
        raise RuntimeError("Couldn't connect to the hub\nadvice")

    monkeypatch.setattr("open_clip.create_model", create_model)
    monkeypatch.chdir(tmp_path)
    assert fails(capsys, *RECIPE).endswith("kind 'sharegpt4v' needs the file of the captions\n") and not asked
    error = fails(capsys, *RECIPE, "--data.kind", "scenes")
    assert asked and error == (
        "betaclip train: model: pretrained: the weights openai of ViT-B-16 cannot be fetched "
        "(Couldn't connect to the hub); give the path of a file that holds them\n"
    )
    assert not list(tmp_path.iterdir())


def test_half_precision_on_a_cpu_is_warned_of(tiny, capsys, caplog, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_: sys.exit(0))
    fails(capsys, *tiny, "--run.precision", "fp16", "--run.device", "cpu", code=0)
    assert caplog.messages == ["run.precision: fp16 is much slower than fp32 on a CPU; take fp32 or bf16"]


def test_switches(monkeypatch):
    """Every switch of every command is turned off by --no-x; the older name of a choice is still taken."""
    found = {}
    for command in ("train", "evaluate", "visualize", "prepare", "export"):
        module, name = COMMANDS[command].module, COMMANDS[command].config
        kind = getattr(importlib.import_module(module), name)
        for option, off in _options(kind, None):
            if off is not None:
                assert off == re.sub(r"([-.])([^-.][^.]*)$", r"\1no-\2", option)
                found[option] = off
    assert {"--run.compare-global", "--run.resume", "--model.pool-identity", "--conditioned"} <= found.keys()
    configs = []
    monkeypatch.setattr(train, "main", configs.append)
    main(["train", *(off for option, off in found.items() if "." in option), "--loss.gather", "false"])
    (config,) = configs
    assert not any(value for part in to_dict(config).values() for value in part.values() if isinstance(value, bool))
    assert config.run.compare_global is False and config.loss.gather == "local"


def help_of(*arguments: str) -> tuple[list[list[str]], dict[str, str]]:
    """Each option with its text, and the descriptions of the groups."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with pytest.raises(SystemExit), redirect_stdout(out):
        main([*arguments, "--help"])
    out.seek(0)
    options, groups = [], {}
    for box in re.split("^╭─ ", out.read(), flags=re.MULTILINE)[1:]:
        title = box.partition(" ─")[0]
        lines = [line[2:-2].rstrip() for line in box.splitlines() if line.startswith("│")]
        rules = [i for i, line in enumerate(lines) if line and not line.strip("─")]
        if rules:
            groups[title] = " ".join(lines[: rules[0]])
        for line in lines[rules[0] + 1 if rules else 0 :]:
            name, _, text = line.partition("  ") if not line.startswith(" ") else ("", "", line)
            if name:
                options.append([name, ""])
            options[-1][1] += re.sub(r"\(default: .*|\(required\)", "", text)
    return options, groups


@pytest.mark.parametrize(
    "arguments",
    [["train"], ["train", "--config", "vit_b16_sharegpt4v_bce"], ["evaluate"], ["visualize"], ["prepare"], ["export"]],
    ids=" ".join,
)
def test_help(monkeypatch, arguments):
    """Every option has a text of its own, every group a description of its own."""
    monkeypatch.setenv("COLUMNS", "100")
    options, groups = help_of(*arguments)
    assert len(options) >= (80 if arguments[0] == "train" else 4)
    assert [name for name, text in options if not re.search("[A-Za-zβ]{3}", text)] == []
    assert len(set(groups.values())) == len(groups)
    assert "``" not in str(options) + str(groups)
    if arguments[0] == "train":
        assert {f"{part} options" for part in ("model", "data", "loss", "optimizer", "optimizer.backbone",
                                               "optimizer.pool", "run", "evaluation")} <= groups.keys()  # fmt: skip


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
        "expected a TOML file or one of flair, scenes, smoke, vit_b16_sharegpt4v_bce, vit_b16_sharegpt4v_ce, "
        "vit_l14_sharegpt4v_ce, got 'vit'" in message
    )
    (tmp_path / "scenes").write_text("")  # a file goes before a recipe
    assert config_path("scenes") == Path("scenes")


def test_help_is_light():
    """Help imports no more than the package itself does."""
    code = "import sys; from betaclip.cli import main; main(['--help']); "
    code += "print({'tyro', 'open_clip', 'torch._dynamo'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("usage: betaclip COMMAND") and "  prepare" in out and out.endswith("set()\n")
