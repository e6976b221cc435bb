"""The model: two towers from open_clip, the pooling block between them, texts without padding, and weights."""

from betaclip.model.beta_clip import BetaCLIP, ModelConfig, create_model
from betaclip.model.texts import RaggedTexts
from betaclip.model.tokenizer import Tokenizer

__all__ = ["BetaCLIP", "ModelConfig", "RaggedTexts", "Tokenizer", "create_model"]
