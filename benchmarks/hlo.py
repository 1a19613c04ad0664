"""Reads a compiled program's text (HLO): its matrix products, and what else it moves through memory.

For each computation that is run (the entry and the bodies of loops and branches): the operations of its matrix
products and the bytes that all other instructions read and write, as XLA fused them. Slices and gathers count as what
they take of their operand, updates in place as what they write. A guide to where time goes beside the products: caches
may hold what is counted here, and small kernels cost more than their bytes.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

ITEM = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
# Instructions that move nothing themselves; the ends of asynchronous copies stand for their starts.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "fusion-done"}
TAKES_PART = {"dynamic-slice", "slice", "gather"}
SHAPE = re.compile(r"(" + "|".join(ITEM) + r")\[([\d,]*)\]")
HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)"
)


@dataclass(frozen=True)
class Instruction:
    """A line of HLO."""

    name: str
    shape: str
    op: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """The names in its parentheses."""
        return re.findall(r"%([\w.-]+)", self.rest.split("), ")[0])

    @property
    def source(self) -> str:
        """What it was in JAX: its op_name."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        """The computations that it consists of, as a fusion, or applies to elements."""
        return re.findall(r"(?:calls|to_apply)=%([\w.-]+)", self.rest)


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Cost:
    """What one run of a computation costs; moved has (bytes, instruction), largest first."""

    name: str
    flops: float
    moved: list[tuple[int, Instruction]]

    @property
    def bytes_moved(self) -> int:
        return sum(count for count, _ in self.moved)


def costs(text: str) -> list[Cost]:
    """The cost of each computation of a program that is run, in the order of the text; trips of loops not counted."""
    computations = _parse(text)
    inside = {
        name
        for body in computations.values()
        for x in body.values()
        if x.op not in ("while", "call")
        for name in x.called
    }
    found = []
    for name, body in computations.items():
        if name in inside:
            continue
        products = {x.name: _flops(computations, body, x) for x in body.values()}
        others = [x for x in body.values() if x.op not in FREE and not products.get(x.name)]
        moved = [(_bytes_read(computations, body, x) + _bytes_written(computations, x), x) for x in others]
        found.append(Cost(name, sum(products.values()), sorted(moved, key=lambda pair: -pair[0])))
    return found


def _parse(text: str) -> dict[str, Computation]:
    found: dict[str, Computation] = {}
    current: Computation = {}
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = found[header["name"]] = {}
        elif match := INSTRUCTION.match(line):
            parts = match.groupdict()
            current[parts["name"]] = Instruction(**(parts | {"root": bool(parts["root"])}))
    return found


def _arrays(shape: str) -> Iterator[tuple[str, list[int]]]:
    for dtype, sizes in SHAPE.findall(shape):
        yield dtype, [int(size) for size in sizes.split(",") if size]


def size(shape: str) -> int:
    """Bytes of an array or tuple."""
    return sum(ITEM[dtype] * math.prod(sizes) for dtype, sizes in _arrays(shape))


def _flops(computations: dict[str, Computation], body: Computation, product: Instruction) -> float:
    """2 x the size of the result x the contracted size of the left operand, of a product or those in a fusion."""
    if product.op == "fusion":
        inner = computations[product.called[0]]
        return sum(_flops(computations, inner, x) for x in inner.values())
    dims = re.search(r'lhs_contracting_dim(?:ension)?s"?[:=][\[{]([^\]}]*)', product.rest)
    left = body.get(product.operands[0]) if product.operands else None
    if not dims or left is None:
        return 0
    (_, sizes), (_, result) = next(_arrays(left.shape)), next(_arrays(product.shape))
    return 2 * math.prod(result) * math.prod(sizes[int(i)] for i in re.findall(r"\d+", dims[1]))


def _bytes_read(computations: dict[str, Computation], body: Computation, instruction: Instruction) -> int:
    operands = [size(body[name].shape) for name in instruction.operands if name in body]
    if instruction.op in TAKES_PART:
        return size(instruction.shape)
    if instruction.op != "fusion":
        return sum(operands)
    inner = computations[instruction.called[0]]
    return sum(_taken(inner, x) for x in inner.values() if x.op == "parameter")


def _taken(inner: Computation, parameter: Instruction) -> int:
    """Bytes of a fusion's parameter that it reads: all, or what slices take; nothing of what is updated in place."""
    names, users = {parameter.name}, []
    for x in inner.values():  # in order of definition: bitcasts before what uses them
        if names & set(x.operands):
            if x.op == "bitcast":
                names.add(x.name)
            else:
                users.append(x)
    parts = 0
    for x in users:
        updated = x.op == "dynamic-update-slice" and x.operands[0] in names
        if not updated and x.op not in TAKES_PART:
            return size(parameter.shape)
        parts += 0 if updated else size(x.shape)
    return min(parts, size(parameter.shape))


def _bytes_written(computations: dict[str, Computation], instruction: Instruction) -> int:
    if instruction.op == "dynamic-update-slice":
        return 0  # its update is counted as read; it is written once as well, but so little that it does not matter
    if instruction.op == "fusion":
        inner = computations[instruction.called[0]]
        roots = [x for x in inner.values() if x.root]
        if roots and roots[0].op == "tuple":
            roots = [inner[name] for name in roots[0].operands if name in inner]
        while roots and roots[0].op == "bitcast":
            roots = [inner[roots[0].operands[0]], *roots[1:]]
        if roots and all(x.op == "dynamic-update-slice" for x in roots):
            return sum(size(inner[x.operands[1]].shape) for x in roots)
    return size(instruction.shape)
