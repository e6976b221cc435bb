"""betaclip's losses in transformers' own model and training step. Random data, a tiny model, nothing to download."""

import torch
from transformers import CLIPConfig, CLIPModel

from betaclip import BetaCALLoss, ClipLoss

B, K, L, VOCABULARY = 16, 3, 8, 100


def transformers_loss(model, images, texts):
    """Before: images (B, 3, H, W), one text for each (B, L)."""
    out = model(texts, images, return_loss=True)
    return out.loss


def clip_loss(model, images, texts):
    """After: the same loss; ``return_loss=True`` is then of no use."""
    out = model(texts, images, return_loss=True)
    return ClipLoss()(out.image_embeds, out.text_embeds, model.logit_scale.exp())  # changed: return out.loss


def beta_cal_loss(model, images, texts):
    """After: β-CAL, K texts for each image (B, K, L)."""
    out = model(texts.flatten(0, 1), images)  # changed: out = model(texts, images, return_loss=True)
    # β-CLIP pools an image embedding per text. CLIP's one serves all K (stride 0), and β matters in form="bce" only.
    return BetaCALLoss(beta=0.5)(  # changed: return out.loss
        out.image_embeds[:, None].expand(-1, K, -1), out.text_embeds.unflatten(0, (-1, K)), model.logit_scale.exp()
    )


def tiny_model():
    torch.manual_seed(0)  # every run starts from the same weights
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"max_position_embeddings": L, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 99}
    vision = size | {"image_size": 32, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def main(steps=6):
    torch.manual_seed(0)
    images, texts = torch.randn(B, 3, 32, 32), torch.randint(VOCABULARY - 1, (B, K, L))
    texts[..., -1] = VOCABULARY - 1  # the end of a text, where its embedding is read
    losses = {}
    for step, batch in ((transformers_loss, texts[:, 0]), (clip_loss, texts[:, 0]), (beta_cal_loss, texts)):
        model, values = tiny_model(), losses.setdefault(step.__name__, [])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = step(model, images, batch)
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        print(f"{step.__name__:18}", *(f"{value:.5f}" for value in values))
    return losses


if __name__ == "__main__":
    main()
