"""β-CLIP's pooling and losses on a model of open_clip. Random data, a tiny model, nothing to download."""

import open_clip
import torch
from torch import nn
from toy import CONTEXT, VOCABULARY, train

from betaclip import BetaCALLoss, ClipLoss, TextConditionedPool
from betaclip.integrations.open_clip import encode


class BetaCLIPLoss(nn.Module):
    """The loss of a batch of images (B, 3, H, W) with K texts each (B, K, L), of which the first is the caption."""

    def __init__(self, clip, beta=0.5):
        super().__init__()
        self.clip = clip
        self.pool = TextConditionedPool(clip.visual.output_dim, num_heads=8, identity=True)
        self.clip_loss, self.beta_cal_loss = ClipLoss(), BetaCALLoss("ce", beta=beta)

    def forward(self, images, texts):
        image, patches, text = encode(self.clip, images, texts)  # (B, D), (B, P, D), (B, K, D)
        pooled = self.pool(patches, text)  # (B, K, D): the image as each of its texts sees it
        global_loss = self.clip_loss(image, text[:, 0], self.clip.logit_scale.exp())
        return global_loss + self.beta_cal_loss(pooled, text, self.pool.logit_scale.exp())


def tiny_model():
    """A model whose random weights are the same in each call."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 64, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)


if __name__ == "__main__":
    print(*(f"{value:.4f}" for value in train(BetaCLIPLoss(tiny_model()))))
