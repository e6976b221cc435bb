"""All tasks on rendered test scenes, which no training run sees."""

from typing import Any

from betaclip.data.multiple_choice import Choice
from betaclip.data.scenes import dataset as scenes
from betaclip.evaluation.encode import Encoder, Squash, Tokenize
from betaclip.evaluation.tasks.leak import leak
from betaclip.evaluation.tasks.multiple_choice import choice_accuracy
from betaclip.evaluation.tasks.pointing import pointing
from betaclip.evaluation.tasks.retrieval import retrieval
from betaclip.model.plain_clip import PlainClip
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup

BATCH_SIZE = 32


def evaluate_scenes(
    model: Encoder,
    tokenizer: Tokenize,
    *,
    seed: int,
    count: int,
    batch_size: int = BATCH_SIZE,
    conditioned: bool = True,
    own_text: bool = False,
    top_k: int | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """Retrieval, choices, pointing and the leak on the first ``count`` test scenes of a seed, of the model's size;
    without a pooling block only the first two, and without patches only retrieval.

    By default a rank evaluates all of them by itself. Random states and the model's mode do not change.

    Returns:
        "retrieval/t2i_r1" … as :func:`betaclip.evaluation.tasks.retrieval.retrieval` names them; "choices/hard",
        "choices/hard_chance" … as :func:`betaclip.evaluation.tasks.multiple_choice.choice_accuracy` does, for one thing
        of each scene; "pointing/mass_in_box" … as :func:`betaclip.evaluation.tasks.pointing.pointing` does, for all
        phrases of each scene; "leak/other_picture" … as :func:`betaclip.evaluation.tasks.leak.leak` does, for one
        thing of each scene.

    Raises:
        ValueError: ``count`` is not positive.
    """
    if count < 1:
        raise ValueError(f"count: expected at least one scene, got {count}")
    asked = list(scenes.choices(seed, count, model.image_size))
    shown = [one.scene for one in asked]
    pictures = [(scene.image, [scene.caption]) for scene in shown]
    questions = [
        (difficulty, Choice(one.scene.image, one.box, one.positive, tuple(one.negatives[difficulty])))
        for one in asked
        for difficulty in scenes.DIFFICULTIES
    ]
    things = [(one.scene.image, [one.positive, *one.scene.phrases]) for one in asked]
    options: Any = {"batch_size": batch_size, "process_group": process_group}
    squash = Squash(model.image_size)
    measures = {
        "retrieval": retrieval(
            model, tokenizer, pictures, squash, conditioned=conditioned, own_text=own_text, top_k=top_k, **options
        )
    }
    if model.patch_grid != (0, 0):
        measures["choices"] = choice_accuracy(model, tokenizer, questions, **options)
    if not isinstance(model, PlainClip):
        measures["pointing"] = pointing(model, tokenizer, shown, **options)
        measures["leak"] = leak(model, tokenizer, things, squash, **options)
    return {f"{measure}/{name}": value for measure, values in measures.items() for name, value in values.items()}
