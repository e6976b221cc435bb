"""betaclip's losses in open_clip's own model and training step. Random data, a tiny model, nothing to download."""

import open_clip
import torch

from betaclip import BetaCALLoss, ClipLoss

B, K, L, VOCABULARY = 16, 3, 8, 100


def open_clip_loss(model, images, texts):
    """Before: images (B, 3, H, W), one text for each (B, L)."""
    out = model(images, texts)
    return open_clip.ClipLoss()(**out)


def clip_loss(model, images, texts):
    """After: the same loss without its (B, B) matrix."""
    out = model(images, texts)
    return ClipLoss()(*out.values())  # changed: return open_clip.ClipLoss()(**out)


def beta_cal_loss(model, images, texts):
    """After: β-CAL, K texts for each image (B, K, L)."""
    image, text, logit_scale = model(images, texts.flatten(0, 1)).values()  # changed: out = model(images, texts)
    # β-CLIP pools an image embedding per text. CLIP's one serves all K (stride 0), and β matters in form="bce" only.
    # changed: return open_clip.ClipLoss()(**out)
    return BetaCALLoss(beta=0.5)(image[:, None].expand(-1, K, -1), text.unflatten(0, (-1, K)), logit_scale)


def tiny_model():
    torch.manual_seed(0)  # every run starts from the same weights
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 32, "layers": 2}
    text = {"context_length": L, "vocab_size": VOCABULARY, "width": 64, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text, output_dict=True)


def main(steps=6):
    torch.manual_seed(0)
    images, texts = torch.randn(B, 3, 32, 32), torch.randint(VOCABULARY - 1, (B, K, L))
    texts[..., -1] = VOCABULARY - 1  # the end of a text, where its embedding is read
    losses = {}
    for step, batch in ((open_clip_loss, texts[:, 0]), (clip_loss, texts[:, 0]), (beta_cal_loss, texts)):
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
