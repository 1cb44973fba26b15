"""Every statement of every text is read back and held against the boxes, by code of its own."""

import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mmgem_jax.data import scene_canvas, scene_text, scenes

NUMBERS = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
PLACE = (
    r"(?:at (?:the )?(?:top|bottom)(?: left| right)?"
    r"|on (?:the )?(?:left|right)|in (?:the )?middle)"
)
RELATION = r"(?:(?:above|below) and (?:left|right) of|above|below|(?:left|right) of)"


@pytest.fixture(scope="module")
def records(emoji_config):
    data_dir = emoji_config().data.dir
    builder = tfds.builder_from_directory(scenes.build(data_dir, "fixture"))
    sources = builder.as_data_source(decoders={"image": tfds.decode.SkipDecoding()})
    return [record for source in sources.values() for record in source]


class Boxes:
    """What can be asked of a scene: all answers come from its boxes, in pixels of 1200 a side."""

    def __init__(self, record, mirrored=False):
        names = [name.decode() for name in record["regions"]["text"]]
        boxes = np.round(1200 * np.stack(record["regions"]["bbox"]).astype(float), 6)
        if mirrored:
            boxes = boxes[:, [0, 3, 2, 1]] * [1, -1, 1, -1] + [0, 1200, 0, 1200]
        self.of = dict(zip(names, boxes.tolist(), strict=True))
        # The longest first, so that "cat face" is not read as a "cat".
        self.name = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))

    def x(self, name):
        return (self.of[name][1] + self.of[name][3]) / 2

    def y(self, name):
        return (self.of[name][0] + self.of[name][2]) / 2

    def longer(self, name):
        top, left, bottom, right = self.of[name]
        return max(bottom - top, right - left)

    def is_at(self, name, place):
        words = set(place.replace("the ", "").split())
        column = (self.x(name) < 480) - (self.x(name) > 720)
        row = (self.y(name) < 480) - (self.y(name) > 720)
        said_column = ("left" in words) - ("right" in words)
        return (column, row) == (said_column, ("top" in words) - ("bottom" in words))

    def is_related(self, a, words, b):
        """By angle: 24 degrees round an axis are plainly beside or above, the rest is both."""
        right, down = self.x(a) - self.x(b), self.y(a) - self.y(b)
        found = []
        slope = 0.45 + 1e-9
        if abs(down) > slope * abs(right):
            found.append("below" if down > 0 else "above")
        if abs(right) > slope * abs(down):
            found.append("right of" if right > 0 else "left of")
        far = [side for side in (abs(down), abs(right)) if side >= 144 - 1e-6]
        return " and ".join(found) == words and len(far) >= len(found)

    def gap(self, a, b):
        (top, left, bottom, right), (other_top, other_left, other_bottom, other_right) = a, b
        across = max(left - other_right, other_left - right, 0)
        return max(across, top - other_bottom, other_top - bottom)

    def stands_out(self, name, key, least):
        return all(key(name) >= least(key(other)) for other in self.of if other != name)


def is_true(statement, look):
    """Does the statement hold of the boxes? None where it speaks of something else."""
    thing, number = f"(?:the )?({look.name})", f"({'|'.join(NUMBERS)})"

    def read(pattern):
        return re.fullmatch(pattern, statement)

    if found := read(f"{thing} is (?:(large|small) and )?({PLACE})"):
        name, size, place = found.groups()
        return look.is_at(name, place) and (not size or is_true(f"{name} is {size}", look))
    if found := read(f"({PLACE}) is {thing}"):
        return look.is_at(found[2], found[1])
    if found := read(f"{thing} is (large|small)"):
        side = look.longer(found[1])
        return side >= 444 if found[2] == "large" else side <= 336
    if found := read(f"{thing} is ({RELATION}) {thing}"):
        return look.is_related(*found.groups())
    if found := read(f"{thing} is next to {thing}"):
        return look.gap(look.of[found[1]], look.of[found[2]]) <= 48 + 1e-6
    if found := read(f"{thing} is (larger|smaller) than {thing}"):
        big, little = found[1], found[3]
        if found[2] == "smaller":
            big, little = little, big
        return look.longer(big) >= 1.2 * look.longer(little) - 1e-6
    if found := read(f"{thing} is the (leftmost|rightmost|highest|lowest) object"):
        key = look.x if found[2].endswith("most") else look.y
        sign = -1 if found[2] in ("leftmost", "highest") else 1
        return look.stands_out(found[1], lambda n: sign * key(n), lambda v: v + 60 - 1e-6)
    if found := read(f"{thing} is the (largest|smallest) object"):
        power = 1 if found[2] == "largest" else -1
        return look.stands_out(
            found[1], lambda n: look.longer(n) ** power, lambda v: 1.1 * v - 1e-9
        )
    if found := read(f"{number} objects? (?:is|are) in the (top|bottom|left|right) half"):
        key = look.y if found[2] in ("top", "bottom") else look.x
        lower = found[2] in ("top", "left")
        inside = [key(name) < 600 if lower else key(name) > 600 for name in look.of]
        clear = all(abs(key(name) - 600) > 48 - 1e-6 for name in look.of)
        return clear and sum(inside) == NUMBERS[found[1]]
    if found := read(f"no object is ({PLACE})"):
        row = 400 * (("bottom" in found[1]) - ("top" in found[1]) + 1)
        column = 400 * (("right" in found[1]) - ("left" in found[1]) + 1)
        # A pixel inside the box is inside the ninth: the two share more than an edge.
        return not any(
            min(b, row + 400) - max(t, row) > 1e-3 and min(r, column + 400) - max(le, column) > 1e-3
            for t, le, b, r in look.of.values()
        )
    if found := read(f"(?:there are|the picture shows) {number} objects"):
        return NUMBERS[found[1]] == len(look.of)
    return None


