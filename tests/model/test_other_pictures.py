"""Other pictures under the same text: the outputs of BetaCLIP, against each pair pooled by itself."""

import pytest
import torch
import torch.nn.functional as F
from support.tiny import IMAGE_SIZE, tiny_batch, tiny_model

from betaclip.model.other_pictures import identified
from betaclip.model.texts import RaggedTexts

# Three texts, one, none, two; the fourth image has a text of the first, and one of its own twice.
TOKENS = [[[3, 4], [5, 6, 7], [8, 9]], [[10, 11]], [], [[5, 6, 7], [12, 9], [12, 9]]]
B, K = 4, 3


@pytest.mark.parametrize("shifts", [[1], [3, 1, 2], [2, 0, 0], [0], [5, 4]])
def test_outputs(shifts):
    model, pictures = tiny_model().double(), torch.randn(B, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    texts = RaggedTexts.of(TOKENS)
    plain, out = model(pictures, texts), model(pictures, texts, other_pictures=shifts)
    for name, value in plain.items():
        torch.testing.assert_close(out[name], value, msg=lambda m, name=name: f"{name}: {m}")
    assert out["conditioned_negatives"].shape == out["conditioned_mask"].shape == (B, K, len(shifts))
    _, patches = model.encode_image(pictures)
    used = [shift % B for shift in shifts if shift % B]
    assert not out["conditioned_mask"][..., len(used) :].any()
    for b, own in enumerate(TOKENS):
        for k in range(K):
            for j, shift in enumerate(used):
                other = (b + shift) % B
                valid = k < len(own) and own[k] not in TOKENS[other]
                assert out["conditioned_mask"][b, k, j] == valid
                if valid:
                    text = out["text_embeds"][b, k]
                    pooled = model.pool(patches[other : other + 1], text[None])[0, 0]
                    cosine = F.cosine_similarity(pooled, text, dim=0)
                    torch.testing.assert_close(out["conditioned_negatives"][b, k, j], cosine)
                    if j == 0:
                        embeds = out["text_embeds"][out["mask"]]
                        different = (embeds != text).any(1)
                        nearest = F.cosine_similarity(pooled, embeds[different]).max() < cosine
                        assert out["conditioned_leak"][b, k] == nearest
    if not used:
        assert not out["conditioned_leak"].any()
    assert not out["conditioned_leak"].requires_grad


def test_scores():
    """The scores of own texts and of chosen others, each pair by itself; none that is missing or equals an own text."""
    model, pictures = tiny_model().double(), torch.randn(B, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    texts = RaggedTexts.of(TOKENS)
    # The fourth image's first text equals the second of the first image; slot 5 is empty.
    chosen = torch.tensor([[3, 9, 10], [1, 5, -1], [11, 10, 0], [1, 2, 3]])
    out = model(pictures, texts, other_texts=chosen, pooled=False)
    plain = model(pictures, texts)
    assert out.keys() == plain.keys() - {"pooled_embeds"} | {"scores", "scores_mask"}
    cosines = F.cosine_similarity(plain["pooled_embeds"], plain["text_embeds"], dim=-1)
    torch.testing.assert_close(out["scores"][:, :K][plain["mask"]], cosines[plain["mask"]])
    assert torch.equal(out["scores_mask"][:, :K], plain["mask"])
    expected = [[True, False, True], [True, False, False], [True, True, True], [False, True, True]]
    assert out["scores_mask"][:, K:].tolist() == expected
    assert not out["scores"][~out["scores_mask"]].any()
    _, patches = model.encode_image(pictures)
    flat = plain["text_embeds"].flatten(0, 1)
    for b, j in torch.tensor(expected).nonzero().tolist():
        text = flat[chosen[b, j]]
        pooled = model.pool(patches[b : b + 1], text[None])[0, 0]
        torch.testing.assert_close(out["scores"][b, K + j], F.cosine_similarity(pooled, text, dim=0))


@pytest.mark.parametrize("images", [0, 1])
def test_scores_without_other_pictures(images):
    model, batch = tiny_model(), tiny_batch(images)
    out = model(batch.images, batch.texts, K, other_texts=torch.full((images, 2), -1))
    assert out["scores"].shape == (images, K + 2) and not out["scores_mask"][:, K:].any()
    assert "pooled_embeds" in out


def test_gradients():
    """Through the other pictures' patches, the text and the pool."""
    model, batch = tiny_model().double(), tiny_batch(B)
    out = model(batch.images.double(), batch.texts, other_pictures=[1])
    out["conditioned_negatives"][out["conditioned_mask"]].sum().backward()
    for name in ("clip.visual.conv1.weight", "clip.token_embedding.weight", "pool.attn.in_proj_weight"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None and gradient.any(), name


def test_pictures_are_pooled_in_one_call(monkeypatch):
    """Each for its own three slots and then for the texts of others, of which none has more than four."""
    model, pictures, calls = tiny_model(), torch.randn(B, 3, IMAGE_SIZE, IMAGE_SIZE), []
    pool = model.pool.forward
    monkeypatch.setattr(model.pool, "forward", lambda x, t, texts: calls.append(texts) or pool(x, t, texts=texts))
    model(pictures, RaggedTexts.of(TOKENS), other_pictures=[1, 3, 0])
    (texts,) = calls
    assert texts.tolist() == [
        [0, 1, 2, 9, 10, 11, 3],
        [3, -1, -1, 0, 1, 2, -1],
        [-1, -1, -1, 3, 9, 10, 11],
        [9, 10, 11, 0, 1, 2, -1],
    ]


@pytest.mark.parametrize("images", [0, 1])
def test_no_other_picture(images):
    model, batch = tiny_model(), tiny_batch(images)
    out = model(batch.images, batch.texts, K, [0, 0])
    assert out["conditioned_negatives"].shape == (images, K, 2) and not out["conditioned_mask"].any()


def test_autocast():
    """Cosines are float32, and the leak does not depend on roundings that tie."""
    model, batch = tiny_model(), tiny_batch(6)
    exact = model(batch.images, batch.texts, other_pictures=[1])
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch.images, batch.texts, other_pictures=[1])
    assert out["conditioned_negatives"].dtype == torch.float32
    torch.testing.assert_close(out["conditioned_negatives"], exact["conditioned_negatives"], atol=0.05, rtol=0)


def test_identified(monkeypatch):
    """Equal texts do not compete, texts with negative numbers do not count, ties and NaN are not identified."""
    texts = F.normalize(torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 1]]), dim=1)
    embeds = torch.tensor([[2.0, 0.1], [0.5, 0.4], [0, 1], [torch.nan, 0]])
    own, number = texts[[0, 0, 2, 0]], torch.tensor([7, 7, 2, 7])
    for at_a_time in (2**24, 1):
        monkeypatch.setattr("betaclip.model.other_pictures._COMPARED", at_a_time)
        found = identified(embeds, own, number, texts, torch.tensor([7, 7, 2, 4]))
        assert found.tolist() == [True, False, True, False]
        assert identified(embeds, own, number, texts, torch.tensor([7, 7, 2, -1])).tolist() == [True, True, True, False]
        assert identified(embeds, own, number, texts, torch.tensor([7, 8, 2, -1])).tolist() == [
            False,
            False,
            True,
            False,
        ]
