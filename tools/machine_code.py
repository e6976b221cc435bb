"""What the machine code of a kernel says of its speed: registers, stores, instructions per tile by pipe.

NVIDIA's machine code comes from cuobjdump (SASS), AMD's from the compiler (assembly). A step is an innermost loop that
multiplies matrices, a tile the loop around it, or all where there is none. How often a tile takes a step follows from
its FLOP; where the compiler has unrolled the steps, once. Both sides of a branch within a tile are counted, or the
shorter ones alone, which are those of most tiles: no ids to compare, one exponential for both directions.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import networkx

PIPES = ("matrix", "fma", "alu", "special", "shared", "global", "other")
# The first pattern that matches the beginning of an opcode decides.
_SASS = [
    ("matrix", r"HGMMA|HMMA|UTC\w*MMA|QGMMA"),
    ("special", r"MUFU"),
    ("fma", r"[FH](?:FMA|ADD|MUL)|IMAD"),
    ("shared", r"LDS|STS|LDSM|STSM|SHFL|LDTM|STTM"),
    ("global", r"LD(?!C)|ST|UTMA|RED|ATOM"),
    ("other", r"LDC|U[A-Z]|S2U?R|R2UR|BAR|SYNCS|WARP|DEPBAR|B\w*SYNC|BSSY|NANOSLEEP|FENCE|MEMBAR|CCTL"),
    ("other", r"BRA|EXIT|RET|CALL|NOP"),
    ("alu", r"."),
]
_GCN = [
    ("matrix", r"v_s?mfmac?"),
    ("special", r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)"),
    ("fma", r"v_(?:pk_)?(?:fma|add|sub|mul|mad|fmac)_f"),
    ("shared", r"ds_"),
    ("global", r"buffer_|global_|flat_"),
    ("alu", r"v_"),
    ("other", r"."),
]
_AMD_BYTES = {"byte": 1, "b8": 1, "short": 2, "b16": 2, "dword": 4, "b32": 4, "dwordx2": 8, "b64": 8}
_AMD_BYTES |= {"dwordx3": 12, "b96": 12, "dwordx4": 16, "b128": 16}


class Code(NamedTuple):
    """Opcodes in order, the graph of what may follow each, and its loops, each as the places of its instructions.

    tensor_flop: of one warp's share in an instruction of Blackwell's tensor cores, whose name does not tell its size; 0
    where sizes differ: then all code counts once.
    """

    opcodes: list[str]
    graph: networkx.DiGraph
    loops: list[frozenset[int]]
    pipe: Callable[[str], str]
    tensor_flop: int = 0

    def widest_store(self) -> int:
        """Bytes that one thread stores to global memory by one instruction, at most."""
        return max((_store_bytes(opcode) for opcode in self.opcodes), default=0)

    def per_tile(self, step_flop: int, steps: int, shortest: bool = False) -> tuple[Counter[str], Counter[str]]:
        """Instructions of one warp by pipe, in the steps of a tile and beside them.

        ``step_flop``: of a warp in a step, of which a tile takes ``steps``. The compiler may unroll the loop over steps
        or peel some off, and may let two warps form some of their products twice. ``shortest``: of branches beside the
        steps, count the side with fewer instructions; where no loop over tiles is left, all are counted.

        Raises:
            ValueError: no number of turns of the loop gives so many steps.
        """
        flops = [_matrix_flop(opcode, self.tensor_flop) for opcode in self.opcodes]
        products = {place for place, count in enumerate(flops) if count}
        multiplying = [loop for loop in self.loops if loop & products]
        inner = {loop for loop in multiplying if not any(other < loop for other in multiplying)}
        repeated = frozenset[int]().union(*inner)
        looped = sum(flops[place] for place in products & repeated)
        turns = 0
        if looped:
            beside = sum(flops) - looped
            if looped == step_flop * steps:  # a whole tile, with those of the first one before the loop
                products, beside = products & repeated, 0
            shared = not beside and step_flop < looped < 2 * step_flop
            # A loop that the compiler has given an exit in its middle counts in full.
            turns = steps if shared else -((beside - step_flop * steps) // looped)
            if turns < 1:
                raise ValueError(f"expected {steps} steps of {step_flop} FLOP, got turns of {looped} beside {beside}")
        if turns == 1:
            inner, repeated = set(), frozenset()
        outer = [loop for loop in self.loops if loop not in inner and loop >= products > set()]
        in_steps: Counter[str] = Counter()
        rest: Counter[str] = Counter()
        tile = min(outer, key=len, default=frozenset(range(len(flops))))
        if shortest and outer:
            tile = self._shortest_turn(tile, repeated) | (tile & repeated)
        for place in tile:
            counts, times = (in_steps, turns) if place in repeated else (rest, 1)
            counts[self.pipe(self.opcodes[place])] += times
        return in_steps, rest

    def _shortest_turn(self, loop: frozenset[int], free: frozenset[int]) -> frozenset[int]:
        """The instructions of the turn of ``loop`` that takes the fewest, not counting those in ``free``."""
        head = min(place for place in loop if any(before not in loop for before in self.graph.predecessors(place)))
        tails = [place for place in loop if self.graph.has_edge(place, head)]

        def weight(_: int, place: int, __: object) -> int:
            return place not in free

        within = self.graph.subgraph(loop)
        paths = [networkx.dijkstra_path(within, head, tail, weight) for tail in tails]
        return frozenset(min(paths, key=lambda path: len(set(path) - free)))


def _classify(patterns: list[tuple[str, str]]) -> Callable[[str], str]:
    compiled = [(pipe, re.compile(pattern)) for pipe, pattern in patterns]
    return lambda opcode: next(pipe for pipe, pattern in compiled if pattern.match(opcode))


def _matrix_flop(opcode: str, tensor_flop: int) -> int:
    """FLOP of one warp in an instruction of the matrix unit, 0 for any other."""
    if re.match(r"UTC\w*MMA", opcode):
        return tensor_flop
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):  # of four warps
        return 2 * math.prod(map(int, found.groups())) // 4
    if found := re.match(r"HMMA\.16(8)(16|8|4)\b", opcode):
        return 2 * 16 * math.prod(map(int, found.groups()))
    if found := re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", opcode):
        return 2 * math.prod(map(int, found.groups()))
    return 0


def _store_bytes(opcode: str) -> int:
    if opcode.startswith("STG"):
        bits = next((part.lstrip("US") for part in opcode.split(".") if part.lstrip("US").isdigit()), "32")
        return int(bits) // 8
    found = re.match(r"(?:buffer|global)_store_([a-z]+\d*)", opcode)
    return _AMD_BYTES[found[1]] if found else 0


def _flow(count: int, jumps: dict[int, int], ends: set[int]) -> tuple[networkx.DiGraph, list[frozenset[int]]]:
    """What may follow each of ``count`` instructions, of which some jump to another, and those in ``ends`` do not go on
    to the next; and the natural loops. Each way back makes one, since compilers let a loop and the loop around it
    begin at one place."""
    graph = networkx.DiGraph([(place, place + 1) for place in range(count - 1) if place not in ends])
    graph.add_edges_from(jumps.items())
    dominators = networkx.immediate_dominators(graph, 0)

    def dominates(place: int, other: int) -> bool:
        while other not in (place, 0):
            other = dominators[other]
        return other == place

    # Compilers also place a loop's last instructions before its first.
    jumps_and_falls = {
        *jumps.items(),
        *((place - 1, place) for place in jumps.values() if graph.has_edge(place - 1, place)),
    }
    return graph, [
        frozenset(networkx.ancestors(graph.subgraph(dominators.keys() - {head}), tail) | {head, tail})
        for tail, head in jumps_and_falls
        if tail in dominators and dominates(head, tail)
    ]


def nvidia(sass: str, tensor_flop: int = 0) -> Code:
    """The code in the output of ``cuobjdump -sass``."""
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass)
    place = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    jumps, ends = {}, set()
    for i, (_, predicate, opcode, operands) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands.strip()) if opcode.startswith("BRA") else None
        if target:
            jumps[i] = place[int(target[1], 16)]
        always = not predicate and "," not in operands
        if always and opcode.startswith(("BRA", "EXIT", "RET")):
            ends.add(i)
    opcodes = [opcode for _, _, opcode, _ in lines]
    return Code(opcodes, *_flow(len(lines), jumps, ends), _classify(_SASS), tensor_flop)


def amd(assembly: str) -> Code:
    """The code in AMD's assembly, as Triton's compiler keeps it."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: dict[int, str] = {}
    for line in assembly.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"\s+([sv]_\w+|ds_\w+|buffer_\w+|global_\w+|flat_\w+)\s*(\S*)", line):
            if found[1].startswith(("s_branch", "s_cbranch")):
                branches[len(opcodes)] = found[2]
            opcodes.append(found[1])
    jumps = {place: labels[label] for place, label in branches.items()}
    ends = {place for place, opcode in enumerate(opcodes) if opcode in ("s_branch", "s_endpgm")}
    return Code(opcodes, *_flow(len(opcodes), jumps, ends), _classify(_GCN))


