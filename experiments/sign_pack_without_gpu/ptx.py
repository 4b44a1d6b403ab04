"""Runs the PTX of a warpgroup kernel in numpy: one thread block after the other, its 128 threads as one vector.

Enough of the language for kernels without barriers that wait and without branches that part the threads: what is not
known raises. Every store is checked: it must be aligned, inside one of the arguments, and no byte may be written by
two blocks. Registers are uint64, and hold bits; shared memory is a few bytes of its own.
"""

import re
from collections.abc import Callable

import numpy as np

THREADS = 128
SHARED = 4096
LOW = np.uint64(0xFFFFFFFF)
type Words = np.ndarray  # [128] uint64
type Instruction = tuple[str | None, str, list[str]]  # guard, opcode, operands


def as_float(words: Words) -> np.ndarray:
    return (words & LOW).astype(np.uint32).view(np.float32)


def from_float(values: np.ndarray) -> Words:
    return values.astype(np.float32).view(np.uint32).astype(np.uint64)


def as_signed(words: Words) -> np.ndarray:
    return (words & LOW).astype(np.uint32).view(np.int32).astype(np.int64)


def split(operands: str) -> list[str]:
    """At commas outside of braces."""
    return [part.strip() for part in re.split(r",(?![^{]*\})", operands) if part.strip()]


def parse(text: str) -> tuple[list[str], list[Instruction], dict[str, int]]:
    """Names of the parameters, the instructions, and where the labels are."""
    head, _, body = text[text.index(".visible .entry") :].partition(")")
    program, labels = [], {}
    for line in body[body.index("{") + 1 :].splitlines():
        line = line.partition("//")[0].strip().rstrip(";").strip()
        if label := re.fullmatch(r"(\$\w+):", line):
            labels[label[1]] = len(program)
        elif line and line[0] not in ".{}":
            guard, opcode, operands = re.fullmatch(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)", line).groups()
            program.append((guard, opcode, split(operands)))
    return re.findall(r"\w+_param_\d+", head), program, labels


FLOAT: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
}
INTEGER: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "max": lambda a, b: np.maximum(a, b),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "shl": lambda a, b: np.where(b > 63, np.uint64(0), a << (b & np.uint64(63))),
    "shr": lambda a, b: np.where(b > 63, np.uint64(0), a >> (b & np.uint64(63))),
}
COMPARE = {"ge": np.greater_equal, "lt": np.less, "eq": np.equal, "ne": np.not_equal}
CONVERT: dict[str, Callable] = {
    "f32.bf16": lambda a: (a & np.uint64(0xFFFF)) << np.uint64(16),
    "u64.u32": lambda a: a & LOW,
    "u32.u64": lambda a: a & LOW,
    "s64.s32": lambda a: as_signed(a).view(np.uint64),
}


class Memory:
    """The arguments of a kernel in one array of bytes, and by which block each byte was written."""

    def __init__(self, buffers: list[np.ndarray]):
        self.places, end = [], 4096
        for buffer in buffers:
            self.places.append(end)
            end += (buffer.nbytes + 511) // 256 * 256
        self.bytes, self.writer = np.zeros(end, np.uint8), np.full(end, -1)
        self.inside = np.zeros(end, bool)
        for buffer, place in zip(buffers, self.places, strict=True):
            self.bytes[place : place + buffer.nbytes] = buffer.view(np.uint8).reshape(-1)
            self.inside[place : place + buffer.nbytes] = True


