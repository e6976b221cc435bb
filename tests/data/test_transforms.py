"""Reading images, broken ones too, and the transforms."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from betaclip.data.transforms import EvaluationTransform, TrainingTransform, UnreadableImageError, normalize, read_image


def _picture(width: int = 40, height: int = 30) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _file(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def test_reads(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(_file(_picture(), "PNG"))
    for source in (path, str(path), io.BytesIO(path.read_bytes())):
        assert np.array_equal(read_image(source), _picture())


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_reads_as_rgb(mode):
    assert read_image(io.BytesIO(_file(_picture().convert(mode), "TIFF"))).mode == "RGB"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated(form, share):
    data = _file(_picture(), form)
    with pytest.raises(UnreadableImageError):
        read_image(io.BytesIO(data[: int(share * len(data))]))


def test_missing_or_no_image(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"FileNotFoundError: .*nothing\.jpg"):
        read_image(tmp_path / "nothing.jpg")
    with pytest.raises(UnreadableImageError, match="UnidentifiedImageError"):
        read_image(io.BytesIO(b"<html>404</html>"))
    with pytest.raises(UnreadableImageError, match="UnidentifiedImageError"):
        read_image(io.BytesIO(b""))


def test_normalize():
    values = normalize(np.stack([np.full((2, 5), v, np.uint8) for v in (0, 128, 255)], -1))
    assert values.shape == (3, 2, 5) and values.dtype == torch.float32
    expected = [-0.48145466 / 0.26862954, (128 / 255 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711]
    torch.testing.assert_close(values[:, 0, 0], torch.tensor(expected))


def test_training_transform():
    transform, image = TrainingTransform(24), _picture(400, 300)
    first, again, other = (transform(image, seed) for seed in (3, 3, 4))
    assert first.shape == (3, 24, 24)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_training_transform_crops_the_published_share():
    crops = TrainingTransform(24).crop
    shares = []
    for _ in range(300):
        _, _, height, width = crops.get_params(_picture(), crops.scale, crops.ratio)
        shares.append(height * width / (40 * 30))
        assert 0.7 <= width / height <= 1.4
    assert 0.45 <= min(shares) < 0.6 and max(shares) > 0.9


def test_training_transform_leaves_the_random_state():
    before = torch.get_rng_state()
    TrainingTransform(24)(_picture(), 3)
    assert torch.equal(torch.get_rng_state(), before)
    first = TrainingTransform(24)(_picture(), 3)
    torch.manual_seed(99)
    assert torch.equal(TrainingTransform(24)(_picture(), 3), first)


def test_evaluation_transform():
    image = Image.new("RGB", (60, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))  # the central square is blue
    values = EvaluationTransform(10)(image)
    assert values.shape == (3, 10, 10)
    blue = normalize(np.array([[[0, 0, 255]]], np.uint8))
    torch.testing.assert_close(values[:, 3:7, 3:7], blue.expand(3, 4, 4))
