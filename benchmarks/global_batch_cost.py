"""A model of what the global batch costs a rank: arithmetic, bytes, messages, and what of them goes on at once.

Each of W ranks holds n rows (image embeddings) and n columns (texts), and contrasts its rows with all N = W n columns:
2 n N D FLOP for S, and for the softmax form's gradients three such products more, in a second pass over the columns;
the sigmoid form's need no statistic of the whole matrix and take S and two more in one pass. A column brings

    forward                       s D + 4    the normalised text, s bytes a number, and the number of its image
    backward, softmax             8          its statistic and that one's gradient ("ring" brings the text again)

to every rank, and takes home 4 bytes of statistic (softmax) or 4 D of gradient, in float32. "all_gather" brings texts
and sums gradients in pieces of all shards, one on its way while another is computed; numbers of a column move at once.
"ring" sends shards one rank on while it computes, and what is taken home follows one step behind. Twice per loss a few
numbers are summed over all ranks. What depends on the rank's own embeddings alone (normalisation, pairs within images)
takes so long per element.

Left out: that ranks wait for slower ones, and that messages slow arithmetic down.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from betaclip.losses.across_ranks import pieces

PRODUCTS = {  # of each pass
    ("ce", "forward"): (1,),
    ("ce", "forward+backward"): (1, 3),
    ("bce", "forward"): (1,),
    ("bce", "forward+backward"): (3,),
}
ACCUMULATED = 4  # bytes of a statistic, and of an element of a gradient that is summed


@dataclass(frozen=True)
class Work:
    """form: "ce" or "bce"; CLIP's loss costs what "ce" does. rows: of each rank. itemsize: of a text on its way."""

    form: str
    ranks: int
    rows: int
    dim: int
    itemsize: int

    def flop(self, phase: str) -> int:
        """Of one rank."""
        return sum(PRODUCTS[self.form, phase]) * 2 * self.rows * (self.rows * self.ranks) * self.dim


