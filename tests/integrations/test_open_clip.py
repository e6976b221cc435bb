"""open_clip's losses and models: against open_clip's own, on one rank and on several, and in open_clip's trainer."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import SigLipLoss as TheirSigLipLoss
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from support.colours import noise
from support.ranks import needs_gloo, processes
from support.towers import VOCABULARY, clip_model
from torch import Tensor, nn

import betaclip
from betaclip.integrations import open_clip as integration
from betaclip.integrations.open_clip import BetaCALLoss, ClipLoss, SigLipLoss, encode

N, D = 8, 12
LOSSES = [
    (ClipLoss, open_clip.ClipLoss, None),
    (ClipLoss, open_clip.ClipLoss, -2.0),
    (SigLipLoss, TheirSigLipLoss, -2.0),
    (BetaCALLoss, open_clip.ClipLoss, None),  # β-CAL of one text per image is CLIP's loss
    (BetaCALLoss, open_clip.ClipLoss, -2.0),
]


def leaves_of(bias: float | None, rows: slice = slice(None)) -> dict[str, Tensor]:
    """Embeddings, scale and bias; rows of the same whole batch in every process."""
    generator = torch.Generator().manual_seed(5)
    image, text = torch.randn(2, N, D, generator=generator, dtype=torch.float64)
    leaves = {"image_features": image[rows], "text_features": text[rows], "logit_scale": torch.tensor(7.0).double()}
    if bias is not None:
        leaves["logit_bias"] = torch.tensor(bias).double()
    return {name: value.clone().requires_grad_() for name, value in leaves.items()}


def model_output(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """What open_clip's models return."""
    return {name: F.normalize(value, dim=-1) if value.dim() else value for name, value in leaves.items()}