@dataclass(frozen=True)
class Machine:
    """Rates of one multiprocessor and clock.

    matrix_flop: of the matrix unit, by bytes per element; float32 products of three TF32 ones count once. l2_bytes:
    what arrives from L2 while all multiprocessors read, an assumption. clocks: how long one of the four schedulers is
    busy with one instruction of a warp; 1 for pipes that are not named.
    """

    matrix_flop: dict[int, float]
    l2_bytes: float
    clocks: dict[str, float]

    def matrix_share(
        self, itemsize: int, flop: float, l2_bytes: float, warps: int, in_steps: Counter[str], rest: Counter[str]
    ) -> float:
        """The predicted share of the matrix unit's rate, for a tile of ``flop`` that reads ``l2_bytes``.

        One program of ``warps`` warps runs on a multiprocessor. Its steps take as long as products, instructions or
        L2 do, whichever is longest; the rest of a tile is not overlapped with them.
        """
        products = flop / self.matrix_flop[itemsize]
        steps = max(products, l2_bytes / self.l2_bytes, warps / 4 * self._issue(in_steps))
        return products / (steps + warps / 4 * self._issue(rest))

    def _issue(self, counts: Counter[str]) -> float:
        return max(counts.total(), *(clocks * counts[pipe] for pipe, clocks in self.clocks.items()))


