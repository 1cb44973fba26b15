"""The compiler's text, as far as we read it: computations, their instructions, and loops by trips.

The compiled text of a TPU program is a schedule: the instructions of the entry computation, and of
the loops' bodies, run in the order in which they stand. A fusion's own instructions are in a
computation that it calls; the costs of a fusion stand on the fusion.
"""

import functools
import math
import re
from dataclasses import dataclass

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}

COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)$")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str  # such as bf16[8,128]{1,0}, or a tuple of such
    opcode: str
    operands: tuple[str, ...]  # names
    attributes: str  # all after the operands

    @functools.cached_property
    def cycles(self):
        """The compiler's estimate; None where it makes none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @functools.cached_property
    def op_name(self):
        """The scopes and the operation that it comes from, with / between; "" where unknown."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name):
        """What `name=` or `"name":` is set to: a word, a %name or a number; None if nothing."""
        found = re.search(rf'\b{name}(?:=|":)"?%?([\w.\-]+)', self.attributes)
        return found[1] if found else None

    @property
    def arrays(self):
        """(dtype, sizes) of each array of the shape."""
        return arrays(self.shape)


def arrays(shape):
    """(dtype, sizes) of each array in the text of a shape."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    return [(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in found]


def size_in_bytes(shapes):
    """Bytes of arrays given as (dtype, sizes)."""
    return sum(BYTES.get(dtype, 0) * math.prod(sizes) for dtype, sizes in shapes)


def parse(text):
    """The computations of a compiled text by name, in order, and the name of the entry."""
    computations, current, entry = {}, None, None
    for line in text.splitlines():
        if line == "}":
            current = None
        elif header := COMPUTATION.match(line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif current is not None and (found := INSTRUCTION.match(line)):
            current.append([found[1], found[2]])
        elif current:  # a kernel's metadata goes on over several lines
            current[-1][1] += line
    made = {name: [instruction(*item) for item in own] for name, own in computations.items()}
    return made, entry


def instruction(name, rest):
    """The instruction of a line, `rest` being what follows its name."""
    shape_end = closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:shape_end], rest[shape_end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = closing(rest, 1)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[: end - 1]))
    # A constant's value is kept with the attributes.
    attributes = rest if opcode == "constant" else rest[end:]
    return Instruction(name, shape, opcode, operands, attributes)


def closing(text, depth):
    """Where the parenthesis that is open at `depth` ends; just past it."""
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    return len(text)


@dataclass(frozen=True)
class Region:
    """Instructions that run in order, so many times in all; `op_name` is of the innermost loop."""

    name: str
    instructions: tuple[Instruction, ...]
    trips: int
    op_name: str
    known: bool  # whether the compiler says how often the loop turns


def regions(computations, entry):
    """The entry computation and the loops and calls in it, each with its trips in a run."""
    found = []

    def walk(name, trips, op_name, known):
        own = tuple(computations[name])
        found.append(Region(name, own, trips, op_name, known))
        for item in own:
            if item.opcode == "while":
                turns = loop_trips(computations, item)
                inner = (item.op_name or op_name, known and turns is not None)
                for part in ("condition", "body"):
                    walk(item.attribute(part), trips * (turns or 1), *inner)
            elif item.opcode == "call":
                walk(item.attribute("to_apply"), trips, item.op_name or op_name, known)
            elif item.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", item.attributes)
                names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
                for branch in names:  # each counts: an upper bound
                    walk(branch, trips, item.op_name or op_name, known)

    walk(entry, 1, "", True)
    return found


def loop_trips(computations, loop):
    """How often a loop's body runs; None where the text does not say.

    A loop that jax.lax.scan makes counts from 0 to a constant of its condition.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    constants, names = [], [loop.attribute("condition")]
    while names:
        for item in computations.get(names.pop(), ()):
            if item.opcode == "constant" and re.match(r"[su]32\[\]", item.shape):
                constants.append(int(item.attributes.partition(")")[0]))
            called = item.attribute("calls")
            names += [called] if called else []
    return max((value for value in constants if value > 0), default=None)
