"""Evaluation within a training run, on the sets of `betaclip evaluate`."""

from dataclasses import fields
from pathlib import Path

from betaclip.errors import ConfigError
from betaclip.evaluation.run import EvaluateConfig, evaluate_sets, read_sets
from betaclip.model.beta_clip import BetaCLIP
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup
from betaclip.training.config import TrainConfig

SCENES = 200


class Evaluation:
    """The sets that a run is evaluated on; read once, at its start, when what is missing can still be mended.

    Raises:
        ConfigError: a set that is not there.
    """

    def __init__(self, config: TrainConfig) -> None:
        chosen = config.evaluation
        sets = {f.name: getattr(chosen, f.name) for f in fields(chosen) if f.name not in ("every", "scenes")}
        scenes = chosen.scenes
        if scenes is None:
            scenes = SCENES if config.data.kind == "scenes" else 0
        self._config = EvaluateConfig(Path(), scenes=scenes, **sets)
        try:
            self._sets = read_sets(self._config)
        except ConfigError as error:
            raise ConfigError(f"evaluation: {error}") from error

    def __call__(
        self, model: BetaCLIP, process_group: ProcessGroup, *, alike: bool = False
    ) -> dict[str, dict[str, float]]:
        """Values by set and name; nothing if there are no sets. All ranks together.

        alike: every rank evaluates everything, for a model whose calls are collective; or else each its part.
        """
        return evaluate_sets(self._config, self._sets, model, SINGLE_PROCESS if alike else process_group)
