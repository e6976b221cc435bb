"""All tasks on rendered test scenes, which no training run sees."""

from betaclip.data.multiple_choice import Choice
from betaclip.data.scenes import dataset as scenes
from betaclip.evaluation.encode import Squash
from betaclip.evaluation.tasks.leak import leak
from betaclip.evaluation.tasks.multiple_choice import choice_accuracy
from betaclip.evaluation.tasks.pointing import pointing
from betaclip.evaluation.tasks.retrieval import retrieval
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.tokenizer import Tokenizer
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup

BATCH_SIZE = 32


def evaluate_scenes(
    model: BetaCLIP,
    tokenizer: Tokenizer,
    *,
    seed: int,
    count: int,
    batch_size: int = BATCH_SIZE,
    conditioned: bool = True,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """Retrieval, choices, pointing and the leak on the first ``count`` test scenes of a seed, of the model's size.

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
    measures = {
        "retrieval": retrieval(
            model, tokenizer, pictures, Squash(model.image_size),
            conditioned=conditioned, batch_size=batch_size, process_group=process_group,
        ),
        "choices": choice_accuracy(model, tokenizer, questions, batch_size=batch_size, process_group=process_group),
        "pointing": pointing(model, tokenizer, shown, batch_size=batch_size, process_group=process_group),
        "leak": leak(
            model, tokenizer, things, Squash(model.image_size), batch_size=batch_size, process_group=process_group
        ),
    }  # fmt: skip
    return {f"{measure}/{name}": value for measure, values in measures.items() for name, value in values.items()}
