"""Reads the text of a compiled XLA program: computations, instructions, shapes.

Only what counting collectives needs is read; `hlo.py` calls it. Nothing is assumed: text in a form that is not
understood raises, because a line skipped is a collective not counted.
"""

import dataclasses
import re

_HEADER = re.compile(r"(ENTRY\s+)?%([\w.\-]+)\s*(?:\(.*\)\s*->.*)?\{\s*")
_NAME = re.compile(r"\s+(ROOT\s+)?%([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9\-]*)\((.*)", re.DOTALL)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")

# Bits of one element as XLA lays it out when the layout does not say otherwise: types below 8 bits take a byte each
# unless the layout packs them, which it shows as E(bits).
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0}
_BITS |= {f"{sign}{bits}": max(bits, 8) for sign in "su" for bits in (1, 2, 4, 8, 16, 32, 64)}
_BITS |= {"f4e2m1fn": 8, "f6e2m3fn": 8, "f6e3m2fn": 8}
_BITS |= {
    f"f8{kind}": 8 for kind in ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
}


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation: `name = shape opcode(rest`."""

    name: str
    shape: str
    opcode: str
    rest: str
    """Operands, the closing parenthesis and all attributes, as printed."""

    @property
    def attributes(self) -> str:
        """`rest` with every quoted string emptied, so that names inside metadata cannot be taken for attributes."""
        return _QUOTED.sub('""', self.rest)

    @property
    def operands(self) -> list[str]:
        """Names of the operands, or the literal of a constant or the number of a parameter."""
        inside, _ = _balanced("(" + self.rest)
        return [part.split()[-1].lstrip("%") for part in split_top(inside[1:-1]) if part.strip()]

    @property
    def called(self) -> dict[str, list[str]]:
        """Attribute -> computations that it names, e.g. {'condition': ['c'], 'body': ['b']}."""
        found: dict[str, list[str]] = {}
        # control-predecessors={%copy.1} names instructions, not computations; no calling attribute has a hyphen.
        for attribute, names in re.findall(r"(?<![\w-])([a-z_]+)=(\{\s*%[^{}]*\}|%[\w.\-]+)", self.attributes):
            found.setdefault(attribute, []).extend(re.findall(r"%([\w.\-]+)", names))
        return found

    @property
    def op_name(self) -> str:
        """Where in the user's program it came from, as JAX recorded it; '' when it did not."""
        match = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', self.rest)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True, slots=True)
