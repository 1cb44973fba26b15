"""Scenes made of drawings: which objects, where, told how, and what a scene must be to count.

A pair of scenes is alike but for one object, or for two objects that change places; the
descriptions of a pair are equal up to beyond their 77th token, and tell them apart after it.
"""

import dataclasses

import numpy as np
from PIL import Image

from mmgem_jax.data import scene_canvas, scene_text
from mmgem_jax.errors import UserError

OBJECTS = (2, 6)
LARGEST_IOU, LEAST_VISIBLE = 0.15, 0.7
DESCRIPTION_TOKENS = (100, 300)
SHARED_TOKENS = 80  # at least, of the descriptions of a pair: with <s> and [EMB] beyond 77
ATTEMPTS = 500


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A drawing of the emoji data set, its margins cut off."""

    concept: str
    name: str
    subgroup: str
    image: Image.Image


@dataclasses.dataclass(frozen=True)
class Scene:
    """A scene, its texts, and how many characters the first part of its description has."""

    image: Image.Image
    drawings: list[Drawing]
    things: list[scene_text.Thing]
    sentence: str
    description: str
    first_part: int


class SceneMaker:
    """Makes scenes of drawings; all that is random comes from the generator of a call."""

    def __init__(self, drawings: dict[str, list[Drawing]], tokenizer):
        self._drawings = list(drawings.values())
        backend = tokenizer.backend_tokenizer
        self._count = lambda text: len(backend.encode(text, add_special_tokens=False).ids)

    def scene(self, rng) -> Scene:
        """A scene of OBJECTS many concepts."""
        # Not drawn again at each attempt, of which those with many objects fail more often.
        count = int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))

        def attempt():
            slots = scene_canvas.place_slots(_sides(count, rng), rng)
            late = rng.permutation(count)[: rng.integers(1, 2 if count < 4 else 3)]
            return self._alike([self._draw(count, rng)], slots, late, rng)

        return _first(attempt)[0]

    def pair(self, rng) -> list[Scene]:
        """Two scenes alike but for one object, or for two that change places (as often)."""
        swap = rng.random() < 0.5
        count = int(rng.integers(5 if swap else 4, OBJECTS[1] + 1))

        def attempt():
            drawings, sides = self._draw(count + 1, rng), _sides(count, rng)
            late = rng.permutation(count)[: 2 if swap else 1]
            order = np.arange(count)
            if swap:
                sides[late[1]] = sides[late[0]]  # no other detail is to change with the places
                order[late] = order[late[::-1]]
            else:
                order[late] = count
            casts = [drawings[:count], [drawings[index] for index in order]]
            scenes = self._alike(casts, scene_canvas.place_slots(sides, rng), late, rng)
            return scenes if scenes and self._is_pair(*scenes, late) else None

        return _first(attempt)

    def _is_pair(self, a, b, late) -> bool:
        """Do the descriptions begin alike for long enough, and tell the scenes apart after that?"""
        shared = a.description[: a.first_part]
        places = [scene_text.place(a.things[index]) for index in late]
        return (
            shared == b.description[: b.first_part]
            and self._count(shared) >= SHARED_TOKENS
            and len(set(places)) == len(places)
        )

    def _draw(self, count, rng):
        """Drawings of different concepts, every concept as likely, by any of its vendors."""
        concepts = rng.choice(len(self._drawings), count, replace=False)
        return [
            self._drawings[index][rng.integers(len(self._drawings[index]))] for index in concepts
        ]

    def _alike(self, casts, slots, late, rng) -> list[Scene] | None:
        """A scene of each list of drawings, alike in all else; None where one is not as it must be.

        The same words are chosen for each: the descriptions differ only from where they speak of
        `late`, if all else has the same boxes.
        """
        if slots is None:
            return None
        canvas, words = scene_canvas.draw_canvas(rng), rng.integers(2**32)
        scenes = []
        for cast in casts:
            image, boxes, visible = scene_canvas.compose(canvas, [d.image for d in cast], slots)
            things = [
                scene_text.Thing(drawing.name, tuple(box))
                for drawing, box in zip(cast, boxes.tolist(), strict=True)
            ]
            own = np.random.default_rng(words)
            sentence = scene_text.sentence(things, own)
            text, first_part = scene_text.description(things, canvas, late, own, self._count)
            low, high = DESCRIPTION_TOKENS
            is_legible = (
                min(visible) >= LEAST_VISIBLE and scene_canvas.largest_iou(boxes) <= LARGEST_IOU
            )
            if not is_legible or not low <= self._count(text) <= high:
                return None
            scenes.append(Scene(image, cast, things, sentence, text, first_part))
        return scenes


def _sides(count, rng):
    low, high = scene_canvas.SIZES
    return rng.integers(low, high + 1, count)


def _first(attempt):
    """The first of some attempts that succeeds."""
    for _ in range(ATTEMPTS):
        if (made := attempt()) is not None:
            return made
    raise UserError(
        f"drawings: none of {ATTEMPTS} attempts at a scene is legible with a description of "
        f"{DESCRIPTION_TOKENS[0]} to {DESCRIPTION_TOKENS[1]} tokens; expected drawings and a "
        "tokenizer of the emoji data set"
    )
