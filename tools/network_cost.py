"""Predicts the time that a batch over many ranks takes on each of them, for H100 and H200 GPUs, from a cost model.

    python tools/network_cost.py

Nothing is measured. docs/network_cost_model.md has the formulas, the assumptions and the predictions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from betaclip.losses.across_ranks import TRANSPORTS, pieces

PRODUCTS = {  # the number of matrix products in each pass over the columns
    ("ce", "forward"): (1,),
    ("ce", "forward+backward"): (1, 3),
    ("bce", "forward"): (1,),
    ("bce", "forward+backward"): (3,),
}
ACCUMULATED = 4  # bytes of a statistic, and of an element of a gradient that is summed
GPU_RANKS = (8, 64, 1024)
GPU_ROWS = (2304, 18432)  # 64 images × 36 texts, and eight times that, as with cached gradients


@dataclass(frozen=True)
class Work:
    """A loss over all ranks, with ``rows`` rows on each. form: "ce" or "bce"; CLIP's loss costs the same as "ce"."""

    form: str
    ranks: int
    rows: int
    dim: int
    itemsize: int

    def flop(self, phase: str) -> int:
        """FLOP of one rank."""
        return sum(PRODUCTS[self.form, phase]) * 2 * self.rows * (self.rows * self.ranks) * self.dim


