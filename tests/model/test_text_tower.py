"""The text tower on packed texts equals open_clip's own on padded ones, and does only the work that exists."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from support.adapters import Adapter, hooked
from support.towers import END, START, clip_model, gradients, hierarchy, padded
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from betaclip.model import packed_attention
from betaclip.model.packed_attention import Buckets, Sequences
from betaclip.model.packing import Bucket
from betaclip.model.text_tower import (
    FROZEN,
    encode_packed,
    prepare_text,
    stretch_positions,
    stretched,
    text_modules,
    text_not_supported_reasons,
    unstretched,
)
from betaclip.model.texts import RaggedTexts

CPU = torch.device("cpu")
TOWERS = {
    "CLIP": dict(kind=CLIP),
    "QuickGELU": dict(kind=CLIP, quick_gelu=True),
    "CustomTextCLIP": dict(kind=CustomTextCLIP),
    "LayerScale": dict(kind=CLIP, text={"ls_init_value": 0.1}),
    "projection with a bias": dict(kind=CustomTextCLIP, text={"proj_bias": True}),
    "no projection": dict(kind=CustomTextCLIP, text={"proj_type": "none"}),
    "end token by its id": dict(kind=CLIP, text={"pool_type": "eos", "eos_id": END}),
    "one layer": dict(kind=CLIP, text={"layers": 1}),
}
TEXTS = {
    "shared": hierarchy(0),
    "long": hierarchy(1, longest=76),
    "one text": [[[START, 5, 6, END]]],
    "one token": [[[END]], []],
    "without shared prefixes": [[[1, 5, END], [2, 5, END]], [[3, END]]],
}


def tower(**options) -> nn.Module:
    clip = clip_model(**options).double()
    assert not text_not_supported_reasons(clip)
    prepare_text(clip)
    return clip


def encode(clip: nn.Module, texts: RaggedTexts, checkpointing: bool = False) -> Tensor:
    return encode_packed(clip, texts.packing, CPU, checkpointing)[texts.packing.distinct]


def parameters(clip: nn.Module) -> dict[str, nn.Parameter]:
    names = ("visual.", "logit_scale")
    return {name: p for name, p in clip.named_parameters() if not name.startswith(names) and p.requires_grad}


def assert_same_gradients(clip: nn.Module, out: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    named = parameters(clip)
    for name, ours, theirs in zip(
        named, gradients(out, list(named.values())), gradients(expected, list(named.values())), strict=True
    ):
        error = float((ours - theirs).abs().max())
        assert error <= tolerance * float(theirs.abs().max()), (name, error)


@pytest.mark.parametrize(
    "options, texts",
    [*((tower, "shared") for tower in TOWERS), *(("CLIP", texts) for texts in TEXTS if texts != "shared")],
)
def test_matches_padded(options, texts):
    """The truth is open_clip's encode_text over the same blocks."""
    clip, ragged = tower(**TOWERS[options]), RaggedTexts.of(TEXTS[texts])
    expected = clip.encode_text(padded(ragged, 77))
    out = encode(clip, ragged)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    assert_same_gradients(clip, out, expected)


def test_blocks_stay_open_clips():
    """Replaced blocks called as open_clip calls them give what the blocks gave before."""
    clip = clip_model(quick_gelu=True).double()
    tokens, names = padded(RaggedTexts.of(TEXTS["shared"]), 77), list(clip.state_dict())
    before = clip.encode_text(tokens)
    prepare_text(clip)
    torch.testing.assert_close(clip.encode_text(tokens), before, atol=1e-12, rtol=1e-12)
    assert list(clip.state_dict()) == names


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_texts(checkpointing):
    """A backward still reaches every parameter."""
    clip = tower(kind=CLIP)
    out = encode(clip, RaggedTexts.of([[], []]), checkpointing)
    assert out.shape == (0, 12)
    assert all(not grad.any() for grad in gradients(out, list(parameters(clip).values())))


def test_checkpointing():
    clip, ragged = tower(kind=CLIP), RaggedTexts.of(TEXTS["shared"])
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    sizes = []
    for checkpointing in (False, True):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = encode(clip, ragged, checkpointing)
        sizes.append(sum(kept))
        assert_same_gradients(clip, out, encode(clip, ragged), tolerance=1e-14)
    assert sizes[1] < sizes[0] / 5


