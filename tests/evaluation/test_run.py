"""``betaclip evaluate`` on small sets in their real layouts, with a model whose right answers are known."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import colours
from support.published import released_checkpoint
from support.tiny import TOKENIZER_MODEL

from betaclip import checkpoint as checkpoints
from betaclip.cli import main
from betaclip.errors import ConfigError
from betaclip.evaluation import run
from betaclip.evaluation.run import EvaluateConfig, evaluate
from betaclip.evaluation.sets import EvaluationConfig
from betaclip.evaluation.tasks.scenes import evaluate_scenes
from betaclip.model.beta_clip import ModelConfig, create_model
from betaclip.model.tokenizer import Tokenizer
from betaclip.published import save_published

COLOURS = ("red", "green", "blue")


@pytest.mark.parametrize("long_texts", ["keep_end", "published"])
def test_long_texts(long_texts, monkeypatch):
    used = []
    monkeypatch.setattr(run, "evaluate_scenes", lambda model, tokenizer, **_: used.append(tokenizer) or {})
    run.Evaluator(EvaluationConfig(scenes=1, long_texts=long_texts))(colours.ColourModel())
    assert used == [Tokenizer(colours.ColourModel().context_length, keep_end=long_texts == "keep_end")]


@pytest.fixture
def known(monkeypatch):
    """Load the colour model, whatever the checkpoint."""
    model = colours.ColourModel()
    monkeypatch.setattr(run, "load_checkpoint", lambda path, device, **heads: model.to(device))
    return model


def urban1k(root: Path) -> Path:
    """Three good pairs, a picture without a caption, and a broken picture."""
    for i, name in enumerate(COLOURS, 1):
        colours.save(root / "image" / f"{i}.png", colours.picture({(1, 1): name}, 64, 32))
    colours.save(root / "image" / "4.png", colours.picture({(1, 1): "red"}))
    colours.save_broken(root / "image" / "5.png")
    (root / "caption").mkdir()
    for i, name in zip((1, 2, 3, 5), (*COLOURS, "red"), strict=True):
        (root / "caption" / f"{i}.txt").write_text(f"a {name} square")
    return root


def sharegpt4v(root: Path) -> Path:
    """Two good rows, of which one is described wrongly, and one without a picture."""
    rows = [("1.png", "a green square"), ("none.png", "red"), ("2.png", "a green square")]
    for image, name in (("1.png", "red"), ("2.png", "green")):
        colours.save(root / "pictures" / image, colours.picture({(2, 1): name}))
    content = [{"image": image, "conversations": [{}, {"value": text}]} for image, text in rows]
    (root / "sharegpt4v.json").write_text(json.dumps(content))
    return root / "sharegpt4v.json"


def dci(root: Path) -> Path:
    (root / "annotations").mkdir(parents=True)
    for name in COLOURS:
        colours.save(root / "photos" / f"{name}.png", colours.picture({(2, 1): name}))
        row = {"image": f"{name}.png", "short_caption": f"A {name} square", "extra_caption": "on black"}
        (root / "annotations" / f"{name}.json").write_text(json.dumps(row))
    return root


def fg_ovd(root: Path) -> Path:
    """Hard: one right, one wrong, one whose picture is missing. Trivial: one right. Boxes are of wide pictures."""
    picture = colours.picture({(0, 1): "red", (3, 2): "green"}, 160, 64)
    colours.save(root / "coco" / "val2017" / "1.png", picture)
    names = {i: f"a {name} square" for i, name in enumerate(COLOURS)}

    def content(rows: list[tuple[int, tuple[int, int], int, list[int]]]) -> str:
        annotations = [
            {
                "image_id": image,
                "bbox": [*colours.box_of(*cell, 160, 64)[:2], 40, 16],
                "category_id": positive,
                "neg_category_ids": negatives,
            }
            for image, cell, positive, negatives in rows
        ]
        return json.dumps(
            {
                "images": [{"id": i, "file_name": f"val2017/{i}.png"} for i in (1, 2)],
                "annotations": annotations,
                "categories": [{"id": i, "name": name} for i, name in names.items()],
            }
        )

    (root / "1_attributes.json").write_text(content([(1, (0, 1), 0, [1, 2]), (1, (3, 2), 2, [1]), (2, (0, 1), 0, [1])]))
    (root / "material.json").write_text(content([(1, (3, 2), 1, [0])]))
    (root / "shuffle_negatives.json").write_text(content([(1, (3, 2), 1, [0, 2])]))
    return root


def classes(root: Path) -> Path:
    """Two red squares of which one lies in the folder of green ones, and a broken picture."""
    for folder, i, name in (("red", 1, "red"), ("green", 1, "red"), ("green", 2, "green")):
        colours.save(root / folder / f"{i}.png", colours.picture({(1, 1): name}))
    colours.save_broken(root / "green" / "3.png")
    return root


def test_all_sets(tmp_path, known, capsys, caplog):
    output = tmp_path / "results" / "all.json"
    results = evaluate(
        EvaluateConfig(
            checkpoint=Path("checkpoint"),
            scenes=3,
            urban1k=urban1k(tmp_path / "urban1k"),
            sharegpt4v=sharegpt4v(tmp_path / "sharegpt4v"),
            sharegpt4v_images=tmp_path / "sharegpt4v" / "pictures",
            dci=dci(tmp_path / "dci"),
            fg_ovd=fg_ovd(tmp_path / "fg_ovd"),
            fg_ovd_images=tmp_path / "fg_ovd" / "coco",
            pairs=sharegpt4v(tmp_path / "own"),
            pairs_images=tmp_path / "own" / "pictures",
            zero_shot=classes(tmp_path / "classes"),
            zero_shot_templates="simple",
            output=output,
            batch_size=2,
            device="cpu",
        )
    )
    assert set(results) == {"scenes", "urban1k", "sharegpt4v_1k", "dci", "pairs", "fg_ovd", "zero_shot"}
    found = results["urban1k"]
    assert (found["retrieval/images"], found["retrieval/texts"], found["retrieval/left_out"]) == (3, 3, 2)
    assert found["retrieval/t2i_r1"] == found["retrieval/conditioned_i2t_r1"] == 1
    # Only what a text names is attended to, and no other picture has it.
    assert (found["leak/own_picture"], found["leak/other_picture"], found["leak/texts"]) == (1, 0, 3)
    found = results["sharegpt4v_1k"]
    assert not any(name.startswith("leak") for name in found)  # equal captions
    assert (found["retrieval/images"], found["retrieval/left_out"]) == (2, 1)
    assert found["retrieval/t2i_r1"] == 0.5 and found["retrieval/i2t_r1"] == 0  # equal captions tie
    assert results["dci"]["retrieval/t2i_r1"] == 1 and results["dci"]["retrieval/images"] == 3
    found = results["fg_ovd"]
    assert (found["choices/hard"], found["choices/hard_questions"], found["choices/hard_left_out"]) == (0.5, 2, 1)
    assert (found["choices/trivial"], found["choices/trivial_chance"]) == (1, pytest.approx(1 / 3))
    assert found["choices/material_questions"] == 1
    assert "choices/medium" not in found and "left out the medium choices" in caplog.text
    assert results["pairs"] == results["sharegpt4v_1k"]
    found = results["zero_shot"]
    assert (found["zero_shot/top1"], found["zero_shot/images"]) == (pytest.approx(2 / 3), 3)
    assert (found["zero_shot/mean_per_class"], found["zero_shot/left_out"]) == (0.75, 1)
    assert json.loads(output.read_text()) == results
    printed = capsys.readouterr().out
    assert "urban1k        CLS" in printed and "fg_ovd  hard" in printed and "Pointing" in printed
    assert "zero_shot 2 3 1 66.7 100.0 75.0 50.0" in [" ".join(line.split()) for line in printed.splitlines()]
    # Samples that are left out are named, each with its reason.
    for name in ("5.png: OSError", "4.png: a picture without a caption", "none.png", "annotation 3: image: "):
        assert name in caplog.text


def test_command(tmp_path, known, capsys):
    folder = urban1k(tmp_path / "urban1k")
    main(["evaluate", "anything", "--urban1k", str(folder), "--no-conditioned", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "100.0" in printed and "text-conditioned" not in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to evaluate"),
        (["--urban1k", "nowhere"], "nowhere/image is not a folder"),
        (["--dci", "nowhere"], "nowhere/annotations is not a folder"),
        (["--fg-ovd", "nowhere"], "no file of any subset"),
        (["--sharegpt4v", "nowhere"], "nowhere"),
        (["--zero-shot", "nowhere"], "zero_shot: nowhere is not a folder"),
        (["--coco", "nowhere"], "coco: nowhere is not a file"),
        (["--scenes", "-1"], "scenes: expected at least 0, got -1"),
        (["--scenes", "1", "--batch-size", "0"], "batch_size: expected at least 1, got 0"),
        (["--scenes", "1"], "checkpoint: no such file"),
        (["--scenes", "1", "--output", "file/x.json"], "file"),
    ],
)
def test_rejects(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", "checkpoint", "--device", "cpu", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_no_picture_can_be_read(tmp_path, known):
    colours.save_broken(tmp_path / "image" / "1.png")
    (tmp_path / "caption").mkdir()
    (tmp_path / "caption" / "1.txt").write_text("red")
    with pytest.raises(ConfigError, match="urban1k: none of 1 pictures"):
        evaluate(EvaluateConfig(checkpoint=Path("checkpoint"), urban1k=tmp_path, device="cpu"))


def test_checkpoint(tmp_path, capsys):
    """A run's folder stands for its latest checkpoint."""
    config = ModelConfig(name=TOKENIZER_MODEL)
    model = create_model(config)
    content = {"betaclip": 1, "config": {"model": {"name": TOKENIZER_MODEL}}, "model": model.state_dict()}
    checkpoints.write(checkpoints.checkpoint_path(tmp_path, 7), content, keep=1)
    results = evaluate(EvaluateConfig(checkpoint=tmp_path, scenes=5, seed=3, conditioned=False, device="cpu"))
    truth = evaluate_scenes(model, Tokenizer(), seed=3, count=5, batch_size=64, conditioned=False)
    assert results == {"scenes": truth}
    assert "Choices, % right" in capsys.readouterr().out


def test_files_of_the_released_code(tmp_path, capsys):
    """The width of heads, which the file does not have, is a setting, and the message without it names it."""
    model = create_model(ModelConfig(context_length=248, quick_gelu=True))
    save_published(model, tmp_path / "x.safetensors")
    path = tmp_path / "checkpoint_10.pt"
    torch.save(released_checkpoint(load_file(tmp_path / "x.safetensors")), path)
    options = ["--scenes", "2", "--no-conditioned", "--device", "cpu"]
    with pytest.raises(SystemExit) as exited:
        main(["evaluate", str(path), "--head-width", "48", *options])
    assert exited.value.code == 2 and "head_width: expected a divisor" in capsys.readouterr().err
    main(["evaluate", str(path), "--head-width", "32", "--output", str(tmp_path / "x.json"), *options])
    found = json.loads((tmp_path / "x.json").read_text())["scenes"]
    expected = evaluate_scenes(model, Tokenizer(248), seed=0, count=2, conditioned=False)
    assert {name: pytest.approx(value) for name, value in expected.items()} == found