@dataclass(frozen=True)
class Link:
    """The rate at which one rank sends while it receives as much, and the latency."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Machine:
    """The assumed rates of a machine.

    flop_per_s: sustained by the loss's kernels on one rank. near: between ranks of a node, far: between nodes.
    node: ranks of a node. rails: far links of a node that a collective uses at once; NCCL spreads its rings over all of
    them, while a ring of sends crosses from one node to the next on a single link. launch_s: time before a message
    starts. element_s: time for each element of a rank's own embeddings.
    """

    flop_per_s: float
    near: Link
    far: Link
    node: int
    rails: int = 1
    launch_s: float = 0.0
    element_s: float = 0.0


# Assumptions: torch.mm reaches 700 TFLOP/s in bfloat16 on an H100 or H200 (whose peak is 989), and the kernels 0.65 of
# that. NVLink 4 gives 450 GB/s each way and a 400 Gb/s NIC per GPU 50 GB/s, of which NCCL reaches 0.8 and 0.9; a ring's
# next GPU in a node of 8 is 1 µs away, another node 5 µs, and a message's kernel takes 5 µs to start. A rank's own
# embeddings are passed over some 20 times, at 3 bytes an element and 2.5 TB/s.
HOPPER = Machine(0.65 * 700e12, Link(0.8 * 450e9, 1e-6), Link(0.9 * 50e9, 5e-6), 8, 8, 5e-6, 20 * 3 / 2.5e12)


@dataclass(frozen=True)
class Message:
    """kind: all_gather, reduce_scatter, all_to_all (nbytes: of one rank's part), all_reduce or send (of all)."""

    kind: str
    nbytes: float


@dataclass(frozen=True)
class Pass:
    """One pass over all columns, of ``products`` matrix products.

    A step is that of a ring, with one shard, or of the all-gather, with a piece of all shards. In each step, messages
    ``brings`` bring operands and ``takes`` return results; ``before`` precede all steps, ``after`` follow them.
    """

    products: int
    steps: int
    before: tuple[Message, ...] = ()
    brings: tuple[Message, ...] = ()
    takes: tuple[Message, ...] = ()
    after: tuple[Message, ...] = ()


def passes(work: Work, transport: str, phase: str, device_type: str) -> list[Pass]:
    n, texts = work.rows, work.itemsize * work.dim * work.rows
    gradient, image_ids, statistic = ACCUMULATED * work.dim * n, 4 * n, ACCUMULATED * n
    first, *second = PRODUCTS[work.form, phase]
    summed = work.form == "bce" and phase != "forward"
    if transport == "ring":
        shard, home = (Message("send", texts + image_ids),), (Message("send", gradient),)
        again = (Message("send", texts + image_ids + 2 * statistic),)
        if work.form == "bce":
            return [Pass(first, work.ranks, brings=shard, takes=home if summed else ())]
        back = [Pass(products, work.ranks, brings=again, takes=home) for products in second]
        return [Pass(first, work.ranks, brings=shard, takes=(Message("send", statistic),)), *back]
    p = pieces(work.ranks, n, texts, device_type)
    vectors, rows = (Message("all_gather", image_ids),), (Message("all_gather", texts / p),)
    home = (Message("reduce_scatter", gradient / p),)
    if work.form == "bce":
        return [Pass(first, p, vectors, rows, home if summed else ())]
    back = [Pass(products, p, (Message("all_gather", 2 * statistic),), (), home) for products in second]
    return [Pass(first, p, vectors, rows, after=(Message("all_to_all", statistic),)), *back]


def _with_counts(one: Pass, transport: str) -> Iterator[tuple[Message, int]]:
    """Each message and the number of times it is sent. A ring begins with the rank's own shard, without a message."""
    brought = one.steps - 1 if transport == "ring" else one.steps
    for messages, count in ((one.before, 1), (one.brings, brought), (one.takes, one.steps), (one.after, 1)):
        for message in messages:
            yield message, count


def sent_bytes(work: Work, transport: str, phase: str) -> int:
    """Bytes that one rank sends by NCCL's rings, without sums of a few numbers over all ranks."""
    if work.ranks == 1:
        return 0
    total = 0.0
    for one in passes(work, transport, phase, "cpu"):
        for message, count in _with_counts(one, transport):
            total += (1 if message.kind == "send" else work.ranks - 1) * count * message.nbytes
    return int(total)


def seconds(message: Message, ranks: int, machine: Machine) -> float:
    """The time that one message takes alone."""
    if ranks == 1:
        return 0.0
    near, far, nodes = machine.near, machine.far, math.ceil(ranks / machine.node)
    if message.kind == "all_reduce":  # a few numbers, up a tree and down
        depths = math.ceil(math.log2(min(ranks, machine.node))), math.ceil(math.log2(nodes))
        return machine.launch_s + 2 * (depths[0] * near.latency_s + depths[1] * far.latency_s)
    if message.kind == "send":
        slowest = far if nodes > 1 else near
        return machine.launch_s + slowest.latency_s + message.nbytes / slowest.bytes_per_s
    rails = 1 if message.kind == "all_to_all" else machine.rails  # all_to_all: every rank sends on its own link
    rate = near.bytes_per_s if nodes == 1 else min(near.bytes_per_s, rails * far.bytes_per_s)
    hops_s = (ranks - nodes) * near.latency_s + (nodes - 1) * far.latency_s
    return machine.launch_s + hops_s + (ranks - 1) * message.nbytes / rate


@dataclass(frozen=True)
class Prediction:
    """Times of matrix products alone, of messages alone, one after the other, and of the whole loss."""

    arithmetic_s: float
    messages_s: float
    time_s: float

    @property
    def efficiency(self) -> float:
        """The share of the time that arithmetic alone would take."""
        return self.arithmetic_s / self.time_s


def predict(work: Work, transport: str, phase: str, machine: Machine = HOPPER) -> Prediction:
    """Predict one loss on one rank, with messages and arithmetic concurrent unless one needs a result of the other."""
    sums_s = 2 * seconds(Message("all_reduce", 0), work.ranks, machine)
    arithmetic_s, messages_s = work.flop(phase) / machine.flop_per_s, sums_s
    time_s = sums_s + work.rows * work.dim * machine.element_s
    for one in passes(work, transport, phase, "cuda"):
        compute = one.products * 2 * work.rows * (work.rows * work.ranks) * work.dim / machine.flop_per_s / one.steps
        for message, count in _with_counts(one, transport):
            messages_s += count * seconds(message, work.ranks, machine)
        before, bring, take, after = (
            sum(seconds(message, work.ranks, machine) for message in messages)
            for messages in (one.before, one.brings, one.takes, one.after)
        )
        run = ring_s if transport == "ring" else gathered_s
        time_s += before + run(one.steps, compute, bring, take) + after
    return Prediction(arithmetic_s, messages_s, time_s)


def gathered_s(steps: int, compute: float, bring: float, take: float) -> float:
    """The time of a pass whose pieces are all requested at once and arrive one by one; messages form one queue."""
    queue, now = steps * bring, 0.0
    for step in range(steps):
        now = max(now, (step + 1) * bring) + compute
        queue = max(queue, now) + take
    return max(now, queue)


def ring_s(steps: int, compute: float, bring: float, take: float) -> float:
    """The time of a pass. The next shard is sent as a step begins; a step's result waits for the previous step's."""
    queue = now = taken = 0.0
    for step in range(steps):
        if step + 1 < steps:
            queue = max(queue, now) + bring
        arrived = queue
        now = max(now + compute, taken)
        if take:
            taken = queue = max(queue, now) + take
        if step + 1 < steps:
            now = max(now, arrived)
    return max(now, taken)


def table() -> str:
    """Predictions as Markdown: softmax form, bfloat16, D = 512, forward and backward."""
    lines = ["| GPUs | rows each | arithmetic | " + " | ".join(TRANSPORTS) + " |", "|---" * (3 + len(TRANSPORTS)) + "|"]
    for rows in GPU_ROWS:
        for ranks in GPU_RANKS:
            predictions = [predict(Work("ce", ranks, rows, 512, 2), way, "forward+backward") for way in TRANSPORTS]
            cells = [f"{p.time_s * 1e3:,.3g} ms, {p.efficiency:.0%}" for p in predictions]
            arithmetic = f"{predictions[0].arithmetic_s * 1e3:,.3g} ms"
            lines.append("| " + " | ".join([f"{ranks:,}", f"{rows:,}", arithmetic, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
