"""Measures what FLAIR's text-conditioned loss costs per step, compared with holding the embeddings of all its pairs.

    python tools/flair_cost.py                        # ViT-B/16's sizes, in minutes
    python tools/flair_cost.py --images 8 --rounds 1  # seconds

Each of B images pools B + K - 1 texts, its own K and one of each other image. Forward and backward, from patches and
texts to the gradients of both and of all parameters, by

* modules: LayerNorms and nn.MultiheadAttention on the (B, B + K - 1, D) texts, whose pooled embeddings all exist,
* one call: TextConditionedPool on the same texts,
* score: TextConditionedPool.score, which computes pairs in chunks and again in the backward. The trainer does this.

Times are medians of interleaved rounds. "kept" is what autograd holds from forward to backward, "peak" the memory above
what was in use before. "error" is the largest difference of the gradients of patches and texts to those of the modules,
over the largest gradient of each.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from betaclip import TextConditionedPool
from betaclip.losses.flair import text_conditioned_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from common.harness import relative_error, time_ms, with_peak_bytes
from pooling_throughput import saved_bytes

SCALE, BIAS = 10.0, -10.0


class Step:
    """The loss of one batch in three ways, all of which read the same parameters."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        b, k, dim = args.images, args.texts, args.dim
        placed = {"device": args.device, "dtype": getattr(torch, args.dtype)}
        self.pool = TextConditionedPool(dim, args.heads, 0, norm_qkv=True, add_zero_attn=True, **placed)
        self.pool.logit_scale.requires_grad_(False)
        self.patches = torch.randn(b, args.patches, dim, **placed).requires_grad_()
        self.texts = torch.randn(b * k, dim, **placed).requires_grad_()
        own = torch.arange(b * k, device=args.device).view(b, k)
        others = torch.arange(b, device=args.device) + torch.arange(1, b, device=args.device)[:, None]
        others = k * (others.T % b) + torch.randint(k, (b, b - 1), device=args.device)
        self.chosen = torch.cat((own, others), 1)
        self.own = torch.arange(b + k - 1, device=args.device) < torch.full((b, 1), k, device=args.device)
        self.leaves = [self.patches, self.texts, *(p for p in self.pool.parameters() if p.requires_grad)]

    def modules(self) -> Tensor:
        texts = F.embedding(self.chosen, self.texts)
        norms: list[nn.Module] = [self.pool.get_submodule(name) for name in ("ln_q", "ln_k", "ln_v")]
        queries, keys, values = (norm(x) for norm, x in zip(norms, (texts, *[self.patches] * 2), strict=True))
        pooled = self.pool.attn(queries, keys, values, need_weights=False)[0]
        return self.loss(F.cosine_similarity(pooled, texts, dim=-1))

    def one_call(self) -> Tensor:
        texts = F.embedding(self.chosen, self.texts)
        return self.loss(F.cosine_similarity(self.pool(self.patches, texts), texts, dim=-1))

    def score(self) -> Tensor:
        return self.loss(self.pool.score(self.patches, self.texts, texts=self.chosen))

    def loss(self, cosines: Tensor) -> Tensor:
        return text_conditioned_loss(cosines, self.own, SCALE, logit_bias=BIAS)

    def gradients(self, way: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(way(), self.leaves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"images": 64, "texts": 8, "patches": 196, "dim": 512, "heads": 8, "rounds": 5, "threads": 2}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    step = Step(args)
    ways = {"modules": step.modules, "one call": step.one_call, "score": step.score}
    runs = {name: partial(step.gradients, way) for name, way in ways.items()}
    truth = runs["modules"]()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(1 + args.rounds):  # the first one warms up
        for name, run in runs.items():
            elapsed = time_ms(run, args.device)
            times[name] += [elapsed] if round_number else []
    print(f"B = {args.images}, K = {args.texts}, P = {args.patches}, D = {args.dim}, {args.dtype}, {args.device}")
    print(f"{'':<10} {'ms':>9} {'kept, MiB':>10} {'peak, MiB':>10} {'error':>8}")
    for name, way in ways.items():
        kept = saved_bytes(way, step.leaves) / 2**20
        found, peak, _ = with_peak_bytes(runs[name], args.device, 0)
        error = max(relative_error(a, t) for a, t in zip(found[:2], truth[:2], strict=True))
        peak_mib = "–" if peak is None else f"{peak / 2**20:.1f}"
        print(f"{name:<10} {statistics.median(times[name]):>9.1f} {kept:>10.1f} {peak_mib:>10} {error:>8.1e}")


if __name__ == "__main__":
    main()