def test_float32_error_is_no_larger_than_the_padded_towers():
    clip, ragged = tower(kind=CLIP), RaggedTexts.of(TEXTS["long"])
    exact = clip.encode_text(padded(ragged, 77))
    clip.float()
    error, theirs = ((out - exact).abs().max() for out in (encode(clip, ragged), clip.encode_text(padded(ragged, 77))))
    assert error <= 2 * theirs + 1e-7


def test_autocast():
    """bfloat16 in the products, float32 between the blocks, gradients in float32: as the padded tower."""
    clip, ragged = tower(kind=CLIP), RaggedTexts.of(TEXTS["long"])
    named = parameters(clip)
    exact = clip.encode_text(padded(ragged, 77))
    exact_grads = gradients(exact, list(named.values()))
    clip.float()
    named = parameters(clip)
    errors, grad_errors = [], []
    for run in (lambda: encode(clip, ragged), lambda: clip.encode_text(padded(ragged, 77))):
        with torch.autocast("cpu", torch.bfloat16):
            out = run()
        assert out.dtype == torch.bfloat16
        grads = gradients(out, list(named.values()))
        assert all(grad.dtype == torch.float32 for grad in grads)
        errors.append(float((out - exact).detach().norm()))
        relative = [(a - b).norm() / b.norm() for a, b in zip(grads, exact_grads, strict=True)]
        grad_errors.append(float(torch.stack(relative).mean()))
    assert errors[0] <= 1.5 * errors[1] and grad_errors[0] <= 1.5 * grad_errors[1]
    assert errors[1] > 1e-3  # it was bfloat16


def test_work():
    """Products take nodes, not slots; after the last attention they take end tokens only."""
    clip = tower(kind=CLIP, text={"width": 24, "layers": 2})
    ragged = RaggedTexts.of(TEXTS["shared"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encode(clip, ragged)
    counts = counter.get_flop_counts()["Global"]
    products = sum(flop for op, flop in counts.items() if "mm" in str(op) and "bmm" not in str(op))  # not attention's
    nodes, texts, width = len(ragged.packing.tokens), len(ragged.packing.ends), 24
    whole_block, last_block = 12 * nodes, 2 * nodes + 10 * texts
    assert products == 2 * width * width * (whole_block + last_block) + 2 * texts * width * 12
    assert nodes < len(ragged.tokens) / 1.5


def test_compile():
    """Blocks compile for any texts: after two batches, others need nothing new."""
    clip, graphs = tower(kind=CLIP, text={"layers": 2}), []
    reference = copy.deepcopy(clip)

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for block in clip.transformer.resblocks:
        block.compile(backend=backend, dynamic=True)
    compiled = []
    for seed in range(5):
        ragged = RaggedTexts.of(hierarchy(seed, longest=10 + 10 * seed))
        torch.testing.assert_close(encode(clip, ragged), encode(reference, ragged))
        compiled.append(len(graphs))
    assert 0 < compiled[0] <= compiled[1] == compiled[-1]


def test_compiled_gathering():
    """Each pass over packed rows has the gradient that it has without the compiler."""
    node, users, starts = (torch.tensor(ids) for ids in ([0, 2, 2, 1, 0], [0, 4, 3, 1, 2], [0, 2, 3]))
    buckets = Bucket(2, 3), Bucket(1, 4)

    def passes(x: Tensor) -> Tensor:
        gathered, picked = (
            packed_attention._Gather.apply(x, node, users, starts),
            packed_attention._Pick.apply(x, node[2:]),
        )
        parts = packed_attention._Heads.apply(x.repeat(4, 1)[:10].view(10, 2, 2, 2), buckets)
        values = torch.cat([t.flatten() for t in (gathered, picked, *parts)])
        return values @ torch.arange(len(values), dtype=values.dtype)

    x = torch.randn(3, 8, requires_grad=True)
    compiled = torch.compile(passes, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(x), x) for f in (compiled, passes)))


