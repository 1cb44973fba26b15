"""The sources of a config's data: where their records are, how they are opened, what is checked.

A source is a sequence of records, in any order:
  len(source)           how many there are
  source[i]             a dict of fields: the image as the bytes of its file, texts, lists
  source.fields         names of the fields, as far as they are known
  source.name_of(i)     what to call a record in an error
  source.paths, .counts its files, and how many records each of them has
  source.order(seed)    an endless grain MapDataset of record numbers, every epoch all of them
"""

import hashlib
import json
import math

from mmgem_jax.data import files, text
from mmgem_jax.data.example_records import ExampleRecords
from mmgem_jax.data.json_lines import JsonLines
from mmgem_jax.data.tar_shards import TarShards
from mmgem_jax.data.tfds_records import TfdsRecords
from mmgem_jax.errors import UserError, first_line

# Fields that a source of a mixture cannot have for itself.
OF_ALL_SOURCES = {"tokenizer", "workers", "prefetch", "ahead", "read_threads", "mixture"}
OF_ALL_SOURCES |= {"index_dir"}


MOST_NAMED = 20  # fields in an error: of tars that are not named as expected there are thousands


def sources(data):
    """The sources of `config.data` by name: those of its mixture, or itself alone under "".

    Raises:
      UserError: a field that there is not, or of another type, or a weight that is not above 0.
    """
    if not data.mixture:
        return {"": data}
    found = {}
    for name, changes in data.mixture.items():
        if shared := sorted(OF_ALL_SOURCES & set(changes)):
            raise UserError(
                f"data.mixture.{name}.{shared[0]}: is for all sources; expected data.{shared[0]}"
            )
        found[name] = data.copy_and_resolve_references()
        try:
            found[name].update(changes)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"data.mixture.{name}: {first_line(error)}") from None
        if not 0 < found[name].weight < math.inf:
            raise UserError(
                f"data.mixture.{name}.weight: {found[name].weight:g}; expected a number above 0"
            )
    return found


def where_is(name):
    """What to call a source in an error."""
    return f"data.mixture.{name}" if name else "data"


def regions_an_image(data):
    """R: rows of every image of a source, padding included."""
    return int(data.whole_image) + (data.max_regions if data.regions_field else 0)


def open_source(name, data):
    """A source, after its fields, templates and weights have been checked.

    Args:
      name: of the source.
      data: its config, of `sources`.

    Raises:
      UserError: data, a split, a field or a template that is not there; weights that do not fit.
    """
    where = where_is(name)
    if not (data.whole_image or data.regions_field):
        raise UserError(
            f"{where}.whole_image: False, and {where}.regions_field empty; expected one of the two"
        )
    for field, least in {"text_length": 3, "caption_length": 3, "max_regions": 1}.items():
        if data[field] < least:
            raise UserError(f"{where}.{field}: {data[field]}; expected at least {least}")
    if not 0 < data.min_visible <= 1:
        raise UserError(f"{where}.min_visible: {data.min_visible:g}; expected above 0, at most 1")
    source = open_files(data, where) if data.files else TfdsRecords(data, where)
    if data.whole_image:
        check_texts(data, where, source.fields - {data.image_field, data.regions_field})
    return source


def open_files(data, where):
    """The source of `data.files`, by what the names of the files end with."""
    paths = files.expand(data.files, f"{where}.files")
    kinds = {kind_of(path) for path in paths}
    if len(kinds) > 1 or None in kinds:
        odd = next((path for path in paths if kind_of(path) is None), paths[-1])
        raise UserError(
            f"{where}.files: found {odd} among {len(paths)} files; expected .tar, .jsonl or "
            ".array_record, one kind of them"
        )
    kind = kinds.pop()
    if kind == "tar":
        source = TarShards(
            paths, data.index_dir, data.window, data.max_broken_share, data.max_bytes
        )
    elif kind == "jsonl":
        source = JsonLines(paths, data.image_field, data.index_dir, data.max_bytes)
    else:
        source = ExampleRecords(paths)
    for field in filter(None, ("image_field", "regions_field")):
        if data[field] and data[field] not in source.fields:
            known = sorted(source.fields)[:MOST_NAMED]
            raise UserError(f"{where}.{field}: no field {data[field]!r}; there are {known}")
    return source


def kind_of(path):
    """What a file holds, by its name; None where it does not say."""
    name = path.rpartition("/")[2]
    if ".array_record" in name:  # NAME.array_record-00000-of-00010
        return "array_record"
    return next((kind for kind in ("tar", "jsonl") if name.endswith(f".{kind}")), None)


def contents_of(source):
    """What tells a source from one with other files, wherever they lie: text.

    The names of its files and how many records each has, hashed.
    """
    files_of = [path.rpartition("/")[2] for path in map(str, source.paths)]
    what = json.dumps([files_of, [int(count) for count in source.counts]])
    return f"{len(source)} records, {hashlib.sha256(what.encode()).hexdigest()[:16]}"


def check_texts(data, where, known):
    """Raises UserError for templates and weights of a source that do not fit its fields."""
    text.check_templates(f"{where}.text_templates", data.text_templates, known)
    text.check_templates(f"{where}.caption_template", [data.caption_template], known)
    weights = data.text_weights
    if len(weights) != len(data.text_templates) or min(weights) < 0 or not sum(weights):
        raise UserError(
            f"{where}.text_weights: found {weights} for {len(data.text_templates)} templates; "
            "expected a weight for each, none below 0 and one above"
        )