_NVIDIA_CLOCKS = {"fma": 1, "alu": 2, "special": 8, "shared": 4, "global": 4}
MACHINES = {
    # H100: 989 TFLOP/s at 132 x 1.83 GHz; 6.2 TB/s at 1.72 GHz.
    "sm_90": Machine({2: 4096, 4: 2048 / 3}, 27, _NVIDIA_CLOCKS),
    # A100: 312 TFLOP/s at 108 x 1.41 GHz; 4.5 TB/s. Float32 has half of a scheduler's lanes.
    "sm_80": Machine({2: 2048, 4: 1024 / 3}, 30, _NVIDIA_CLOCKS | {"fma": 2}),
    # B200: 2250 TFLOP/s at 148 x 1.85 GHz; of L2, as much per multiprocessor as an H100's.
    "sm_100": Machine({2: 8192, 4: 4096 / 3}, 27, _NVIDIA_CLOCKS),
    # RTX 5090: 209 TFLOP/s at 170 x 2.41 GHz where sums are in float32; L2 likewise.
    "sm_120": Machine({2: 512, 4: 256 / 3}, 27, _NVIDIA_CLOCKS),
    # MI300X: 1307 and 163 TFLOP/s at 304 x 2.1 GHz; two thirds of 54 bytes. A wave has 64 threads, a SIMD 16 lanes.
    "gfx942": Machine({2: 2048, 4: 256}, 36, {"fma": 4, "alu": 4, "special": 16, "shared": 8, "global": 8}),
}