def statements(record):
    text = record["description"].decode()
    assert text.endswith(".")
    return text[:-1].split(". ")


def test_every_statement_of_every_description_is_true_of_the_boxes(records):
    kinds = set()
    for record in records:
        look = Boxes(record)
        told = statements(record)
        assert len(set(told)) == len(told)
        assert sum("background" in statement for statement in told) == 1
        for statement in told:
            if "background" not in statement:
                assert is_true(statement, look), (record["id"], statement, look.of)
                kinds.add(re.sub(look.name, "it", statement))
        for name in map(re.escape, look.of):
            place = f"the {name} is (?:(?:large|small) and )?{PLACE}|{PLACE} is the {name}"
            assert sum(bool(re.fullmatch(place, statement)) for statement in told) == 1
    for kind in (
        "next to",
        "and left of",
        "larger than",
        "highest",
        "largest",
        "half",
        "no object",
    ):
        assert any(kind in said for said in kinds)


def test_every_sentence_names_every_object_once_at_its_place(records):
    related = 0
    for record in records:
        look, text = Boxes(record), record["sentence"].decode()
        clause = f"(?:{look.name}) (?:{PLACE}|{RELATION} (?:the )?(?:{look.name}))"
        whole = re.fullmatch(f"(?:(\\w+) objects: )?({clause}(?:, {clause})* and {clause})", text)
        assert whole, text
        assert not whole[1] or NUMBERS[whole[1]] == len(look.of)
        told = []
        for part in re.findall(clause, whole[2]):
            name = re.match(look.name, part)[0]
            rest = part.removeprefix(f"{name} ")
            assert is_true(f"{name} is {rest}", look), (text, part)
            if not re.fullmatch(PLACE, rest):
                other = re.search(f"({look.name})$", rest)[0]
                assert other in told  # what a place refers to has been told before
                related += 1
            told.append(name)
        assert sorted(told) == sorted(look.of)
    assert related > 5


def test_the_reader_tells_true_from_false(records):
    """In a mirror, what is said of sides is false somewhere."""
    for record in records:
        sides = [s for s in statements(record) if re.search(r"\b(left|right)\b", s)]
        told = [s for s in sides if "object" not in s and "background" not in s]
        assert not told or not all(is_true(s, Boxes(record, mirrored=True)) for s in told)


def thing(name, top, left, side=0.3):
    return scene_text.Thing(name, (top, left, top + side, left + side))


def test_words_of_places_and_relations():
    corners = {
        (0.0, 0.0): "at the top left",
        (0.0, 0.35): "at the top",
        (0.35, 0.7): "on the right",
        (0.35, 0.35): "in the middle",
        (0.7, 0.7): "at the bottom right",
    }
    for (top, left), words in corners.items():
        assert scene_text.place(thing("key", top, left)) == words
    assert scene_text.place(thing("key", 0.0, 0.0), article="") == "at top left"
    low, high = thing("key", 0.6, 0.3), thing("cat", 0.1, 0.3)
    assert scene_text.relation(low, high) == "below"
    assert scene_text.relation(high, low) == "above"
    assert scene_text.relation(thing("key", 0.3, 0.0), thing("cat", 0.35, 0.6)) == "left of"
    assert scene_text.relation(thing("a", 0.6, 0.6), thing("b", 0, 0)) == "below and right of"
    assert scene_text.relation(thing("a", 0.3, 0.3), thing("b", 0.35, 0.35)) is None


def test_a_description_speaks_of_the_late_things_in_its_second_part_alone():
    things = [thing("key", 0, 0), thing("cat", 0.6, 0.1, 0.2), thing("bus", 0.3, 0.6, 0.4)]
    canvas = scene_canvas.Canvas("stripes", ("red", "blue"), None)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        text, length = scene_text.description(things, canvas, [2], rng, lambda t: len(t.split()))
        assert "bus" not in text[:length]
        assert text[:length].endswith(".")
        assert "bus" in text[length:]
        assert all("bus" in statement for statement in text[length:-1].split(". "))
        assert re.search("red and blue", text[:length])
