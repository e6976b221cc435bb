"""Code that the examples share: a batch of random pictures and texts, and a few updates on it. Nothing to download."""

import torch

IMAGES, TEXTS_PER_IMAGE, CONTEXT, VOCABULARY = 16, 3, 8, 100


def random_batch():
    """Images (B, 3, 32, 32) and the token ids (B, K, L) of K texts for each; the last token ends a text."""
    torch.manual_seed(0)
    texts = torch.randint(VOCABULARY - 1, (IMAGES, TEXTS_PER_IMAGE, CONTEXT))
    texts[..., -1] = VOCABULARY - 1
    return torch.randn(IMAGES, 3, 32, 32), texts


def train(model, steps=6):
    """Update a model that returns its loss a few times on one batch; return the losses."""
    images, texts = random_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(images, texts)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values
