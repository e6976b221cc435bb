"""betaclip's loss in sentence-transformers, which its trainer takes, too. A tiny model, nothing to download.

Two sentences that mean the same are each other's positives, the other sentences of the batch are negatives.
"""

import torch
from sentence_transformers import SentenceTransformer
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
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")


def train(model, loss, steps=6):
    """Update the model a few times; return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss([model.tokenize(list(texts)) for texts in zip(*PAIRS, strict=True)], None)
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


if __name__ == "__main__":
    model = tiny_model()
    print(*(f"{value:.4f}" for value in train(model, SymmetricLoss(model))))
