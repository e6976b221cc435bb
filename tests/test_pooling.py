"""The pooling block: published values, masks, dtypes, compilation, and modules around its own."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.adapters import AdaptedLinear, Adapter, hooked
from support.paths import GOLDEN
from support.pooling import DEVICE, FLAIR_BLOCK, block, inputs, published, saved_bytes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from betaclip import BetaCALLoss, TextConditionedPool
from betaclip.kernels.attention_pool.operators import BACKENDS, PROJECTED

BLOCK = load_file(GOLDEN / "text_conditioned_pool.safetensors")


PREFIX = "text_conditioned_patches_block."


def golden_pool(backend: str = "auto") -> TextConditionedPool:
    pool = TextConditionedPool(32, 8, backend=backend)
    pool.load_state_dict({name[len(PREFIX) :]: t for name, t in BLOCK.items() if name.startswith(PREFIX)})
    return pool.to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_published_outputs(backend):
    """Values of the released code, on a small model of its layout."""
    patches, texts = (BLOCK[f"out.{name}"].to(DEVICE) for name in ("patch_and_cls_embed", "text_embed_normalized"))
    out = golden_pool(backend)(patches[:, 1:], texts)
    torch.testing.assert_close(out, BLOCK["out.pooled_image_embed"].to(DEVICE), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["ce", "bce"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_published_gradients(backend, form):
    """Through the loss: the block's gradients in the released code."""
    pool = golden_pool(backend)
    patches, texts = (BLOCK[f"out.{name}"].to(DEVICE) for name in ("patch_and_cls_embed", "text_embed_normalized"))
    loss = BetaCALLoss(form, padding="published")(
        pool(patches[:, 1:], texts), texts, pool.logit_scale.exp(), mask=BLOCK["out.mask"].bool().to(DEVICE)
    )
    torch.testing.assert_close(loss, BLOCK[f"{form}.loss_beta_cal"].to(DEVICE), atol=1e-5, rtol=1e-5)
    loss.backward()
    start = f"{form}.grad.{PREFIX}"
    expected = {name[len(start) :]: t for name, t in BLOCK.items() if name.startswith(start)}
    assert set(expected) == {"attn.in_proj_weight", "mlp.c_fc.weight", "logit_scale"}
    for name, t in expected.items():
        largest = float(t.abs().max())
        torch.testing.assert_close(pool.get_parameter(name).grad, t.to(DEVICE), atol=1e-4 * largest, rtol=0)