class Block:
    """One thread block."""

    def __init__(self, memory: Memory, addresses: dict[str, int], place: tuple[int, int], number: int):
        self.memory, self.addresses, self.number = memory, addresses, number
        self.shared = np.zeros(SHARED, np.uint8)
        thread = np.arange(THREADS, dtype=np.uint64)
        self.registers = {"%tid.x": thread, "%ctaid.x": thread * 0 + place[0], "%ctaid.y": thread * 0 + place[1]}

    def value(self, name: str) -> Words:
        if name in self.registers:
            return self.registers[name]
        if name.startswith("0f"):
            number = int(name[2:], 16)
        elif name == "__dynamic_shmem__0":
            number = 0
        else:
            number = int(name.rstrip("U"), 0) & (2**64 - 1)
        return np.full(THREADS, number, np.uint64)

    def run(self, program: list[Instruction], labels: dict[str, int]) -> None:
        at = 0
        while True:
            guard, opcode, operands = program[at]
            at += 1
            name = opcode.partition(".")[0]
            if name == "ret":
                return
            if guard is not None:
                assert name == "bra", f"a guarded {opcode}"
                taken = self.registers[guard.lstrip("!")].astype(bool) ^ guard.startswith("!")
                assert taken.all() or not taken.any(), "threads part"
                if not taken.any():
                    continue
            if name == "bra":
                at = labels[operands[0]]
            elif name not in ("bar", "fence", "elect"):  # blocks run in step; no elected thread does anything here
                self.execute(name, opcode, operands)

    def execute(self, name: str, opcode: str, operands: list[str]) -> None:
        kind, (target, *sources) = opcode.rpartition(".")[2], operands
        if name in ("ld", "st"):
            self.transfer(opcode, operands)
        elif name in ("mov", "cvta"):
            self.move(target, sources[0], int(kind[1:]))
        elif name == "selp":
            yes, no, which = map(self.value, sources)
            self.registers[target] = np.where(which.astype(bool), yes, no)
        elif name == "shfl":
            thread, by = np.arange(THREADS), int(sources[1])
            self.registers[target] = self.value(sources[0])[
                thread ^ by if ".bfly." in opcode else thread // 32 * 32 + by
            ]
        elif name == "prmt":
            self.registers[target] = self.permute(*map(self.value, sources))
        elif name == "cvt":
            self.registers[target] = CONVERT[opcode.partition(".")[2]](self.value(sources[0]))
        elif name == "setp":
            view = {"f32": as_float, "s32": as_signed, "b32": lambda a: a & LOW}[kind]
            compare = COMPARE[opcode.split(".")[1]]
            self.registers[target] = compare(*(view(self.value(s)) for s in sources)).astype(np.uint64)
        else:
            self.registers[target] = self.arithmetic(name, opcode, kind, [self.value(s) for s in sources])

    def arithmetic(self, name: str, opcode: str, kind: str, values: list[Words]) -> Words:
        if kind == "f32":
            return from_float(FLOAT[name](*map(as_float, values)))
        if ".wide." in opcode:
            a, b = (as_signed(v) if kind == "s32" else v & LOW for v in values)
            return (a * b).astype(np.int64).view(np.uint64) if kind == "s32" else a * b
        assert kind[0] != "s" or name not in ("shr", "max"), f"signed {opcode}"
        if kind.endswith("64"):
            return INTEGER[name](*values)
        return INTEGER[name](*(v & LOW for v in values)) & LOW

    def move(self, target: str, source: str, bits: int) -> None:
        """Also between a register and a tuple of narrower ones."""
        if not target.startswith("{") and not source.startswith("{"):
            self.registers[target] = self.value(source)
            return
        parts = split((target if target.startswith("{") else source).strip("{}"))
        width = bits // len(parts)
        places = [np.uint64(width * i) for i in range(len(parts))]
        mask = np.uint64(2**width - 1)
        if target.startswith("{"):
            self.registers |= {r: (self.value(source) >> p) & mask for r, p in zip(parts, places, strict=True)}
        else:
            words = [(self.value(r) & mask) << p for r, p in zip(parts, places, strict=True)]
            self.registers[target] = np.bitwise_or.reduce(words)

    def permute(self, a: Words, b: Words, choice: Words) -> Words:
        """Bytes of b and a, chosen by four digits, without signs."""
        pool = (a & LOW) | ((b & LOW) << np.uint64(32))
        out = np.zeros(THREADS, np.uint64)
        for i in map(np.uint64, range(4)):
            digit = (choice >> (np.uint64(4) * i)) & np.uint64(15)
            assert (digit < 8).all(), "prmt with signs"
            out |= ((pool >> (np.uint64(8) * digit)) & np.uint64(255)) << (np.uint64(8) * i)
        return out

    def transfer(self, opcode: str, operands: list[str]) -> None:
        address = operands[1 if opcode.startswith("ld") else 0].strip("[]")
        if ".param" in opcode:
            self.registers[operands[0]] = np.full(THREADS, self.addresses[address], np.uint64)
            return
        base, _, offset = address.partition("+")
        start = (self.value(base) + np.uint64(int(offset or 0))).astype(np.int64)
        names = split(operands[0 if opcode.startswith("ld") else 1].strip("{}"))
        width = int(opcode.rpartition(".")[2][1:]) // 8
        assert (start % (width * len(names)) == 0).all(), f"misaligned {opcode}"
        space = self.shared if ".shared." in opcode else self.memory.bytes
        for i, name in enumerate(names):
            for j in range(width):
                place, shift = start + i * width + j, np.uint64(8 * j)
                assert space is self.shared or self.memory.inside[place].all(), f"out of bounds: {opcode}"
                if opcode.startswith("ld"):
                    word = space[place].astype(np.uint64) << shift
                    self.registers[name] = word if j == 0 else self.registers[name] | word
                    continue
                space[place] = ((self.value(name) >> shift) & np.uint64(255)).astype(np.uint8)
                if space is self.memory.bytes:
                    assert np.isin(self.memory.writer[place], (-1, self.number)).all(), "two blocks write one byte"
                    self.memory.writer[place] = self.number


def run(text: str, buffers: list[np.ndarray], grid: tuple[int, int]) -> None:
    """Run a kernel over a grid (x, y). `buffers`, in the order of its parameters, are updated in place."""
    names, program, labels = parse(text)
    memory = Memory(buffers)
    addresses = dict(zip(names, memory.places, strict=True))
    for number in range(grid[0] * grid[1]):
        Block(memory, addresses, (number % grid[0], number // grid[0]), number).run(program, labels)
    for buffer, place in zip(buffers, memory.places, strict=True):
        buffer.view(np.uint8).reshape(-1)[:] = memory.bytes[place : place + buffer.nbytes]
