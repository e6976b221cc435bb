"""PTX on the CPU: what nvcc made of device code, where there is no GPU to run it.

One thread block at a time; an instruction runs in NumPy for all threads that have come to it. It knows the instructions
that betaclip's small kernels consist of, and looks a name that it does not know up in vain. Registers and shared memory
start as NaN. Threads that diverge wait for one another at the next instruction they share; a shuffle or vote that not
all threads of a warp reach together is an error, and so is a barrier that some of the block never reach.
"""

import re
from itertools import product
from typing import NamedTuple

import numpy as np

LANES = 32
DTYPES = {f"{kind}{8 * size}": np.dtype(f"{'i' if kind == 's' else 'u'}{size}") for kind in "sub" for size in (2, 4, 8)}
DTYPES |= {"f32": np.dtype("f4"), "pred": np.dtype("?")}
REGISTERS = {  # what they hold at first, by the letters of their names
    "p": np.array(True),
    "rs": np.array(2**16 - 1, "u2"),
    "r": np.array(2**32 - 1, "u4"),
    "f": np.array(2**32 - 1, "u4"),
    "rd": np.array(2**64 - 1, "u8"),
}
TINY = np.finfo("f4").tiny
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "min": np.fmin,  # of a number and NaN, the number
    "max": np.fmax,
}
MODIFIERS = {"lo", "wide", "rn", "ftz", "approx", "to", "global", *DTYPES}
UNARY = {"mov": np.copy, "cvta": np.copy, "abs": np.abs, "neg": np.negative, "not": np.invert, "ex2": np.exp2}


class Instruction(NamedTuple):
    guard: str  # the predicate without which it does nothing, or ""
    negated: bool
    name: str
    modifiers: list[str]
    operands: list[str]


