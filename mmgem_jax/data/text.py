"""Records to texts: templates such as "{subgroup}: {name}" filled from a record's fields."""

import re
import zlib
from collections.abc import Mapping

import numpy as np

from mmgem_jax.data.broken import Broken
from mmgem_jax.errors import UserError

MOST_NAMED = 20  # fields in an error
MOST_WORDS = 3  # of a list field, such as keywords, in one text
RULES = ("one", "first", "longest")  # which text of a list is meant; none: a few of them
PLACE = re.compile(r"{([\w.]+)(\|[^{}]*|)}")  # {field}, {field.inner} or {field|rule}


def check_templates(field, templates, known=None):
    """Raises UserError where a template cannot be filled.

    Args:
      field: what to call the templates in an error.
      templates: texts with places such as {name}, {captions.text} or {caption|one}.
      known: names of the fields of the data set, of which the first name of every place must be
        one; None: not known before its records are read.
    """
    for template in templates:
        places = PLACE.findall(template)
        if not places:
            there_are = (
                "expected one" if known is None else f"there are {sorted(known)[:MOST_NAMED]}"
            )
            raise UserError(f"{field}: {template!r}: no {{field}} in the template; {there_are}")
        for path, rule in places:
            first, *inner = path.split(".")
            if not all([first, *inner]):
                raise UserError(f"{field}: {template!r}: {path!r}; expected names between the dots")
            if known is not None and first not in known:
                raise UserError(
                    f"{field}: {template!r}: has no field {first!r}; there are "
                    f"{sorted(known)[:MOST_NAMED]}"
                )
            if rule and rule[1:] not in RULES:
                raise UserError(
                    f"{field}: {template!r}: no rule {rule[1:]!r}; there are {list(RULES)}"
                )


def fill(template, record, rng):
    """The template with the record's texts; a list without a rule gives up to three, shuffled.

    Args:
      template: as in `check_templates`. A rule leaves a text that is not in a list as it is.
      record: dict of bytes, str, numbers, lists of them, or dicts of such.
      rng: numpy Generator; the same state gives the same text.

    Raises:
      Broken: a field that is not there ("no_caption"), a text as in `as_text`, or white space alone
        in all places of the template ("no_caption").
    """
    found = []

    def value(match):
        found.append(value_at(match))
        return found[-1]

    def value_at(match):
        path, rule = match.groups()
        field = field_at(record, path)
        if isinstance(field, np.ndarray):
            field = field[()]  # of an array of no dimension, its value
        if not isinstance(field, (list, tuple, np.ndarray)):
            return as_text(field)
        return ", ".join(chosen(field, rule[1:], rng))

    text = PLACE.sub(value, template)
    if found and not any(words.strip() for words in found):
        raise Broken("no_caption", f"nothing to fill {template!r} with")
    return text


def field_at(record, path):
    """The field of a record, or "a.b": field b of its field a; Broken where it is not there."""
    found = record
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            raise Broken("no_caption", f"no field {path!r}")
        found = found[name]
    return found


def chosen(values, rule, rng):
    """The texts of a list that a rule means, as a list; of an empty list none.

    What is no text, or a blank one, is passed over; Broken where there is nothing else.
    """
    texts, broken = [], None
    for value in values:
        try:
            texts.append(as_text(value))
        except Broken as error:
            broken = error
    texts = [text for text in texts if text.strip()]
    if not texts and broken:
        raise broken
    if not rule:
        count = min(len(texts), int(rng.integers(1, MOST_WORDS + 1)))
        return [texts[i] for i in rng.permutation(len(texts))[:count]]
    if not texts:
        return []
    if rule == "longest":
        return [max(texts, key=len)]
    return [texts[int(rng.integers(len(texts))) if rule == "one" else 0]]


def as_text(value):
    """A text or a number of a record as str; TFDS has texts as bytes.

    Raises:
      Broken: bytes that are not UTF-8, or half a surrogate pair, as JSON can have it ("encoding");
        anything that is neither a text nor a number ("no_caption").
    """
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if isinstance(value, str):
            value.encode("utf-8")  # of half a pair no tokenizer and no checksum can be had
            return str(value)
    except UnicodeError as error:
        raise Broken("encoding", str(error)) from None
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if is_number and value == value:  # in tables, NaN is a text that is not there
        return str(value)
    raise Broken("no_caption", f"{type(value).__name__} where a text should be")


def text_id(text):
    """A 32-bit id of a text, the same for the same words on every host."""
    words = " ".join(text.lower().split())
    return np.uint32(zlib.crc32(words.encode("utf-8"))).astype(np.int32)
