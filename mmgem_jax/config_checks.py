"""A config's mistakes, each in one line that names a field, before anything is read or compiled."""

import math
import re
import reprlib

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from mmgem_jax.config_fields import FIELDS, RULES
from mmgem_jax.data.images import Augmentation
from mmgem_jax.data.pipeline import packings
from mmgem_jax.data.sources import sources, where_is
from mmgem_jax.errors import UserError
from mmgem_jax.faults import check_faults

# Free names in a config, and what stands for them in the table: a source of a mixture has the
# fields of `data`.
FREE_NAMES = {
    r"^data\.mixture\.[^.]+": "data",
    r"^optimizer\.groups\.[^.]+": "optimizer.groups.*",
    r"^tpu_options\.[^.]+": "tpu_options.*",
}
SECTIONS = {*FIELDS, "optimizer.groups", "data.mixture"}
FILLED_IN = "optimizer.total_steps"  # by `run.complete`


def check_fields(config):
    """Raises UserError where a field is missing, unknown, or has a value that the table forbids."""
    found = dict(leaves(config))
    found.pop(FILLED_IN, None)
    for name, value in found.items():
        place = in_table(name)
        if place in RULES:
            good, expected = RULES[place].holds(value), RULES[place].expected
        elif place in SECTIONS:
            good, expected = isinstance(value, ConfigDict), "a section"
        else:
            good, expected = False, "a field that configs/base.py has"
        if not good:
            raise UserError(f"{name}: {shown(value)}; expected {expected}")
    wanted = [name for name in RULES if "*" not in name]
    for group in config.optimizer.get("groups", {}) if "optimizer" in config else ():
        wanted += [f"optimizer.groups.{group}.{field}" for field in FIELDS["optimizer.groups.*"]]
    for name in wanted:
        if name not in found:
            raise UserError(f"{name}: missing; expected {RULES[in_table(name)].expected}")


def leaves(config, prefix=""):
    """Dotted name and value of the fields of a ConfigDict, and of its sections; empty ones too."""
    for name in config:
        try:
            value = config[name]
        except RequiredValueError:  # a placeholder in a config file that nothing has filled in
            value = None
        if isinstance(value, ConfigDict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def in_table(name):
    """What stands in the table for a field."""
    for pattern, replacement in FREE_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def shown(value):
    """A value in an error: one line, not too long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    try:
        return " ".join(short.repr(value).split())
    except ValueError:  # Python does not write them out
        return "a number of thousands of digits"


def check_together(config):
    """Raises UserError where fields do not fit together, each of which the table allows."""
    loss, head_dim = config.loss, config.model.decoder.head_dim
    if not (config.eval.caption_field or config.data.regions_field):
        raise UserError("eval.caption_field: empty; expected a text field of the data set")
    if not (loss.embedding_weight or loss.generation_weight):
        raise UserError(
            "loss: both weights are 0; expected loss.embedding_weight or loss.generation_weight "
            "above"
        )
    if head_dim % 2:
        raise UserError(
            f"model.decoder.head_dim: {head_dim}; expected an even number, for rotary positions"
        )
    packed = any(packings(config).values())  # raises where sizes do not fit
    if packed and not (loss.embedding_weight and loss.generation_weight):
        raise UserError(
            f"data.packing.images: {config.data.packing.images}, with loss.embedding_weight "
            f"{loss.embedding_weight:g} and loss.generation_weight {loss.generation_weight:g}: "
            "texts would be decoded for nothing; expected both above 0, or no packing"
        )
    found = sources(config.data)
    if config.compiled_step and len(found) > 1:
        raise UserError("compiled_step: given with a mixture; expected one source, of one shape")
    check_faults(config.faults, len(found))
    check_best(config)
    for name, data in found.items():
        check_source(where_is(name), data)


def check_source(where, data):
    """Raises UserError where the fields of a source do not fit together."""
    if not (data.whole_image or data.regions_field):
        raise UserError(
            f"{where}.whole_image: False, and {where}.regions_field empty; expected one of the two"
        )
    try:
        Augmentation(**data.augment)
    except UserError as error:  # it calls every source `data`
        raise UserError(where + str(error).removeprefix("data")) from None


def check_best(config):
    """Raises UserError where `checkpoint.best` is no metric that training will measure."""
    best, splits = config.checkpoint.best, config.eval.splits
    if not best:
        return
    evaluated, saved = config.eval.every, config.checkpoint.every
    if not 0 < math.lcm(evaluated, saved) < config.steps:  # the last step has no scores
        raise UserError(
            f"checkpoint.best: {best!r}, with eval.every {evaluated} and checkpoint.every {saved}: "
            f"no step before the last of {config.steps} is evaluated and saved; expected one"
        )
    metric = best.removeprefix("-")
    measured = [f"eval/{split}/" for split in splits]
    if not any(metric.startswith(start) and metric != start for start in measured):
        raise UserError(
            f"checkpoint.best: {best!r}; expected a metric of a split of eval.splits {splits}, "
            "such as eval/validation/retrieval/image_to_text_r1"
        )
