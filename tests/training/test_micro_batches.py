from support.tiny import tiny_batch

from betaclip.training.micro_batches import token_bounds, tokens_per_image


def test_tokens_per_image():
    batch = tiny_batch(4)
    texts = batch.texts
    assert tokens_per_image(batch, patches=4) == [
        5 + int(texts.lengths[texts.image_index == image].sum()) for image in range(4)
    ]
    assert tokens_per_image(batch.of_images(2, 2), patches=4) == []


def test_token_bounds():
    assert token_bounds([3, 3, 3, 3], 6) == [0, 2, 4]
    assert token_bounds([3, 3, 3, 3], 5) == [0, 1, 2, 3, 4]
    assert token_bounds([9, 1, 2, 9], 3) == [0, 1, 3, 4]  # an image that is too large is alone
    assert token_bounds([1, 1], 100) == [0, 2]
    assert token_bounds([], 5) == [0, 0]