def test_parametrized_attention_acts():
    clip, ragged = tower(kind=CLIP, text={"layers": 2}), RaggedTexts.of(TEXTS["shared"])
    before = encode(clip, ragged)
    for block in clip.transformer.resblocks:
        parametrize.register_parametrization(block.attn, "in_proj_weight", nn.Tanh())
    out = encode(clip, ragged)
    assert not torch.allclose(out, before)
    torch.testing.assert_close(out, clip.encode_text(padded(ragged, 77)), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("wrap", [Adapter, hooked])
@pytest.mark.parametrize("layer", [0, 1])
def test_wrapped_attention_is_refused(wrap, layer):
    clip = tower(kind=CLIP, text={"layers": 2})
    block = clip.transformer.resblocks[layer]
    block.attn = wrap(block.attn)
    with pytest.raises(NotImplementedError, match="the tower reads the weights of attn"):
        encode(clip, RaggedTexts.of(TEXTS["shared"]))


# Sequences without padding. CUDA's kernel cannot run here; a stand-in tests all that surrounds it.


def attention_by_sequences(q, k, v, q_starts, k_starts, q_longest, k_longest, *, window_size):
    """A stand-in for torch.nn.attention.varlen.varlen_attn that takes one sequence at a time."""
    assert q_starts.dtype == k_starts.dtype == torch.int32
    outs = []
    for (a, b), (c, d) in zip(pairwise(q_starts.tolist()), pairwise(k_starts.tolist()), strict=True):
        assert 0 < b - a <= q_longest and 0 < d - c <= k_longest
        whole = [t.transpose(0, 1) for t in (q[a:b], k[c:d], v[c:d])]
        causal = {(-1, 0): True, (-1, -1): False}[window_size]
        with sdpa_kernel(SDPBackend.MATH):  # the flash kernel of torch 2.11 for CPUs does not take these
            outs.append(F.scaled_dot_product_attention(*whole, is_causal=causal).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("texts", TEXTS)
def test_sequences(monkeypatch, texts):
    monkeypatch.setattr(packed_attention, "varlen_attn", attention_by_sequences)
    monkeypatch.setattr(
        "betaclip.model.text_tower.packed_attention", lambda packing, device, *_: Sequences(packing, device)
    )
    clip, ragged = tower(kind=CLIP), RaggedTexts.of(TEXTS[texts])
    expected = clip.encode_text(padded(ragged, 77))
    out = encode(clip, ragged)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    assert_same_gradients(clip, out, expected)


def test_sequences_call_what_torch_has():
    """The operator's own check of shapes and options, on tensors without data."""
    packing = RaggedTexts.of(TEXTS["shared"]).packing
    meta = torch.device("meta")
    attention = Sequences(packing, meta)
    nodes, texts = len(packing.tokens), len(packing.ends)
    qkv = torch.empty(nodes, 3 * 64, dtype=torch.bfloat16, device=meta)
    assert attention.causal(qkv, 2).shape == (nodes, 64)
    assert attention.last(qkv[:texts, :64], qkv[:, :128], 2).shape == (texts, 64)


@pytest.mark.parametrize(
    "device, capability, dtype, head_width, kind",
    [
        ("cuda", (8, 0), torch.bfloat16, 64, Sequences),
        ("cuda", (9, 0), torch.float16, 64, Sequences),
        ("cuda", (7, 5), torch.float16, 64, Buckets),
        ("cuda", (9, 0), torch.float32, 64, Buckets),
        ("cuda", (9, 0), torch.bfloat16, 20, Buckets),
        ("cpu", (9, 0), torch.bfloat16, 64, Buckets),
    ],
)
def test_choice_of_attention(monkeypatch, device, capability, dtype, head_width, kind):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(packed_attention, "to_device", lambda tensor, _: tensor)
    monkeypatch.setattr("betaclip.model.packing.to_device", lambda tensor, _: tensor)
    packing = RaggedTexts.of(TEXTS["shared"]).packing
    assert type(packed_attention.packed_attention(packing, torch.device(device), dtype, head_width)) is kind


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sequences_on_a_gpu(dtype):
    """Error of at most twice the padded tower's under the same autocast."""
    clip, ragged = tower(kind=CLIP, text={"width": 64, "heads": 2}), RaggedTexts.of(TEXTS["long"])
    named = parameters(clip)
    exact = clip.encode_text(padded(ragged, 77))
    exact_grads = gradients(exact, list(named.values()))
    clip.float().cuda()
    named = parameters(clip)
    text = ragged.packing.distinct.cuda()
    runs = (
        lambda: encode_packed(clip, ragged.packing, torch.device("cuda"), False)[text],
        lambda: clip.encode_text(padded(ragged, 77).cuda()),
    )
    errors = []
    for run in runs:
        with torch.autocast("cuda", dtype):
            out = run()
        grads = gradients(out, list(named.values()))
        relative = [(a.cpu() - b).norm() / b.norm() for a, b in zip([out, *grads], [exact, *exact_grads], strict=True)]
        errors.append(float(torch.stack(relative).mean()))
    assert errors[0] <= 2 * errors[1]


@pytest.mark.gpu
def test_does_not_wait_for_the_gpu():
    clip, ragged = tower(kind=CLIP, text={"width": 64, "heads": 2}).float().cuda(), RaggedTexts.of(TEXTS["long"])
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            encode_packed(clip, ragged.packing, torch.device("cuda"), False)
            torch.cuda.set_sync_debug_mode("error")
            try:
                encode_packed(clip, ragged.packing, torch.device("cuda"), False).float().sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


# Stretched positions


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_stretched_positions(kind):
    clip = clip_model(kind)
    text = text_modules(clip)
    old = text.positional_embedding.detach().clone()
    stretch_positions(clip)
    new = text.positional_embedding
    assert new.shape == (248, 24) and clip.context_length == text.context_length == 248
    assert stretched(77) == 248 and unstretched(248) == 77
    torch.testing.assert_close(new[:FROZEN], old[:FROZEN], atol=0, rtol=0)
    torch.testing.assert_close(new[FROZEN::4], old[FROZEN:], atol=0, rtol=0)
    for i, position in ((1, 20), (3, 40), (2, 75)):
        expected = old[position] + i / 4 * (old[position + 1] - old[position])
        torch.testing.assert_close(new[FROZEN + 4 * (position - FROZEN) + i], expected)
    torch.testing.assert_close(new[247], old[76] + 3 / 4 * (old[76] - old[75]))


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_stretched_tower_matches_padded(kind):
    clip = clip_model(kind).double()
    stretch_positions(clip)
    prepare_text(clip)
    ragged = RaggedTexts.of([*hierarchy(2, longest=246), [[START, *[1] * 246, END]]])
    expected = clip.encode_text(padded(ragged, 248))
    out = encode(clip, ragged)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    assert_same_gradients(clip, out, expected)


def test_first_positions_are_frozen():
    """No parameter holds them, so they have no gradient, momentum or weight decay."""
    clip = tower(kind=CLIP)
    stretch_positions(clip)
    before = clip.positional_embedding.detach().clone()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=0.1, weight_decay=0.5)
    encode(clip, RaggedTexts.of(TEXTS["long"])).square().sum().backward()
    optimizer.step()
    after = clip.positional_embedding
    torch.testing.assert_close(after[:FROZEN], before[:FROZEN], atol=0, rtol=0)
    assert (after[FROZEN:] != before[FROZEN:]).all()
    again = clip_model()
    stretch_positions(again)
    again.load_state_dict(clip.state_dict())
    torch.testing.assert_close(again.positional_embedding, after.float())


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(kind=CLIP, text={"no_causal_mask": True}), "the text tower is not causal (no_causal_mask)"),
        (dict(kind=CustomTextCLIP, text={"pool_type": "last"}), "the text tower's pool_type is 'last'"),
        (dict(kind=CLIP, text={"pool_type": "first"}), "the text tower's pool_type is 'first'"),
        (dict(kind=CustomTextCLIP, text={"embed_cls": True}), "the text tower has a class token (embed_cls)"),
        (dict(kind=CLIP, text={"qk_norm": True}), "the text tower has blocks of type CustomResidualAttentionBlock"),
    ],
)
def test_not_supported(options, reason):
    (found,) = text_not_supported_reasons(clip_model(**options))
    assert found.startswith(reason)


def test_not_supported_lists_all():
    clip = clip_model(CustomTextCLIP, text={"no_causal_mask": True, "pool_type": "last", "scale_fc": True})
    assert len(text_not_supported_reasons(clip)) == 3
    clip.text = nn.Linear(1, 1)
    assert text_not_supported_reasons(clip) == ["the text tower is a Linear, not open_clip's own"]