@pytest.mark.parametrize("norm_inputs", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_multihead_attention_and_mlp(backend, norm_inputs):
    """Value and every gradient, the keys' bias included: it has one, of zeros."""
    if BACKENDS[backend](*inputs()):
        pytest.skip("; ".join(BACKENDS[backend](*inputs())))
    pool = block(norm_inputs, backend)
    leaves = [t.requires_grad_() for t in inputs()]
    weight = torch.randn(3, 5, 16, dtype=torch.float64, device=DEVICE)
    wanted = [*leaves, *(p for name, p in pool.named_parameters() if name != "logit_scale")]
    expected = published(pool, *leaves)[0]
    torch.testing.assert_close(pool(*leaves), expected)
    ours, truth = (torch.autograd.grad(out, wanted, weight) for out in (pool(*leaves), expected))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_attend_is_everything_but_the_mlp():
    pool, (patches, queries) = block(), inputs()
    out = pool.attend(patches, queries)
    unit = F.normalize(patches, dim=-1)
    torch.testing.assert_close(out, pool.attn(F.normalize(queries, dim=-1), unit, unit)[0])
    torch.testing.assert_close(pool(patches, queries), out + pool.mlp(pool.ln_2(out)))


def test_parameters_have_the_published_names():
    names = set(TextConditionedPool(16, 4).state_dict())
    assert names == {name[len(PREFIX) :] for name in BLOCK if name.startswith(PREFIX)} | {"ln_2.weight", "ln_2.bias"}
    added = set(TextConditionedPool(16, 4, norm_inputs=True).state_dict()) - names
    assert added == {f"{ln}.{p}" for ln in ("ln_1", "ln_1_kv") for p in ("weight", "bias")}


def test_identity_is_attention_without_parameters():
    """Head by head the mean of the patches, weighted by their likeness to the text."""
    pool = TextConditionedPool(16, 4, norm_inputs=True, identity=True).to(DEVICE).double()
    patches, queries = inputs()
    normal = [F.layer_norm(F.normalize(t, dim=-1), (16,)) for t in (queries, patches, patches)]
    heads = (t.unflatten(2, (4, 4)).transpose(1, 2) for t in normal)
    mean = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(pool(patches, queries), mean)


def test_mlp_ratio_and_scale():
    pool = TextConditionedPool(16, 4, mlp_ratio=2.5)
    assert pool.mlp.c_fc.weight.shape == (40, 16)
    assert float(pool.logit_scale.detach().exp()) == pytest.approx(1 / 0.07)
    assert float(TextConditionedPool(16, 4, init_logit_scale=2.5).logit_scale.detach()) == 2.5


def test_need_weights():
    pool, (patches, queries) = block(), inputs()
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4, [False] * 7], device=DEVICE)
    of_queries = torch.arange(5, device=DEVICE) < torch.tensor([[5], [3], [2]], device=DEVICE)
    out, weights = pool(patches, queries, need_weights=True)
    torch.testing.assert_close(out, pool(patches, queries))
    torch.testing.assert_close(weights, published(pool, patches, queries)[1])
    _, weights = pool(patches, queries, patch_mask=mask, query_mask=of_queries, need_weights=True)
    assert not weights[1, :, 3:].any() and not weights[1, 3:].any() and not weights[2].any()
    torch.testing.assert_close(weights[1, :3].sum(-1), torch.ones_like(weights[1, :3, 0]))


@pytest.mark.parametrize("norm_inputs", [False, True])
@pytest.mark.parametrize("backend", ["folded", "sdpa", "reference"])
def test_masks(backend, norm_inputs):
    """Masked rows may hold anything, give zeros and get zero gradients; the rest is as if they were not there."""
    pool, (patches, queries) = block(norm_inputs, backend), inputs()
    patch_mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4, [False] * 7], device=DEVICE)
    query_mask = torch.arange(5, device=DEVICE) < torch.tensor([[5], [3], [2]], device=DEVICE)
    leaves = [
        t.masked_fill(~mask[..., None], torch.nan).requires_grad_()
        for t, mask in ((patches, patch_mask), (queries, query_mask))
    ]
    out = pool(*leaves, patch_mask=patch_mask, query_mask=query_mask)
    torch.testing.assert_close(out[0], published(pool, patches[:1], queries[:1])[0][0])
    torch.testing.assert_close(out[1, :3], published(pool, patches[1:2, :3], queries[1:2, :3])[0][0])
    assert not out[1, 3:].any() and not out[2].any()
    attended = pool.attend(*leaves, patch_mask=patch_mask, query_mask=query_mask)
    assert not attended[1, 3:].any() and not attended[2].any() and attended[1, :3].all()
    gradients = torch.autograd.grad(out.square().sum(), [*leaves, *(p for p in pool.parameters() if p.dim())])
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][~patch_mask].any() and not gradients[1][~query_mask].any() and not gradients[0][2].any()
    assert gradients[0][0].all() and gradients[1][1, :3].all()


def test_ragged_texts_cost_no_memory():
    """A mask of texts adds only itself to the tensors kept for the backward."""
    pool, (patches, queries) = block(backend="folded"), inputs(k=40)
    leaves = [t.requires_grad_() for t in (patches, queries)]
    mask = torch.rand(3, 40, device=DEVICE) < 0.5
    masks = 4 * mask.numel()  # bool, inverted, of queries and of the result
    assert saved_bytes(lambda: pool(*leaves, query_mask=mask)) <= saved_bytes(lambda: pool(*leaves)) + masks


def test_queries_shared_by_all_images():
    pool, (patches, queries) = block(), inputs()
    shared = queries[0]
    torch.testing.assert_close(pool(patches, shared), pool(patches, shared.expand(3, 5, 16)))
    mask = torch.arange(5, device=DEVICE) < torch.tensor([[5], [3], [2]], device=DEVICE)
    expected = pool(patches, shared).masked_fill(~mask[..., None], 0)
    torch.testing.assert_close(pool(patches, shared, query_mask=mask), expected)


