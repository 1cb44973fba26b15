"""The texts of a scene: a sentence with every object and its place, and a long description.

All that is said follows from the boxes, (ymin, xmin, ymax, xmax) as shares of the image, and the
look of the canvas. What the words mean:

    at the top left ...  the box's centre: left and top end at 0.4, right and bottom begin at 0.6
    in the left half     the centre again; said where no centre is within 0.04 of the middle
    left of              centres 0.12 apart or more, and up or down by at most 0.45 of that
    above and left of    centres 0.12 apart or more in both
    next to              boxes at most 0.04 apart
    large, small         the box's longer side: from 0.37 on, up to 0.28
    larger than          by the longer side, 1.2 times; the largest: 1.1 times any other
    leftmost ...         by the centre, 0.05 more than any other
    no object is ...     no box reaches into that ninth of the image
"""

import dataclasses
import itertools

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
TEXTURE_STATEMENTS = {
    "gradient": ("the background fades from {} to {}", "from {} to {} the background fades"),
    "stripes": ("the background has {} and {} stripes", "the background is striped {} and {}"),
    "blotches": ("the background has {} and {} spots", "the background is spotted {} and {}"),
    "checks": ("the background has {} and {} squares", "the background is checked {} and {}"),
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object of a scene: its name and its box (ymin, xmin, ymax, xmax)."""

    name: str
    box: tuple[float, float, float, float]

    @property
    def centre(self):
        """(y, x)."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def side(self):
        """The longer side."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


def place(thing, article="the ") -> str:
    """Where in the image a thing is: "at the top left", "on the left", "in the middle"."""
    row, column = ((share >= 0.4) + (share > 0.6) for share in thing.centre)
    return _place(ROWS[row], COLUMNS[column], article)


def _place(row, column, article="the "):
    if row:
        return f"at {article}{row} {column}".rstrip()
    return f"on {article}{column}" if column else f"in {article}middle"


def relation(a, b) -> str | None:
    """How thing a is placed to b: "below", "left of", "above and left of"; None where too close."""
    down, right = (mine - other for mine, other in zip(a.centre, b.centre, strict=True))
    vertical = "below" if down > 0 else "above"
    horizontal = "right of" if right > 0 else "left of"
    if abs(down) >= 0.12 and abs(right) <= 0.45 * abs(down):
        return vertical
    if abs(right) >= 0.12 and abs(down) <= 0.45 * abs(right):
        return horizontal
    if min(abs(down), abs(right)) >= 0.12:
        return f"{vertical} and {horizontal}"
    return None


def sentence(things, rng) -> str:
    """One sentence with every thing once and where it is, in an order that says nothing."""
    things = [things[index] for index in rng.permutation(len(things))]
    article = "the " if len(things) <= 3 and rng.random() < 0.5 else ""
    parts = [f"{things[0].name} {place(things[0], article)}"]
    for number, thing in enumerate(things[1:], 1):
        other = things[rng.integers(number)]
        said = relation(thing, other)
        if rng.random() < 0.3 and said and "and" not in said:
            parts.append(f"{thing.name} {said} {article}{other.name}")
        else:
            parts.append(f"{thing.name} {place(thing, article)}")
    start = ("", "", "", f"{NUMBERS[len(things)]} objects: ")[rng.integers(4)]
    return f"{start}{', '.join(parts[:-1])} and {parts[-1]}"


def description(things, canvas, late, rng, count) -> tuple[str, int]:
    """A long text about a scene, true of it, that speaks of some things only in its second part.

    Args:
      things: Things of one scene.
      canvas: a Canvas.
      late: indices of the things that the second part is about, at least one.
      rng: numpy Generator.
      count: text -> number of tokens.

    Returns:
      The text, and the number of characters of its first part.
    """
    early = [index for index in range(len(things)) if index not in late]
    number = NUMBERS[len(things)]
    counted = (f"there are {number} objects", f"the picture shows {number} objects")
    opening = [_pick(counted, rng), _pick(_look(canvas), rng)]
    rng.shuffle(opening)
    own, others = _statements(things, early, set(early), rng)
    first = _fill(
        opening + own, others + _overview(things, early), rng.integers(85, 150), rng, count
    )
    own, others = _statements(things, late, set(range(len(things))), rng)
    last = _fill(own, others, rng.integers(35, 90), rng, count)
    shared = " ".join(f"{statement}." for statement in first)
    return " ".join([shared, *(f"{statement}." for statement in last)]), len(shared)


def _look(canvas):
    return [template.format(*canvas.colours) for template in TEXTURE_STATEMENTS[canvas.texture]]


def _fill(told, pool, tokens, rng, count):
    """What must be told, and of the pool as much as fits in so many tokens, in random order."""
    total = sum(count(f"{statement}.") for statement in told)
    extra = []
    for index in rng.permutation(len(pool)):
        if total >= tokens:
            break
        extra.append(pool[index])
        total += count(f"{pool[index]}.")
    # The places come first, as a person would tell them.
    return [*told, *extra]


def _statements(things, about, known, rng):
    """Where each of `about` is; and sizes and relations to things of `known`, in shuffled order."""
    own, others = [], []
    for index in (about[i] for i in rng.permutation(len(about))):
        thing = things[index]
        name, where = thing.name, place(thing)
        size = "large" if thing.side >= 0.37 else "small" if thing.side <= 0.28 else None
        forms = [f"the {name} is {where}", f"{where} is the {name}"]
        if size and rng.random() < 0.4:
            forms = [f"the {name} is {size} and {where}"]
        elif size:
            others.append(f"the {name} is {size}")
        own.append(_pick(forms, rng))
    pairs = [(a, b) for a, b in itertools.combinations(sorted(known), 2) if {a, b} & set(about)]
    for a, b in pairs:
        a, b = (things[index] for index in rng.permutation([a, b]))
        said = [relation(a, b)] if relation(a, b) else []
        said += ["next to"] if _gap(a, b) <= 0.04 else []
        said += ["larger than"] if a.side >= 1.2 * b.side else []
        said += ["smaller than"] if b.side >= 1.2 * a.side else []
        others += [f"the {a.name} is {words} the {b.name}" for words in said]
    return own, others


def _gap(a, b):
    """How far two boxes are apart, by the axis in which they are further apart."""
    return max(max(a.box[k] - b.box[k + 2], b.box[k] - a.box[k + 2]) for k in range(2))


def _overview(things, about):
    """What is true of the whole scene, and which of `about` stand out in it."""
    said = []
    ends = (("leftmost", 1, -1), ("rightmost", 1, 1), ("highest", 0, -1), ("lowest", 0, 1))
    for word, axis, sign in ends:
        far = [sign * thing.centre[axis] for thing in things]
        second, first = sorted(range(len(things)), key=far.__getitem__)[-2:]
        if far[first] - far[second] >= 0.05 and first in about:
            said.append(f"the {things[first].name} is the {word} object")
    for word, least in (("largest", False), ("smallest", True)):
        order = sorted(range(len(things)), key=lambda i: things[i].side, reverse=not least)
        low, high = sorted(things[index].side for index in order[:2])
        if high >= 1.1 * low and order[0] in about:
            said.append(f"the {things[order[0]].name} is the {word} object")
    for axis, halves in enumerate((("top", "bottom"), ("left", "right"))):
        if all(abs(thing.centre[axis] - 0.5) >= 0.04 for thing in things):
            low = sum(thing.centre[axis] < 0.5 for thing in things)
            for half, number in zip(halves, (low, len(things) - low), strict=True):
                verb = "object is" if number == 1 else "objects are"
                said.append(f"{NUMBERS[number]} {verb} in the {half} half")
    for row, column in itertools.product(range(3), range(3)):
        ninth = (row / 3, column / 3, (row + 1) / 3, (column + 1) / 3)
        if all(_gap(thing, Thing("", ninth)) >= 0 for thing in things):
            said.append(f"no object is {_place(ROWS[row], COLUMNS[column])}")
    return said


def _pick(options, rng):
    return options[rng.integers(len(options))]