@dataclass(frozen=True)
class Link:
    """What one rank can send, while it receives as much."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Machine:
    """flop_per_s: sustained by the loss's kernels on one rank. near: between ranks of a node, far: between nodes.

    rails: how many far links of a node work at once in a collective. NCCL spreads its rings over all of them; one ring
    of sends crosses between two nodes on a single one. launch_s: before a message starts. element_s: for each element
    of a rank's own embeddings. overlap: messages go on during arithmetic. reduction: how many times a ring's bytes a
    reduce-scatter sends: 2 on gloo, where it is an all-reduce of which one part is kept.
    """

    flop_per_s: float
    near: Link
    far: Link
    node: int
    rails: int = 1
    launch_s: float = 0.0
    element_s: float = 0.0
    overlap: bool = True
    reduction: int = 1


@dataclass(frozen=True)
class Message:
    """kind: all_gather, reduce_scatter, all_to_all (nbytes: of one rank's part), all_reduce or send (of all)."""

    kind: str
    nbytes: float


@dataclass(frozen=True)
class Pass:
    """Over all columns. In each step (of a ring, with one shard; of the all-gather, with a piece of all) some messages
    bring what is computed with, and some take what was computed; others come before the first and after the last.
    """

    products: int
    steps: int
    before: tuple[Message, ...] = ()
    brings: tuple[Message, ...] = ()
    takes: tuple[Message, ...] = ()
    after: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """arithmetic_s: between images. messages_s: one after the other. time_s: from beginning to end."""

    arithmetic_s: float
    messages_s: float
    time_s: float

    @property
    def efficiency(self) -> float:
        """Of the time, the share that arithmetic alone would take."""
        return self.arithmetic_s / self.time_s


def passes(work: Work, transport: str, phase: str, device_type: str) -> list[Pass]:
    n, texts = work.rows, work.itemsize * work.dim * work.rows
    gradient, group, statistic, statistics = (
        size * n for size in (ACCUMULATED * work.dim, 4, ACCUMULATED, 2 * ACCUMULATED)
    )
    first, *second = PRODUCTS[work.form, phase]
    summed = work.form == "bce" and phase != "forward"
    if transport == "ring":
        w, send = work.ranks, partial(Message, "send")
        shard, home = (send(texts + group),), (send(gradient),)  # sent together
        if work.form == "bce":
            return [Pass(first, w, brings=shard, takes=home if summed else ())]
        back = [Pass(products, w, brings=(send(texts + group + statistics),), takes=home) for products in second]
        return [Pass(first, w, brings=shard, takes=(send(statistic),)), *back]
    p = pieces(work.ranks, n, texts, device_type)
    narrow, rows = (Message("all_gather", group),), (Message("all_gather", texts / p),)
    home = (Message("reduce_scatter", gradient / p),)
    if work.form == "bce":
        return [Pass(first, p, narrow, rows, home if summed else ())]
    back = [Pass(products, p, (Message("all_gather", statistics),), (), home) for products in second]
    return [Pass(first, p, narrow, rows, after=(Message("all_to_all", statistic),)), *back]


def sent_bytes(work: Work, transport: str, phase: str, reduction: int = 1) -> int:
    """By one rank; sums over all ranks aside, which are of a few numbers."""
    if work.ranks == 1:
        return 0
    total = 0.0
    for one in passes(work, transport, phase, "cpu"):
        for message, times in _with_times(one, transport):
            trips = 1 if message.kind == "send" else work.ranks - 1
            total += trips * times * message.nbytes * (reduction if message.kind == "reduce_scatter" else 1)
    return int(total)


def _with_times(one: Pass, transport: str) -> Iterator[tuple[Message, int]]:
    """Each message and how often it is sent. A ring begins with what the rank has."""
    brought = one.steps - 1 if transport == "ring" else one.steps
    for messages, times in ((one.before, 1), (one.brings, brought), (one.takes, one.steps), (one.after, 1)):
        for message in messages:
            yield message, times


def seconds(message: Message, ranks: int, machine: Machine) -> float:
    """Of one message, alone."""
    if ranks == 1:
        return 0.0
    near, far, nodes = machine.near, machine.far, math.ceil(ranks / machine.node)
    if message.kind == "all_reduce":  # a few numbers, up a tree and down
        depths = math.ceil(math.log2(min(ranks, machine.node))), math.ceil(math.log2(nodes))
        return machine.launch_s + 2 * (depths[0] * near.latency_s + depths[1] * far.latency_s)
    if message.kind == "send":
        slowest = far if nodes > 1 else near
        return machine.launch_s + slowest.latency_s + message.nbytes / slowest.bytes_per_s
    rails = 1 if message.kind == "all_to_all" else machine.rails  # every rank sends its own
    rate = near.bytes_per_s if nodes == 1 else min(near.bytes_per_s, rails * far.bytes_per_s)
    nbytes = message.nbytes * (machine.reduction if message.kind == "reduce_scatter" else 1)
    hops_s = (ranks - nodes) * near.latency_s + (nodes - 1) * far.latency_s
    return machine.launch_s + hops_s + (ranks - 1) * nbytes / rate


def predict(work: Work, transport: str, phase: str, machine: Machine) -> Prediction:
    """Of one loss."""
    sums_s = 2 * seconds(Message("all_reduce", 0), work.ranks, machine)
    arithmetic_s, messages_s = work.flop(phase) / machine.flop_per_s, sums_s
    time_s = sums_s + work.rows * work.dim * machine.element_s
    for one in passes(work, transport, phase, "cuda" if machine.overlap else "cpu"):
        compute = one.products * 2 * work.rows * (work.rows * work.ranks) * work.dim / machine.flop_per_s / one.steps
        alone = sum(times * seconds(message, work.ranks, machine) for message, times in _with_times(one, transport))
        messages_s += alone
        if not machine.overlap:
            time_s += alone + one.steps * compute
            continue
        before, bring, take, after = (
            sum(seconds(message, work.ranks, machine) for message in messages)
            for messages in (one.before, one.brings, one.takes, one.after)
        )
        run = _round_s if transport == "ring" else _gathered_s
        time_s += before + run(one.steps, compute, bring, take) + after
    return Prediction(arithmetic_s, messages_s, time_s)


def _gathered_s(steps: int, compute: float, bring: float, take: float) -> float:
    """All pieces are asked for at once and arrive one by one; messages are one queue, arithmetic another."""
    queue, now = steps * bring, 0.0
    for step in range(steps):
        now = max(now, (step + 1) * bring) + compute
        queue = max(queue, now) + take
    return max(now, queue)


def _round_s(steps: int, compute: float, bring: float, take: float) -> float:
    """The next shard sets out as a step begins. What a step gives waits for what the one before gave elsewhere."""
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


# Assumptions, none of them measured here. torch.mm reaches 700 TFLOP/s in bfloat16 on an H100 or H200 (whose peak is
# 989), and the kernels are to reach 0.65 of it. NVLink 4 gives 450 GB/s each way and a 400 Gb/s NIC per GPU 50 GB/s, of
# which NCCL reaches 0.8 and 0.9; a ring's next GPU in a node of 8 is 1 µs away, another node 5 µs, and a message's
# kernel takes 5 µs to start. A rank's own embeddings are passed over some 20 times, at 3 bytes an element and 2.5 TB/s.
HOPPER = Machine(0.65 * 700e12, Link(0.8 * 450e9, 1e-6), Link(0.9 * 50e9, 5e-6), 8, 8, 5e-6, 20 * 3 / 2.5e12)
GPU_RANKS = (8, 64, 1024)
GPU_ROWS = (2304, 18432)  # 64 images × 36 texts, and eight times that, as with cached gradients


def gpu_table(transports: Sequence[str], machine: Machine = HOPPER) -> str:
    """Predictions for the softmax form in bfloat16 at D = 512, forward and backward."""
    lines = [f"{'GPUs':>7}{'rows each':>11}{'N':>12}{'arithmetic':>13}" + "".join(f"{way:>18}" for way in transports)]
    for rows in GPU_ROWS:
        for ranks in GPU_RANKS:
            work = Work("ce", ranks, rows, 512, 2)
            predictions = [predict(work, way, "forward+backward", machine) for way in transports]
            cells = [f"{p.time_s * 1e3:,.3g} ms, {p.efficiency:.0%}" for p in predictions]
            line = f"{ranks:7,}{rows:11,}{ranks * rows:12,}{predictions[0].arithmetic_s * 1e3:10,.3g} ms"
            lines.append(line + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)
