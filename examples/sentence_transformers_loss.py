"""betaclip's loss in sentence-transformers' trainer: two sentences that mean the same are each other's positives, the
other sentences of the batch are negatives. A tiny model, nothing to download."""

import tempfile

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.models import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from betaclip import ClipLoss

ANIMALS, PLACES = ("cat", "dog", "bird", "horse"), ("house", "garden", "river", "wood")
PAIRS = [(f"a {animal} by the {place}", f"the {place} and its {animal}") for animal in ANIMALS for place in PLACES]


class SymmetricLoss(nn.Module):
    """The values and gradients of MultipleNegativesSymmetricRankingLoss, in memory linear in the batch."""

    def __init__(self, model, scale=20.0):
        super().__init__()
        self.model, self.scale, self.loss = model, scale, ClipLoss()

    def forward(self, sentence_features, labels=None):
        anchor, positive = (self.model(features)["sentence_embedding"] for features in sentence_features)
        return self.loss(anchor, positive, self.scale)


def tiny_model():
    """A sentence's embedding is the mean of its words'; random weights, the same in each call."""
    torch.manual_seed(0)
    words = sorted({word for pair in PAIRS for text in pair for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)])


def train(model, loss, folder, steps=6):
    """Update the model a few times; return the losses."""
    rows = Dataset.from_dict(dict(zip(("anchor", "positive"), map(list, zip(*PAIRS, strict=True)), strict=True)))
    arguments = SentenceTransformerTrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=len(PAIRS), learning_rate=0.1, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=loss)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    model = tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        print(*(f"{float(value):.4f}" for value in train(model, SymmetricLoss(model), folder)))
