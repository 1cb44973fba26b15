"""Records to texts: templates such as "{subgroup}: {name}" filled from a record's fields."""

import re
import zlib

import numpy as np

from mmgem_jax.errors import UserError

MOST_WORDS = 3  # of a list field, such as keywords, in one text


def template_fields(template):
    """Names of the fields that a template uses."""
    return re.findall(r"{(\w+)}", template)


def check_templates(field, templates, known):
    """Raises UserError where a template uses a field that the data set does not have."""
    for template in templates:
        missing = [name for name in template_fields(template) if name not in known]
        if missing or not template_fields(template):
            found = f"has no field {missing[0]!r}" if missing else "no {field} in the template"
            raise UserError(f"{field}: {template!r}: {found}; there are {sorted(known)}")


def fill(template, record, rng):
    """The template with the record's texts; a list gives up to three of its texts, shuffled."""

    def value(match):
        field = record[match[1]]
        if not isinstance(field, (list, tuple, np.ndarray)):
            return as_text(field)
        count = min(len(field), int(rng.integers(1, MOST_WORDS + 1)))
        chosen = rng.permutation(len(field))[:count]
        return ", ".join(as_text(field[i]) for i in chosen)

    return re.sub(r"{(\w+)}", value, template)


def as_text(value):
    """A text field of a TFDS record, which is bytes, as str."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def text_id(text):
    """A 32-bit id of a text, the same for the same words on every host."""
    words = " ".join(text.lower().split())
    return np.uint32(zlib.crc32(words.encode("utf-8"))).astype(np.int32)
