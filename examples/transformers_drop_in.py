"""β-CLIP's pooling and losses on a CLIP of transformers. Random data, a tiny model, nothing to download."""

import torch
from torch import nn
from toy import CONTEXT, VOCABULARY, train
from transformers import CLIPConfig, CLIPModel

from betaclip import BetaCALLoss, ClipLoss, TextConditionedPool
from betaclip.integrations.transformers import encode


class BetaCLIPLoss(nn.Module):
    """The loss of a batch of images (B, 3, H, W) with K texts each (B, K, L), of which the first is the caption."""

    def __init__(self, clip, beta=0.5):
        super().__init__()
        self.clip = clip
        self.pool = TextConditionedPool(clip.projection_dim, num_heads=8, identity=True)
        self.clip_loss, self.beta_cal_loss = ClipLoss(), BetaCALLoss("ce", beta=beta)

    def forward(self, images, texts):
        image, patches, text = encode(self.clip, images, texts)  # (B, D), (B, P, D), (B, K, D)
        pooled = self.pool(patches, text)  # (B, K, D): the image as each of its texts sees it
        global_loss = self.clip_loss(image, text[:, 0], self.clip.logit_scale.exp())
        return global_loss + self.beta_cal_loss(pooled, text, self.pool.logit_scale.exp())


def tiny_model():
    """Random weights, the same in each call."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    end = VOCABULARY - 1
    text = size | {"max_position_embeddings": CONTEXT, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": end}
    vision = size | {"image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


if __name__ == "__main__":
    print(*(f"{value:.4f}" for value in train(BetaCLIPLoss(tiny_model()))))
