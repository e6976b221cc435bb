"""Zero-shot classification: a model whose right answers are known, open_clip's classifier, and ties."""

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from support import colours
from support.ranks import needs_gloo, processes

from betaclip.data.transforms import EvaluationTransform
from betaclip.evaluation.encode import NoPicturesError, Squash
from betaclip.evaluation.tasks.zero_shot import TEMPLATES, _answers, class_embeddings, zero_shot_accuracy
from betaclip.model.tokenizer import Tokenizer
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup

PLAIN = (lambda name: f"a {name} square", lambda name: f"{name} {name}")


def one(name):
    return colours.picture({(1, 1): name})


def test_by_known_model():
    """One of four pictures is labelled wrongly; the classes' means weigh a class of one picture as one of three."""
    pictures = [(one("red"), 0), (one("red"), 0), (one("green"), 0), (one("green"), 1)]
    found = zero_shot_accuracy(
        colours.ColourModel(), Tokenizer(), pictures, colours.NAMES, PLAIN, Squash(colours.SIZE), batch_size=3
    )
    assert found == {
        "top1": 3 / 4, "top5": 1, "mean_per_class": pytest.approx((2 / 3 + 1) / 2), "chance": 1 / 3,
        "classes": 3, "images": 4, "left_out": 0,
    }  # fmt: skip


def test_classifier_is_that_of_open_clip():
    """The mean of normalised embeddings, normalised, of open_clip's own classifier on the same tower."""
    torch.manual_seed(0)
    table = torch.randn(49408, 6) * torch.rand(49408, 1) * 9

    class Towers:
        logit_scale = torch.zeros(())
        embed_dim = 6

        def encode_text(self, texts, normalize=False):
            if isinstance(texts, torch.Tensor):  # open_clip's padded tokens
                rows = [row[: row.argmax() + 1] for row in texts]
            else:
                rows = texts.tokens.split(texts.lengths.tolist())
            embeds = torch.stack([table[row].sum(0) for row in rows])
            return F.normalize(embeds, dim=-1) if normalize else embeds

    names, model = ["cat", "tabby cat", "owl"], Towers()
    ours = class_embeddings(model, Tokenizer(), names, TEMPLATES["simple"], batch_size=4)
    theirs = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer("ViT-B-16"), names, open_clip.SIMPLE_IMAGENET_TEMPLATES
    )
    torch.testing.assert_close(ours.float(), theirs.T)
    assert len(TEMPLATES["openai"]) == 80 and class_embeddings(model, Tokenizer(), [], PLAIN, 4).shape == (0, 6)


def test_places():
    """Classes that score as high as the right one are placed before it, and NaN is the worst score."""
    scores = torch.tensor(
        [[3, 1, 2, 0, 0, 0, 0.0], [3, 3, 2, 0, 0, 0, 0], [9, 9, 9, 9, 9, 1, 9], [torch.nan, 1, 2, 0, 0, 0, 0]]
    )
    found = _answers(scores, torch.tensor([0, 0, 5, 0]))
    assert found.tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]
    scores = torch.tensor([[1, torch.nan, 0.0]])
    assert _answers(scores, torch.tensor([0])).tolist() == [[0, 1, 1]]


def test_pictures_that_cannot_be_read(tmp_path, caplog):
    good, broken = colours.save(tmp_path / "1.png", one("blue")), colours.save_broken(tmp_path / "2.png")
    model, transform = colours.ColourModel(), EvaluationTransform(colours.SIZE)
    options = {"batch_size": 1}
    found = zero_shot_accuracy(
        model,
        Tokenizer(),
        [(broken, 0), (good, 2), (tmp_path / "3.png", 1)],
        colours.NAMES,
        PLAIN,
        transform,
        **options,
    )
    assert (found["top1"], found["mean_per_class"], found["images"], found["left_out"]) == (1, 1, 1, 2)
    assert f"left out {broken}" in caplog.text
    with pytest.raises(NoPicturesError, match="none of 1 pictures"):
        zero_shot_accuracy(model, Tokenizer(), [(broken, 0)], colours.NAMES, PLAIN, transform, **options)


def ranks_equal_one_process(folder: Path) -> None:
    """Three ranks, two classes, seven pictures of which two cannot be read."""
    pictures = [(folder / f"{i}.png", i % 2) for i in range(7)]
    model, transform = colours.ColourModel(sharpness=5), EvaluationTransform(colours.SIZE)
    together, alone = (
        zero_shot_accuracy(
            model, Tokenizer(), pictures, colours.NAMES[:2], PLAIN, transform, batch_size=2, process_group=group
        )
        for group in (ProcessGroup.of(), SINGLE_PROCESS)
    )
    assert together == alone and alone["left_out"] == 2


@needs_gloo
def test_ranks_equal_one_process(tmp_path):
    colours.save_seven(tmp_path)
    processes(3, ranks_equal_one_process, tmp_path, tmp_path)
