"""Reads a compiled program's text (HLO, of GPUs or CPUs): its matrix products, and what else it moves through memory.

For each computation that is run (the entry and the bodies of loops and branches): the operations of its matrix
products and the bytes that all other instructions read and write, as XLA fused them. Slices and gathers count as what
they take of their operand, updates in place as what they write. A guide to where time goes beside the products: caches
may hold what is counted here, and small kernels cost more than their bytes.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

ITEM = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
# Instructions that move nothing themselves.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
TAKES_PART = {"dynamic-slice", "slice", "gather"}
SHAPE = re.compile(r"(" + "|".join(ITEM) + r")\[([\d,]*)\]")
HEADER = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\) -> .* \{$")
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

    @property
    def fused(self) -> str | None:
        """The computation that it is, if it is a fusion or starts one that runs beside others."""
        return self.called[0] if self.op in ("fusion", "fusion-start") else None

    @property
    def moves(self) -> bool:
        """Whether it takes time; the end of what runs beside others does not, its start stands for it."""
        return self.op not in FREE and not self.op.endswith("-done")


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
        others = [x for x in body.values() if x.moves and not products[x.name]]
        moved = [(_bytes_read(computations, body, x) + _bytes_written(computations, body, x), x) for x in others]
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
    if product.fused:
        inner = computations[product.fused]
        return sum(_flops(computations, inner, x) for x in inner.values())
    dims = re.search(r'lhs_contracting_dim(?:ension)?s"?[:=][\[{]([^\]}]*)', product.rest)
    left = body.get(product.operands[0]) if product.operands else None
    if not dims or left is None:
        return 0
    (_, sizes), (_, result) = next(_arrays(left.shape)), next(_arrays(product.shape))
    return 2 * math.prod(result) * math.prod(sizes[int(i)] for i in re.findall(r"\d+", dims[1]))


def _bytes_read(computations: dict[str, Computation], body: Computation, instruction: Instruction) -> int:
    names = {name for name in instruction.operands if name in body}
    return sum(_taken(computations, body, name, [instruction]) for name in names)


def _taken(computations: dict[str, Computation], body: Computation, name: str, users: Iterable[Instruction]) -> int:
    """Bytes of the array `name` that the instructions `users` of the same computation read.

    All of it, or what slices take; nothing of what is updated in place.
    """
    same, taken, whole = {name}, 0, size(body[name].shape)
    for user in users:  # in order of definition: bitcasts before what uses them
        places = [i for i, operand in enumerate(user.operands) if operand in same]
        if not places:
            continue
        if user.op == "bitcast":
            same.add(user.name)
        elif user.fused:
            inner = computations[user.fused]
            parameters = [x for x in inner.values() if x.op == "parameter" and int(x.rest.split(")")[0]) in places]
            taken += sum(_taken(computations, inner, x.name, inner.values()) for x in parameters)
        elif user.op in TAKES_PART and places == [0]:
            taken += size(user.shape)
        elif user.op != "dynamic-update-slice" or places != [0]:
            return whole
    return min(taken, whole)


def _bytes_written(computations: dict[str, Computation], body: Computation, instruction: Instruction) -> int:
    """The size of its result; of what it updates in place, the size of the update."""
    if instruction.op == "dynamic-update-slice":
        return size(body[instruction.operands[1]].shape)
    if instruction.op == "copy-start":  # its result has the operand as well
        return size(body[instruction.operands[0]].shape)
    if not instruction.fused:
        return size(instruction.shape)
    inner = computations[instruction.fused]
    (root,) = (x for x in inner.values() if x.root)
    results = [inner[name] for name in root.operands] if root.op == "tuple" else [root]
    return sum(_bytes_written(computations, inner, _before_bitcasts(inner, result)) for result in results)


def _before_bitcasts(body: Computation, x: Instruction) -> Instruction:
    while x.op == "bitcast":
        x = body[x.operands[0]]
    return x
