"""β-CLIP's pooling and losses in transformers' Trainer. Random data, a tiny model, nothing to download."""

import tempfile

from torch import nn
from toy import IMAGES, random_batch
from transformers import Trainer, TrainingArguments
from transformers_drop_in import BetaCLIPLoss, tiny_model


class ModelWithLoss(nn.Module):
    """Takes the data set's columns by name, and returns the loss by the name that Trainer looks for."""

    def __init__(self, beta_clip):
        super().__init__()
        self.beta_clip = beta_clip

    def forward(self, pixel_values, input_ids):
        return {"loss": self.beta_clip(pixel_values, input_ids)}


def train(model, folder, steps=6):
    """Update the model a few times; return the losses."""
    rows = [{"pixel_values": image, "input_ids": texts} for image, texts in zip(*random_batch(), strict=True)]
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=IMAGES, learning_rate=1e-3, lr_scheduler_type="constant",
        max_grad_norm=0, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(*(f"{float(value):.4f}" for value in train(ModelWithLoss(BetaCLIPLoss(tiny_model())), folder)))