def value_and_gradients(loss: nn.Module, bias: float | None, rows: slice = slice(None)) -> dict[str, Tensor]:
    leaves = leaves_of(bias, rows)
    value = loss(**model_output(leaves), output_dict=True)
    assert value.keys() == {"contrastive_loss"}
    gradients = torch.autograd.grad(value["contrastive_loss"], list(leaves.values()))
    return {"loss": value["contrastive_loss"].detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("ours, theirs, bias", LOSSES)
def test_equals_open_clips(ours: Callable[[], nn.Module], theirs: Callable[[], nn.Module], bias: float | None) -> None:
    found, expected = (value_and_gradients(loss(), bias) for loss in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    out = model_output(leaves_of(bias))
    torch.testing.assert_close(ours()(**out).detach(), found["loss"])  # a tensor without output_dict


@pytest.mark.parametrize("form", ["ce", "bce"])
def test_beta_cal_of_several_texts(form: str) -> None:
    image, text = torch.randn(2, 4, 3, D, dtype=torch.float64)
    mask = torch.rand(4, 3) < 0.7
    scale, bias = torch.tensor(5.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    expected = betaclip.BetaCALLoss(form, beta=0.3)(image, text, scale, mask=mask, logit_bias=bias)
    loss = BetaCALLoss(form=form, beta=0.3)
    found = loss(image_features=image, text_features=text, logit_scale=scale, logit_bias=bias, mask=mask)
    torch.testing.assert_close(found, expected)


def test_one_image_embedding_for_all_texts() -> None:
    """The sigmoid form takes it; the softmax form warns, in tests/losses."""
    image, text = torch.randn(4, D), torch.randn(4, 3, D)
    scale = torch.tensor(5.0)
    expected = betaclip.BetaCALLoss("bce")(image[:, None].expand_as(text), text, scale)
    torch.testing.assert_close(BetaCALLoss(form="bce")(image, text, scale), expected)


def several_ranks_equal_open_clips() -> None:
    """Averaged over ranks: losses, and gradients as DistributedDataParallel averages those of parameters."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * N // size, (rank + 1) * N // size)

    def run(loss: nn.Module, bias: float | None) -> dict[str, Tensor]:
        found = value_and_gradients(loss, bias, rows)
        for name in ("loss", "logit_scale", *(["logit_bias"] if bias is not None else [])):
            dist.all_reduce(found[name])
            found[name] /= size
        return found

    whole = value_and_gradients(open_clip.ClipLoss(), None)
    ranks = {"rank": rank, "world_size": size}
    for local in (False, True):
        for bias in (None, -2.0):
            expected = run(open_clip.ClipLoss(local, True, **ranks), bias)
            for transport in ("all_gather", "ring"):
                found = run(ClipLoss(local, True, **ranks, transport=transport), bias)
                torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
            torch.testing.assert_close(run(BetaCALLoss(local, True, **ranks), bias), expected, atol=1e-12, rtol=0)
    # open_clip's default flags: the same value, but 1/W of the towers' gradients.
    ours, theirs = run(ClipLoss(**ranks), None), run(open_clip.ClipLoss(**ranks), None)
    torch.testing.assert_close(theirs["loss"], ours["loss"])
    for name in ("image_features", "text_features"):
        torch.testing.assert_close(theirs[name] * size, ours[name])
        torch.testing.assert_close(ours[name] / size, whole[name][rows])
    for how in (None, "bidir", "shift", "reduce", "gather"):
        ours, theirs = (run(loss(**ranks, dist_impl=how), -2.0) for loss in (SigLipLoss, TheirSigLipLoss))
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    # A world size of 1 is this rank alone, whatever process group there is.
    alone = value_and_gradients(open_clip.ClipLoss(), None, rows)
    torch.testing.assert_close(value_and_gradients(ClipLoss(), None, rows), alone)
    for wrong in ({"rank": 1 - rank, "world_size": 2}, {"rank": rank, "world_size": 3}):
        with pytest.raises(ValueError, match=r"rank, world_size: expected \(\d, 2\) as in the process group, got"):
            ClipLoss(**wrong)


@needs_gloo
def test_several_ranks_equal_open_clips(tmp_path: Path) -> None:
    processes(2, several_ranks_equal_open_clips, tmp_path)


def test_rejects() -> None:
    with pytest.raises(NotImplementedError, match="use_horovod: expected False"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match=r"dist_impl: expected one of None, 'gather', .*, got 'star'"):
        SigLipLoss(dist_impl="star")
    with pytest.raises(ValueError, match=r"transport: expected .*all_gather.*, got 'star'"):
        ClipLoss(transport="star")
    with pytest.raises(RuntimeError, match="gather='all_gather': no process group is initialised"):
        ClipLoss(world_size=2)(**model_output(leaves_of(None)))


class Recorded(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss, self.values = loss, []

    def forward(self, **model_out: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.loss(**model_out)
        self.values.append(losses["contrastive_loss"].item())
        return losses


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV file of pictures and captions, and a model of open_clip that is small enough for tests."""
    folder = tmp_path_factory.mktemp("pairs")
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (folder / "betaclip-test.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder / "betaclip-test.json")
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("filepath", "title"))
        for i in range(8):
            Image.fromarray(noise(i, 20)).save(folder / f"{i}.png")
            rows.writerow((folder / f"{i}.png", f"picture number {i}"))
    return folder / "pairs.csv"


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("siglip", [False, True], ids=["clip", "siglip"])
def test_open_clip_trains(
    pairs: Path, siglip: bool, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip's trainer itself, with the loss swapped in: losses of two steps, the second after an update."""
    pytest.importorskip("pandas", reason="open_clip's trainer reads CSV files by pandas, of the extra 'test'")
    main = pytest.importorskip("open_clip_train.main")
    monkeypatch.setattr(main, "setup_logging", lambda *_: None)  # would change every logger of the process
    monkeypatch.setattr(main, "random_seed", lambda seed, rank=0: torch.manual_seed(seed + rank))  # only what is used
    create_loss = main.create_loss

    def train(name: str, create: Callable[[Any], nn.Module]) -> list[float]:
        recorded = []
        monkeypatch.setattr(main, "create_loss", lambda args: recorded.append(Recorded(create(args))) or recorded[0])
        options = {
            "train-data": pairs, "dataset-type": "csv", "csv-separator": ",", "model": "betaclip-test",
            "precision": precision, "batch-size": 4, "epochs": 1, "workers": 0, "lr": 0.01, "warmup": 1,
            "device": "cpu", "logs": tmp_path, "name": name,
        }  # fmt: skip
        flags = [text for option, value in options.items() for text in (f"--{option}", str(value))]
        main.main(flags + ["--siglip"] * siglip)
        return recorded[0].values

    def ours(args: Any) -> nn.Module:
        if siglip:
            return SigLipLoss(rank=args.rank, world_size=args.world_size, dist_impl=args.loss_dist_impl)
        return ClipLoss(
            args.local_loss, args.gather_with_grad, True, args.rank, args.world_size, use_horovod=args.horovod
        )

    found, expected = train("ours", ours), train("theirs", create_loss)
    assert len(found) == 2 and abs(found[1] - found[0]) > 0.01
    assert found == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 5e-2)


def texts_of(model: Any, texts: int = 3, images: int = 2) -> Tensor:
    return torch.randint(1, VOCABULARY, (images, texts, model.context_length))


VISION = [
    {},
    {"pool_type": "avg"},
    {"final_ln_after_pool": True},
    {"pool_type": "avg", "final_ln_after_pool": True},
]


@pytest.mark.parametrize("vision", VISION, ids=str)
@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_encode(kind: type[nn.Module], vision: dict[str, Any]) -> None:
    model, images = clip_model(kind, vision=vision), torch.randn(2, 3, 24, 24)
    texts = texts_of(model)
    out = encode(model, images, texts)
    assert model.visual.output_tokens is False
    torch.testing.assert_close(out.image, model.encode_image(images))
    torch.testing.assert_close(out.texts[1, 2], model.encode_text(texts[1, 2:])[0])
    torch.testing.assert_close(encode(model, images, texts.flatten(0, 1)).texts, out.texts.flatten(0, 1))
    x = model.visual.transformer(model.visual._embeds(images))
    torch.testing.assert_close(out.patches, (model.visual.ln_post(x) @ model.visual.proj)[:, 1:])


def timm_vision(**options: Any) -> dict[str, Any]:
    """timm's smallest ViT, on small pictures."""
    return {"image_size": 32, "timm_model_name": "vit_tiny_patch16_224", **options}


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's models with one block, on pictures of 32 pixels."""
    import timm

    create = timm.create_model
    sizes = {"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **sizes, **options))


@pytest.mark.usefixtures("small_timm")
@pytest.mark.parametrize("pool, proj", [("map", "none"), ("avg", "linear"), ("token", "mlp"), ("avg", "")])
def test_encode_timm(pool: str, proj: str) -> None:
    """SigLIP's towers, and projections of other timm models."""
    model = clip_model(CustomTextCLIP, vision=timm_vision(timm_pool=pool, timm_proj=proj)).eval()
    images = torch.randn(2, 3, 32, 32)
    out = encode(model, images, texts_of(model))
    torch.testing.assert_close(out.image, model.encode_image(images))
    trunk = model.visual.trunk
    tokens = trunk.forward_features(images)
    assert out.patches.shape == (2, 4, 12)
    if pool == "map":
        torch.testing.assert_close(trunk.attn_pool(out.patches), out.image)
    elif pool == "token":
        torch.testing.assert_close(model.visual.head(tokens)[:, 1:], out.patches)
    else:
        one = model.visual.head(trunk.forward_head(tokens[:, :2]))  # the mean of one patch, without the class token
        torch.testing.assert_close(out.patches[:, 0], one)


def test_encode_has_gradients() -> None:
    model = clip_model()
    out = encode(model, torch.randn(2, 3, 24, 24), texts_of(model))
    sum(t.square().sum() for t in out).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None and name != "logit_scale"]
    assert not missing


@pytest.mark.parametrize(
    "vision, message",
    [
        (
            {"attentional_pool": True, "attn_pooler_heads": 4},
            "output tokens are patches, got one with attentional_pool",
        ),
        ({"pool_type": "none"}, "output tokens are patches, got one with pool_type 'none'"),
        ({"layers": (1, 1, 1, 1), "width": 64, "image_size": 32}, "whose vision tower is a ModifiedResNet"),
    ],
)
def test_encode_refuses_towers_without_patches(vision: dict[str, Any], message: str) -> None:
    model = clip_model(vision=vision)
    with pytest.raises(NotImplementedError, match=message):
        encode(model, torch.randn(2, 3, 24, 24), texts_of(model))


def test_encode_refuses_other_models() -> None:
    with pytest.raises(NotImplementedError, match=r"got a Linear \(of a wrapper such as DistributedDataParallel, pass"):
        encode(nn.Linear(2, 2), torch.randn(2, 3, 24, 24), torch.zeros(2, 3, 5, dtype=torch.int64))


def test_constructors_are_open_clips() -> None:
    """The arguments of open_clip's constructors, in their order, so that they can be given by position."""
    import inspect

    for ours, theirs in (
        (ClipLoss, open_clip.ClipLoss),
        (BetaCALLoss, open_clip.ClipLoss),
        (SigLipLoss, TheirSigLipLoss),
    ):
        own = [p for p in inspect.signature(ours).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        expected = list(inspect.signature(theirs).parameters.values())
        assert [(p.name, p.default) for p in own] == [(p.name, p.default) for p in expected]
    assert integration.BetaCALLoss().loss.beta == betaclip.BetaCALLoss().beta