class Computation:
    """A function of the program."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: str
    num_devices: int
    """num_partitions x replica_count of the header."""


def parse_module(hlo_text: str) -> Module:
    """Splits the text of a compiled program into computations.

    Raises:
        ValueError: not compiled HLO (StableHLO, or HLO from before the partitioner ran), or a line that cannot be read.
    """
    header, _, body = hlo_text.lstrip().partition("\n")
    if not header.startswith("HloModule "):
        raise ValueError(f"not HLO text (it begins {header[:40]!r}); pass jax.jit(f).lower(...).compile().as_text()")
    if "is_scheduled=true" not in header:
        raise ValueError(
            "this HLO has not been compiled: its header lacks is_scheduled=true, so XLA has not placed its collectives "
            "yet; pass lower(...).compile().as_text(), not lower(...).as_text()"
        )
    sizes = [int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)]
    if len(sizes) == 2 and min(sizes) > 1:
        raise ValueError(f"replicas and partitions together ({sizes}) cannot be mapped to one mesh; use jax.jit only")
    computations, entry = _computations(re.sub(r"/\*index=\d+\*/", "", body))
    return Module(computations, entry, max(sizes, default=1))


def _computations(body: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: dict[str, Instruction] | None = None
    name = root = ""
    for line in body.split("\n"):
        if current is None:
            if line.startswith("HloModule "):
                raise ValueError("the text holds several programs; pass the text of one")
            if match := _HEADER.fullmatch(line):
                name, current, root = match[2], {}, ""
                entry = name if match[1] else entry
        elif line.startswith("}"):
            last = root or next(reversed(current))
            computations[name] = Computation(name, current, current[last])
            current = None
        elif line.strip():
            instruction, is_root = _instruction(line, name)
            current[instruction.name] = instruction
            root = instruction.name if is_root else root
    if current is not None or not entry:
        raise ValueError("the text ends early: " + (f"computation {name} is not closed" if entry else "no ENTRY"))
    return computations, entry


def _instruction(line: str, computation: str) -> tuple[Instruction, bool]:
    match = _NAME.match(line)
    if not match:
        raise ValueError(f"cannot read this line of computation {computation}: {line.strip()[:200]}")
    rest = line[match.end() :]
    shape, rest = _balanced(rest) if rest.startswith("(") else _shape_end(rest)
    opcode = _OPCODE.match(rest)
    if not opcode:
        raise ValueError(f"cannot read the opcode of {match[2]} in computation {computation}: {line.strip()[:200]}")
    return Instruction(match[2], shape, opcode[1], opcode[2]), bool(match[1])


def _shape_end(text: str) -> tuple[str, str]:
    shape, space, rest = text.partition(" ")
    return shape, space + rest


def _balanced(text: str) -> tuple[str, str]:
    """Splits after the bracket that closes the first character; quotes are not expected before it."""
    depth = 0
    for match in re.finditer(r"[(){}\[\]]", text):
        depth += 1 if match[0] in "({[" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    raise ValueError(f"bracket not closed: {text[:120]}")


def split_top(text: str) -> list[str]:
    """Splits at the commas that are not inside brackets.

    Example:
        >>> split_top("f32[2,3]{1,0}, (s8[], s8[])")
        ['f32[2,3]{1,0}', ' (s8[], s8[])']
    """
    if not text:
        return []
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[(){}\[\],]", text):
        if match[0] == ",":
            if depth == 0:
                parts.append(text[start : match.start()])
                start = match.end()
        else:
            depth += 1 if match[0] in "({[" else -1
    return [*parts, text[start:]]


def tuple_elements(shape: str) -> list[str] | None:
    """Shapes inside a tuple shape, None if it is not a tuple.

    Example:
        >>> tuple_elements("(f32[2]{0}, (s8[], s8[]))"), tuple_elements("f32[2]{0}")
        (['f32[2]{0}', '(s8[], s8[])'], None)
    """
    shape = shape.strip()
    return [part.strip() for part in split_top(shape[1:-1])] if shape.startswith("(") else None


def shape_bytes(shape: str) -> tuple[int, list[str]]:
    """Bytes of a shape on the device, and its element types in the order in which they first appear.

    A bounded dimension (`<=8`) counts with its bound; a tuple is the sum of its elements.

    Raises:
        ValueError: an element type or form of shape that is not known.

    Example:
        >>> shape_bytes("f32[1,2,8]{2,1,0}"), shape_bytes("(bf16[4]{0}, pred[])"), shape_bytes("s4[6]{0:E(4)}")
        ((64, ['f32']), (9, ['bf16', 'pred']), (3, ['s4']))
    """
    if (elements := tuple_elements(shape)) is not None:
        total, dtypes = 0, []
        for element in elements:
            size, inner = shape_bytes(element)
            total += size
            dtypes += [dtype for dtype in inner if dtype not in dtypes]
        return total, dtypes
    match = _ARRAY.fullmatch(shape.strip())
    if not match or match[1] not in _BITS:
        raise ValueError(f"unknown shape {shape!r}")
    packed = re.search(r"\bE\((\d+)\)", match[3] or "")
    bits = int(packed[1]) if packed else _BITS[match[1]]
    for dim in filter(None, match[2].split(",")):
        bits *= int(dim.removeprefix("<="))
    return -(-bits // 8), [match[1]]
