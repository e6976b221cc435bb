"""Chooses the extractor of phrases: spaCy's parser, or our own rules."""

import importlib.util
import logging

from betaclip.data.phrases.rules import RuleExtractor
from betaclip.data.phrases.spans import Extractor

SPACY_MODELS = ("en_core_web_sm", "en_core_web_md", "en_core_web_lg", "en_core_web_trf")  # tried in this order

_log = logging.getLogger(__name__)


def create_extractor(model: str | None = None) -> Extractor:
    """spaCy with ``model``, or with the first of SPACY_MODELS that is installed, or else our own rules.

    Raises:
        ValueError: ``model`` is given and not installed.
    """
    if model is not None and importlib.util.find_spec(model) is None:
        raise ValueError(f"spacy_model: {model!r} is not installed (python -m spacy download {model})")
    installed = [name for name in ((model,) if model else SPACY_MODELS) if importlib.util.find_spec(name)]
    if installed:
        from betaclip.data.phrases.spacy_parser import SpacyExtractor

        return SpacyExtractor(installed[0])
    _log.warning(
        "no spaCy model is installed: phrases are found by word lists, which know no grammar and are coarser. "
        "To have them from a parser: python -m spacy download %s",
        SPACY_MODELS[0],
    )
    return RuleExtractor()