class Kernel(NamedTuple):
    parameters: dict[str, int]  # offsets of these
    shared: dict[str, int]  # and of shared memory
    code: list[Instruction]
    labels: dict[str, int]


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX file by their names."""
    text = re.sub(r"//.*", "", text)
    kernels = {}
    shared = dict.fromkeys(re.findall(r"\.extern \.shared .* (\w+)\[\];", text), 0)
    for name, parameters, body in re.findall(
        r"\.entry (\w+)\((.*?)\)[^{]*\{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE
    ):
        offsets, end = {}, 0
        for kind, parameter, count in re.findall(
            r"\.param .*?\.(b8|[su]32|[su]64|f32) (\w+)(?:\[(\d+)\])?", parameters
        ):
            size = 1 if kind == "b8" else int(kind[1:]) // 8
            end = -(-end // 8) * 8 if kind == "b8" else -(-end // size) * size
            offsets[parameter] = end
            end += size * int(count or 1)
        kernels[name] = Kernel(offsets, shared, *_parse_body(body))
    return kernels


def _parse_body(body: str) -> tuple[list[Instruction], dict[str, int]]:
    code: list[Instruction] = []
    labels = {}
    for line in filter(None, map(str.strip, body.splitlines())):
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
        elif not line.startswith("."):
            found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.]+)\s*(.*);", line)
            assert found, line
            negation, guard, opcode, operands = found.groups()
            name, *modifiers = opcode.split(".")
            parts = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", operands)
            code.append(Instruction(guard or "", bool(negation), name, modifiers, parts))
    return code, labels


def launch(
    kernel: Kernel, grid: tuple[int, ...], threads: int, arguments: list[bytes], memory: np.ndarray, shared: int = 0
) -> None:
    """Run a kernel. Global addresses are offsets in ``memory``, bytes; ``shared`` is how many bytes a block shares."""
    assert len(arguments) == len(kernel.parameters)
    parameters = bytearray(4096)
    for offset, argument in zip(kernel.parameters.values(), arguments, strict=True):
        parameters[offset : offset + len(argument)] = argument
    for index in product(*(range(count) for count in reversed(grid))):
        spaces = {"global": memory, "param": np.frombuffer(parameters, "u1"), "shared": np.full(shared, 255, "u1")}
        with np.errstate(all="ignore"):
            _Block(kernel, threads, index[::-1], spaces).run()


class _Block:
    """The threads of one block."""

    def __init__(self, kernel: Kernel, threads: int, index: tuple[int, ...], spaces: dict[str, np.ndarray]) -> None:
        self.kernel, self.threads, self.spaces = kernel, threads, spaces
        self.registers: dict[str, np.ndarray] = {}
        self.special = {"%tid.x": np.arange(threads), "%ntid.x": np.array(threads)}
        self.special |= {f"%ctaid.{axis}": np.array(i) for axis, i in zip("xyz", index, strict=False)}

    def run(self) -> None:
        code, labels = self.kernel.code, self.kernel.labels
        at = np.zeros(self.threads, int)
        waiting = np.zeros(self.threads, bool)
        while True:
            ready = (at < len(code)) & ~waiting
            if not ready.any():
                if not waiting.any():
                    return
                assert waiting.all(), "some threads wait at a barrier, others have returned"
                waiting[:] = False
                continue
            place = at[ready].min()  # those behind catch up first
            mask = ready & (at == place)
            stop = at[ready & ~mask].min(initial=len(code))
            jumped = False
            while place < stop and not jumped:
                instruction = code[place]
                active = self.guarded(instruction, mask)
                place += 1
                jumped = instruction.name in ("bra", "ret", "bar")
                if not jumped:
                    self.execute(instruction, active)
            at[mask] = place
            if jumped and instruction.name == "bar":
                waiting |= active
            elif jumped:
                at[active] = labels[instruction.operands[0]] if instruction.name == "bra" else len(code)

    def guarded(self, instruction: Instruction, mask: np.ndarray) -> np.ndarray:
        if not instruction.guard:
            return mask
        return mask & (self.value(instruction.guard, "pred") ^ instruction.negated)

    def execute(self, instruction: Instruction, mask: np.ndarray) -> None:
        _, _, name, modifiers, operands = instruction
        target, *sources = operands
        kind = modifiers[-1]
        if name in ("ld", "st"):
            self.move(name, modifiers, operands, mask)
        elif name in ("shfl", "vote"):
            self.write(target.partition("|")[0], "b32", self.exchanged(name, sources, mask), mask)
        elif name == "setp":
            self.write(target, "pred", self.compared(modifiers[0], *(self.value(s, kind) for s in sources)), mask)
        elif name == "cvt":
            self.write(target, modifiers[-2], self.value(sources[0], kind), mask)
        elif name == "selp":
            chooser = self.value(sources.pop(), "pred")
            self.write(target, kind, np.where(chooser, *(self.value(s, kind) for s in sources)), mask)
        else:
            assert MODIFIERS.issuperset(modifiers), instruction
            kinds = [kind, "b32"] if name in ("shl", "shr") else [kind] * len(sources)
            values = [self.value(*pair) for pair in zip(sources, kinds, strict=True)]
            if "wide" in modifiers:
                kind = f"{kind[0]}{2 * int(kind[1:])}"
                values = [value.astype(DTYPES[kind]) for value in values]
            result = self.computed(name, values)
            if "ftz" in modifiers:  # no subnormal numbers; where operands are, they were loaded
                result = np.where(np.abs(result) < TINY, np.float32(0), result)
            self.write(target, kind, result, mask)

    @staticmethod
    def computed(name: str, values: list[np.ndarray]) -> np.ndarray:
        if name in ("fma", "mad"):
            a, b, c = (value.astype("f8") if value.dtype == "f4" else value for value in values)
            return a * b + c
        if name == "div":  # of integers: towards zero
            return np.trunc(values[0] / values[1])
        return (UNARY[name] if len(values) == 1 else BINARY[name])(*values)

    @staticmethod
    def compared(how: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if len(how) == 3:  # geu: or one of them is NaN
            return COMPARISONS[how[:2]](x, y) | np.isnan(x) | np.isnan(y)
        return COMPARISONS[how](x, y) & (x == x) & (y == y)

    def move(self, name: str, modifiers: list[str], operands: list[str], mask: np.ndarray) -> None:
        space, kind = modifiers[0], modifiers[-1]
        target, registers = operands if name == "st" else operands[::-1]
        found = re.fullmatch(r"\[([%\w]+)(?:\+(-?\d+))?\]", target)
        assert found, target
        start = self.value(found[1], "s32" if found[1].startswith("%r") and found[1][2].isdigit() else "s64")
        addresses = np.broadcast_to(start.astype(int) + int(found[2] or 0), self.threads)[mask]
        dtype, memory = DTYPES[kind], self.spaces[space]
        names = registers.strip("{}").replace(" ", "").split(",")
        size = dtype.itemsize * len(names)
        inside = (addresses >= 0) & (addresses + size <= len(memory))
        assert (inside & (addresses % size == 0)).all(), f"{name}.{space}: an address outside, or not aligned"
        for offset, register in enumerate(names):
            places = addresses // dtype.itemsize + offset
            if name == "st":
                memory.view(dtype)[places] = np.broadcast_to(self.value(register, kind), self.threads)[mask]
            else:
                loaded = np.zeros(self.threads, dtype)
                loaded[mask] = memory.view(dtype)[places]
                self.write(register, kind, loaded, mask)

    def exchanged(self, name: str, sources: list[str], mask: np.ndarray) -> np.ndarray:
        warps = mask.reshape(-1, LANES)
        assert (warps.all(1) | ~warps.any(1)).all(), f"{name}: not all threads of a warp take part"
        if name == "shfl":  # .sync.bfly: from the lane whose number differs in these bits
            partners = np.arange(self.threads) ^ self.value(sources[1], "b32")
            return self.value(sources[0], "b32")[partners]
        votes = np.broadcast_to(self.value(sources[0], "pred"), self.threads).reshape(-1, LANES)
        return np.repeat((votes << np.arange(LANES)).sum(1), LANES)  # .sync.ballot: a bit for each lane

    def value(self, operand: str, kind: str) -> np.ndarray:
        if operand in self.special:
            return self.special[operand].astype(DTYPES[kind])
        if operand.startswith("%"):
            return self.register(operand).view(DTYPES[kind])
        if operand.startswith("0f"):
            return np.array(int(operand[2:], 16), "u4").view("f4")
        if operand[0].isdigit() or operand[0] == "-":
            return np.array(int(operand)).astype(DTYPES[kind])
        return np.array((self.kernel.parameters | self.kernel.shared)[operand]).astype(DTYPES[kind])

    def write(self, register: str, kind: str, value: np.ndarray, mask: np.ndarray) -> None:
        target = self.register(register)
        np.copyto(target, np.asarray(value).astype(DTYPES[kind]).view(target.dtype), where=mask)

    def register(self, name: str) -> np.ndarray:
        if name not in self.registers:
            self.registers[name] = np.full(self.threads, REGISTERS[name.strip("%0123456789")])
        return self.registers[name]
