"""The objective: the weighted sum of the loss terms, from the outputs of a BetaCLIP."""

import torch
from torch import Tensor, nn

from betaclip.errors import ConfigError, not_one_of
from betaclip.model.texts import RaggedTexts
from betaclip.settings import check_numbers
from betaclip.training.config import LossConfig
from betaclip.training.loss_terms import LOSS_TERMS, Measures, Remembers


class Objective(nn.Module):
    """The sum of the loss terms by weight. A term whose weight is 0 is not computed.

    Args:
        config: the weights, and the settings of the terms; by default ``LossConfig()``.
        several_ranks: the losses may span all ranks, as ``config.gather`` says.

    Raises:
        ConfigError: a weight is negative, all are 0, a name is not in LOSS_TERMS, the conditioned negatives have a
            weight but no number, there is a queue of texts without β-CAL, equal texts are left out of a term that
            cannot leave them out, or a number of sampled pictures is below 1 or without its term.
    """

    def __init__(self, config: LossConfig | None = None, several_ranks: bool = False) -> None:
        super().__init__()
        config = LossConfig() if config is None else config
        weights = config.term_weights()
        unknown = weights.keys() - LOSS_TERMS.keys()
        if unknown:
            raise ConfigError(f"loss.weights: {not_one_of(min(unknown), LOSS_TERMS)}")
        if min(weights.values()) < 0 or not any(weights.values()):
            given = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
            raise ConfigError(f"loss: expected weights >= 0, at least one above 0, got {given}")
        check_numbers(config, "loss.")
        if weights.get("conditioned") and not config.conditioned_negatives:
            expected = "at least 1 for the loss term conditioned"
            raise ConfigError(f"loss.conditioned_negatives: expected {expected}, got {config.conditioned_negatives}")
        if config.text_queue and not weights.get("beta_cal"):
            raise ConfigError(f"loss.text_queue: expected 0 without the loss term beta_cal, got {config.text_queue}")
        comparing_all = {
            "loss.gather_global published": config.gather_global == "published" and weights["global"] > 0,
            "the loss term multi_positive": weights.get("multi_positive", 0.0) > 0,
        }
        for what, used in comparing_all.items():
            if used and config.equal_texts == "left_out":
                raise ConfigError(f"loss.equal_texts: expected negatives with {what}, got left_out")
        if config.sampled_pictures is not None and not weights.get("text_conditioned"):
            expected = "None without the loss term text_conditioned"
            raise ConfigError(f"loss.sampled_pictures: expected {expected}, got {config.sampled_pictures}")
        self.weights = {name: weights[name] for name in LOSS_TERMS if weights.get(name)}
        self.terms = {name: LOSS_TERMS[name](config, several_ranks) for name in self.weights}
        self.conditioned_negatives = config.conditioned_negatives if "conditioned" in self.terms else 0
        self.measures = [term for term in self.terms.values() if isinstance(term, Measures)]
        self.names = ["loss", *(f"{name}_loss" for name in self.terms)]
        self.names += [name for term in self.measures for name in term.metrics]

    def needs(self, *outputs: str) -> bool:
        """Whether any term reads one of these outputs of the model."""
        return any(not term.needs.isdisjoint(outputs) for term in self.terms.values())

    @property
    def captions_only(self) -> bool:
        return all(term.captions_only for term in self.terms.values())

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What the terms keep between updates, by their names; a collective."""
        return {name: term.state() for name, term in self.terms.items() if isinstance(term, Remembers)}

    def restore(self, state: dict[str, dict[str, Tensor]], device: torch.device) -> None:
        """Give the terms what :meth:`state` returned."""
        for name, term in self.terms.items():
            if isinstance(term, Remembers) and name in state:
                term.restore(state[name], device)

    def forward(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss``, each term's unweighted loss, and what terms measure, all (), by the names in ``names``."""
        losses = {name: term(out) for name, term in self.terms.items()}
        loss = torch.stack([self.weights[name] * losses[name] for name in losses]).sum()
        measured = {name: value for term in self.measures for name, value in term.measure(out).items()}
        return {"loss": loss, **{f"{name}_loss": value for name, value in losses.items()}, **measured}


def captions(texts: RaggedTexts) -> RaggedTexts:
    """The first text of each image."""
    first = texts.image_index.diff(prepend=texts.image_index.new_tensor([-1])) > 0
    tokens = texts.tokens[first.repeat_interleave(texts.lengths)]
    levels = None if texts.levels is None else texts.levels[first]
    return RaggedTexts(tokens, texts.lengths[first], texts.image_index[first], texts.num_images, levels)