@pytest.mark.parametrize("options", [{"norm_inputs": True}, FLAIR_BLOCK])
def test_numbered_texts(options):
    """As if each image had the texts of its numbers; a negative number is no text."""
    pool = block(**options)
    patches, queries = (torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in ((3, 5, 16), (4, 16)))
    texts = torch.tensor([[0, 3], [-1, 1], [3, 3]], device=DEVICE)
    valid = texts >= 0
    leaves = [t.requires_grad_() for t in (patches, queries, pool.attn.in_proj_weight)]
    ours, weights = pool(patches, queries, texts=texts, need_weights=True)
    truth = pool(patches, queries[texts], query_mask=valid, need_weights=True)
    torch.testing.assert_close((ours, weights), truth)
    assert not ours[1, 0].any() and ours[1, 1].all()
    gradients = (torch.autograd.grad(out.square().sum(), leaves) for out in (ours, truth[0]))
    for ours, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, truth)


def test_autocast():
    """Products in its dtype, LayerNorm and softmax in float32; parameters and gradients stay as they are."""
    pool, (patches, queries) = block().float(), (t.float() for t in inputs())
    patches, queries = patches.requires_grad_(), queries
    expected = pool(patches, queries)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = pool(patches, queries)
        mixed = pool(patches.to(torch.bfloat16), queries)
        scores = pool.score(patches, queries[0])
        chosen = pool.score(patches, queries[0], images=torch.tensor([[2], [0], [1], [1], [2]]))
    assert out.dtype == mixed.dtype == torch.bfloat16 and scores.dtype == chosen.dtype == torch.float32
    torch.testing.assert_close(chosen[:, 0], scores[[2, 0, 1, 1, 2], range(5)], atol=2e-2, rtol=0)
    size = float(expected.detach().abs().max())
    torch.testing.assert_close(out.float(), expected, atol=2e-2 * size, rtol=0)
    torch.testing.assert_close(mixed.float(), expected, atol=2e-2 * size, rtol=0)
    (dx,) = torch.autograd.grad(out.float().square().sum(), patches)
    (truth,) = torch.autograd.grad(expected.square().sum(), patches)
    assert dx.dtype == torch.float32
    torch.testing.assert_close(dx, truth, atol=5e-2 * float(truth.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype):
    pool, (patches, queries) = block(), inputs()
    expected = pool(patches, queries)
    out = pool.to(dtype)(patches.to(dtype), queries.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=3e-2 * float(expected.abs().max()), rtol=0)


def test_compile():
    """One graph, also when the sizes change."""
    pool = block()
    compiled = torch.compile(pool, fullgraph=True, backend="eager")
    for b, k in ((2, 3), (3, 4)):
        leaves = [t.requires_grad_() for t in inputs(b, k)]
        eager, graph = pool(*leaves), compiled(*leaves)
        torch.testing.assert_close(graph, eager)
        weight = torch.randn_like(eager)
        for a, e in zip(*(torch.autograd.grad(out, leaves, weight) for out in (graph, eager)), strict=True):
            torch.testing.assert_close(a, e)


class PooledLoss(nn.Module):
    """Both halves of the method: each text pools the patches, and β-CAL contrasts the results."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.loss = block().float(), BetaCALLoss()

    def forward(self, patches: Tensor, texts: Tensor) -> Tensor:
        return self.loss(self.pool(patches, texts), texts, 20.0)


def test_compile_with_the_loss():
    """Inductor, which generates code for all around the operators; in float32, since that of torch 2.9 fails on SDPA's
    gradient in float64 on the CPU."""
    model = PooledLoss()
    compiled = torch.compile(model, fullgraph=True)
    leaves = [t.float().requires_grad_() for t in inputs(4, 3)]
    graph, eager = compiled(*leaves), model(*leaves)
    torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-4)
    for a, e in zip(*(torch.autograd.grad(out, leaves) for out in (graph, eager)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.__version__ < "2.11", reason="PyTorch's export fails here: <size> is not tracked with proxy")
@pytest.mark.parametrize("backend", ["folded", "sdpa"])
def test_export(backend):
    """A named backend is exported once, for any number of images and of texts; "auto" depends on both."""
    pool = block(backend=backend)
    images, texts = torch.export.Dim("B", min=2, max=1024), torch.export.Dim("K", min=2, max=64)
    sizes = {"patches": {0: images}, "queries": {0: images, 1: texts}}
    exported = torch.export.export(pool, inputs(2, 3), dynamic_shapes=sizes)
    arguments = inputs(4, 60)
    torch.testing.assert_close(exported.module()(*arguments), pool(*arguments))


@pytest.mark.parametrize("backend", ["auto", "folded", "sdpa", "reference"])
def test_meta_device(backend):
    """Shapes and dtypes without values, as for estimates of memory."""
    pool, (patches, queries) = block(backend=backend).to("meta"), (t.to("meta") for t in inputs())
    mask = torch.ones(patches.shape[:2], dtype=torch.bool, device="meta")
    out = pool(patches, queries.requires_grad_(), patch_mask=mask)
    assert out.is_meta and out.shape == queries.shape
    (gradient,) = torch.autograd.grad(out.sum(), queries)
    assert gradient.is_meta and gradient.shape == queries.shape
    assert pool.score(patches, queries[0]).shape == (len(patches), queries.shape[1])


@pytest.mark.parametrize("backend", PROJECTED)
def test_second_derivatives(backend):
    pool, leaves = block(backend=backend), [t.requires_grad_() for t in inputs(1, 2, 3)]
    second = []
    for function in (lambda *t: pool(*t), lambda *t: published(pool, *t)[0]):
        with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
            first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
            second.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for ours, truth in zip(*second, strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("options", [{}, {"norm_inputs": True}, FLAIR_BLOCK])
def test_device_and_dtype(options):
    options = {**options, "identity": True}
    pool = TextConditionedPool(16, 4, **options, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in pool.parameters()} == {("meta", torch.float64)}
    made = TextConditionedPool(16, 4, **options, device=DEVICE, dtype=torch.float64)
    assert made(*inputs()).dtype == torch.float64
    cast = TextConditionedPool(16, 4, **options).state_dict()
    assert made.state_dict().keys() == cast.keys()
    assert all(value.dtype == torch.float64 for value in made.state_dict().values())


class LowRank(nn.Module):
    """A parametrization: a weight plus a product of rank 1."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(n, 1).to(weight)) for n in weight.shape)
        self.evaluated = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.evaluated += 1
        return weight + self.a @ self.b.T


def test_parametrized_attention_acts():
    """It takes effect as in nn.MultiheadAttention, and is evaluated once per call, so it may be random."""
    pool, (patches, queries) = block(), inputs()
    before = pool(patches, queries)
    lora = LowRank(pool.attn.in_proj_weight)
    parametrize.register_parametrization(pool.attn, "in_proj_weight", lora)
    lora.evaluated = 0
    out = pool(patches, queries)
    assert lora.evaluated == 1
    torch.testing.assert_close(out, published(pool, patches, queries)[0])
    assert not torch.allclose(out, before)
    assert all(g.any() for g in torch.autograd.grad(out.square().sum(), [lora.a, lora.b]))
    lora.evaluated = 0
    pool.score(patches, queries[0], chunk_bytes=1)
    assert lora.evaluated == 1


@pytest.mark.parametrize("call", [TextConditionedPool.forward, TextConditionedPool.attend, TextConditionedPool.score])
@pytest.mark.parametrize("wrap", [Adapter, hooked])
def test_wrapped_attention_is_refused(wrap, call):
    """The block would read its weights and never call the wrapper."""
    pool, (patches, queries) = block(), inputs()
    pool.attn = wrap(pool.attn)
    with pytest.raises(
        NotImplementedError, match=r"Pool reads .* attn has (a forward|hooks).* Adapt attn.out_proj, mlp.c_fc"
    ):
        call(pool, patches, queries[0])


@pytest.mark.parametrize("name", ["attn.out_proj", "mlp.c_fc", "mlp.c_proj"])
def test_wrapped_linear_layers_act(name):
    pool, (patches, queries) = block(), inputs()
    before = pool(patches, queries)
    parent, _, child = name.rpartition(".")
    layer = pool.get_submodule(name)
    setattr(pool.get_submodule(parent), child, adapted := AdaptedLinear(layer))
    out = pool(patches, queries)
    assert not torch.allclose(out, before)
    assert torch.autograd.grad(out.square().sum(), adapted.added)[0].any()


def test_unknown_backend():
    with pytest.raises(ValueError, match="'fast'"):
        block(backend="fast")(*inputs())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"patches": torch.ones(2, 8)}, r"patches: expected \(B, P, 8\) with P >= 1, got shape \(2, 8\)"),
        ({"patches": torch.ones(2, 0, 8)}, r"patches: expected \(B, P, 8\) with P >= 1, got shape \(2, 0, 8\)"),
        ({"patches": torch.ones(2, 5, 4)}, r"patches: expected \(B, P, 8\) with P >= 1, got shape \(2, 5, 4\)"),
        ({"patches": torch.ones(2, 5, 8).long()}, r"patches: expected float16, .* or float64, got torch.int64"),
        ({"patches": torch.ones(2, 5, 8).bfloat16()}, r"patches: expected dtype torch.float32 as in the module's"),
        ({"queries": torch.ones(3, 6, 8)}, r"queries: expected \(2, K, 8\) or \(K, 8\) .*, got shape \(3, 6, 8\)"),
        ({"queries": torch.ones(2, 6, 4)}, r"queries: expected \(2, K, 8\) or \(K, 8\) .*, got shape \(2, 6, 4\)"),
        ({"queries": torch.ones(8)}, r"queries: expected \(2, K, 8\) or \(K, 8\) .*, got shape \(8,\)"),
        ({"queries": torch.ones(2, 6, 8).double()}, r"queries: expected dtype torch.float32 as .*, got torch.float64"),
        ({"queries": torch.ones(2, 6, 8, device="meta")}, r"queries: expected device cpu as for the module, got meta"),
        ({"patch_mask": torch.ones(2, 6) > 0}, r"patch_mask: expected bool of shape \(2, 5\), .* torch.bool \(2, 6\)"),
        ({"patch_mask": torch.ones(2, 5)}, r"patch_mask: expected bool of shape \(2, 5\), .* torch.float32 \(2, 5\)"),
        ({"query_mask": torch.ones(2, 5) > 0}, r"query_mask: expected bool of shape \(2, 6\), .* torch.bool \(2, 5\)"),
        (
            {"query_mask": (torch.ones(2, 6) > 0).to("meta")},
            r"query_mask: expected device cpu as for patches, got meta",
        ),
        ({"texts": torch.zeros(2, 3).long()}, r"queries: expected \(M, D\) with texts, .*, got shape \(2, 6, 8\)"),
        (
            {"queries": torch.ones(6, 8), "texts": torch.tensor([[0], [6]])},
            r"texts: expected numbers up to 5, or below 0 for none, got 6",
        ),
        (
            {"queries": torch.ones(6, 8), "texts": torch.zeros(2, 3)},
            r"texts: expected integers of shape \(2, Q\), got torch.float32 \(2, 3\)",
        ),
        (
            {
                "queries": torch.ones(6, 8),
                "texts": torch.zeros(2, 6).long(),
                "query_mask": torch.ones(2, 6) > 0,
            },
            r"query_mask: expected None with texts, .*, got a tensor",
        ),
    ],
)
def test_rejects(change, message):
    given = {"patches": torch.ones(2, 5, 8), "queries": torch.ones(2, 6, 8)} | change
    with pytest.raises(ValueError, match=message):
        TextConditionedPool(8, 2)(**given)


def test_is_a_module_like_others():
    pool = TextConditionedPool(16, 4, backend="sdpa")
    assert "backend='sdpa'" in repr(pool)
    assert isinstance(pool.attn.out_proj, nn.Linear)
