"""β-CLIP's pooling and losses in Lightning. Random data, a tiny model, nothing to download."""

import lightning
import torch
from open_clip_drop_in import BetaCLIPLoss, tiny_model
from torch.utils.data import DataLoader, TensorDataset
from toy import IMAGES, random_batch


class BetaCLIP(lightning.LightningModule):
    """On several devices the losses contrast all of their images, as ``gather="auto"`` says."""

    def __init__(self, beta_clip):
        super().__init__()
        self.beta_clip = beta_clip
        self.losses = []

    def training_step(self, batch, index):
        loss = self.beta_clip(*batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(model, steps=6, **options):
    """Update the model a few times; return the losses."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_steps=steps, log_every_n_steps=1, **quiet, **options)
    trainer.fit(model, DataLoader(TensorDataset(*random_batch()), batch_size=IMAGES))
    return model.losses


if __name__ == "__main__":
    print(*(f"{value:.4f}" for value in train(BetaCLIP(BetaCLIPLoss(tiny_model())))))
