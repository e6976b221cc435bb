"""``betaclip evaluate`` on small sets in their real layouts, with a model whose right answers are known."""

import json
from pathlib import Path

import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
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
from betaclip.settings import to_dict

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
    written = json.loads(output.read_text())
    assert written.keys() == results.keys()
    assert all(written[name].items() >= values.items() for name, values in results.items())
    printed = capsys.readouterr().out
    assert "urban1k        CLS" in printed and "fg_ovd  hard" in printed and "Pointing" in printed
    assert "zero_shot 2 3 1 66.7 100.0 75.0 50.0" in [" ".join(line.split()) for line in printed.splitlines()]
    # Samples that are left out are named, each with its reason.
    for name in ("5.png: OSError", "4.png: a picture without a caption", "none.png", "annotation 3: image: "):
        assert name in caplog.text


@pytest.mark.parametrize("form", ["benchmark", "lines"])
def test_fg_ovd_under_its_real_names(tmp_path, known, capsys, form):
    """All eight subsets of the benchmark, or the four of FG-CLIP's files."""
    folder = fg_ovd(tmp_path)
    questions = (folder / "material.json").read_text()
    for file in folder.glob("*.json"):
        file.unlink()
    kinds = ["hard", "medium", "easy", "trivial"]
    if form == "benchmark":
        kinds += ["color", "material", "pattern", "transparency"]
        files = [f"{name}_attributes.json" for name in (1, 2, 3)]
        files += [f"{name}.json" for name in ("shuffle_negatives", *kinds[4:])]
    else:
        box = json.loads(questions)["annotations"][0]["bbox"]
        row = {"img_path": "/val2017/1.png", "bbox": box}
        row |= {"pos_expression": ["a green square"], "neg_expression": ["a red square"]}
        questions = json.dumps(row) + "\n"
        files = [f"{name}_attributes_llava.jsonl" for name in "hme"] + ["shuffle_negatives_llava.jsonl"]
    for name in files:
        (folder / name).write_text(questions)
    main(["evaluate", "x", "--fg-ovd", str(folder), "--fg-ovd-images", str(folder / "coco"), "--device", "cpu"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    # Both colours are in the picture, so both texts find what they say in it.
    assert lines[2:] == [f"fg_ovd {kind} 1 0 100.0 0.0 50.0" for kind in kinds]


def test_command(tmp_path, known, capsys):
    folder = urban1k(tmp_path / "urban1k")
    main(["evaluate", "anything", "--urban1k", str(folder), "--no-conditioned", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "100.0" in printed and "conditioned" not in printed


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
        (["--scenes", "1", "--output", "x.txt"], "output: expected a name that ends in .json, .csv, .md, got x.txt"),
        (["--scenes", "1", "--limit", "0"], "limit: expected at least 1, got 0"),
        (["--scenes", "1", "--top-k", "9"], "top_k: expected at least 10, the largest recall, got 9"),
        (["--scenes", "1", "--pretrained", "openai"], "pretrained: openai are weights of --model, which is not given"),
    ],
)
def test_rejects(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", "checkpoint", "--device", "cpu", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_ways_of_conditioning(tmp_path, known, capsys):
    main(["evaluate", "anything", "--urban1k", str(urban1k(tmp_path)), "--scenes", "3", "--top-k", "10", "--own-text",
          "--intervals", "--output", str(tmp_path / "x.csv"), "--device", "cpu"])  # fmt: skip
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for name in ("urban1k", "scenes"):
        for way in ("CLS", "conditioned, all pairs", "conditioned, top 10", "conditioned, own text"):
            assert any(line.startswith(f"{name} {way} 3 3 ") for line in lines), (name, way)
    # Fewer than 10 pictures: the nearest are all of them.
    tops = {line.partition(" 3 3 ")[2] for line in lines if line.startswith(("urban1k conditioned, top", "urban1k co"))}
    assert tops == {
        " ".join(["2 100.0 (43.9–100.0) 100.0 (43.9–100.0) 100.0 (43.9–100.0)"] + ["100.0 (43.9–100.0)"] * 3)
    }
    assert "urban1k,retrieval,conditioned_top10_t2i_r1,1.0,0.43" in (tmp_path / "x.csv").read_text()


def test_limit(tmp_path, known):
    """Spread evenly: 2 of 3 pictures are the first and the second, of 3 classified ones likewise."""
    options = {"urban1k": urban1k(tmp_path / "u"), "zero_shot": classes(tmp_path / "c"), "fg_ovd": fg_ovd(tmp_path)}
    options |= {"checkpoint": Path("checkpoint"), "conditioned": False, "device": "cpu", "sharegpt4v_10k": None}
    options |= {"fg_ovd_images": tmp_path / "coco"}
    found = evaluate(EvaluateConfig(limit=2, **options))
    assert list(found) == ["urban1k_limit2", "fg_ovd", "zero_shot_limit2"]
    assert found["urban1k_limit2"]["retrieval/images"] == found["urban1k_limit2"]["retrieval/texts"] == 2
    found = evaluate(EvaluateConfig(limit=1, **options))
    assert found["fg_ovd_limit1"]["choices/hard_questions"] == 1 and found["fg_ovd_limit1"]["choices/hard"] == 1
    assert list(evaluate(EvaluateConfig(limit=100, **options))) == ["urban1k", "fg_ovd", "zero_shot"]


@pytest.fixture
def exported(tmp_path) -> Path:
    """A run's folder with an exported model in it."""
    torch.manual_seed(0)
    config = ModelConfig(name=TOKENIZER_MODEL, pool_heads=2)
    (tmp_path / "run").mkdir()
    content = {"betaclip": 1, "config": {"model": to_dict(config)}, "model": create_model(config).state_dict()}
    checkpoints.write(checkpoints.checkpoint_path(tmp_path / "run", 7), content, keep=1)
    main(["export", str(tmp_path / "run"), "--to", "open_clip"])
    return tmp_path / "run"


def test_a_model_to_compare_with(tmp_path, exported, capsys):
    """open_clip's model with the same towers has the same results in rows of its own, but none of pooling."""
    sets = ["--scenes", "6", "--urban1k", str(urban1k(tmp_path / "u")), "--zero-shot", str(classes(tmp_path / "c")),
            "--fg-ovd", str(fg_ovd(tmp_path / "f")), "--fg-ovd-images", str(tmp_path / "f" / "coco")]  # fmt: skip
    options = [*sets, "--zero-shot-templates", "simple", "--output", str(tmp_path / "x.json"), "--device", "cpu"]
    main(["evaluate", str(exported), "--model", f"local-dir:{exported / 'open_clip'}", *options])
    found = json.loads((tmp_path / "x.json").read_text())
    names = ["scenes", "urban1k", "fg_ovd", "zero_shot"]
    assert list(found) == [name for one in names for name in (one, f"{one}, open_clip")]
    pooled = ("conditioned", "pointing/", "leak/")
    for name in names:
        assert any(part in key for key in found[name] for part in pooled) == (name != "zero_shot")
        own = {key: value for key, value in found[name].items() if not any(part in key for part in pooled)}
        assert found[f"{name}, open_clip"] == pytest.approx(own)
    assert "urban1k, open_clip  CLS" in capsys.readouterr().out
    # Alone, with weights in a file.
    weights = exported / "open_clip" / "open_clip_model.safetensors"
    main(["evaluate", "--model", TOKENIZER_MODEL, "--pretrained", str(weights), *options[:4], "--device", "cpu"])
    assert "open_clip_model.safetensors  CLS" in capsys.readouterr().out


def test_a_model_without_patches(tmp_path, caplog, capsys):
    vision, text = json.loads(TOKENIZER_MODEL)["vision_cfg"], json.loads(TOKENIZER_MODEL)["text_cfg"]
    config = {"embed_dim": 16, "vision_cfg": vision | {"layers": (1, 1, 1, 1)}, "text_cfg": text}
    save_file({k: v.contiguous() for k, v in CLIP(**config).state_dict().items()}, file := tmp_path / "x.safetensors")
    images = str(tmp_path / "coco")
    main(["evaluate", "--model", json.dumps(config), "--pretrained", str(file), "--scenes", "2",
          "--fg-ovd", str(fg_ovd(tmp_path)), "--fg-ovd-images", images, "--device", "cpu"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "Retrieval" in printed and "Choices" not in printed
    assert "left out the choices: the vision tower has no patches in the space of the texts" in caplog.text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to evaluate: give a checkpoint, --model and --pretrained, or both"),
        (
            ["--model", "ViT-B-61"],
            "model: name: expected a model of open_clip, got 'ViT-B-61'; the nearest is ",
        ),
        (["--model", "ViT-B-16"], "model: pretrained: expected a file or one of openai, "),
        (["--model", "ViT-B-16", "--pretrained", "opnai"], "model: pretrained: expected a file, or one of openai, "),
    ],
)
def test_rejects_models(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", "--scenes", "1", "--device", "cpu", *arguments])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"betaclip evaluate: {message}") and error.count("\n") == 1


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
    assert {name: pytest.approx(value) for name, value in expected.items()} == {name: found[name] for name in expected}
