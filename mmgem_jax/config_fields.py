"""What every field of a config may be: one table of all of configs/base.py.

A config file is Python and may set anything: ml_collections lets None into every field, True into
whole numbers and nan into the others.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from mmgem_jax.models.decoder import DECODER_ATTENTIONS
from mmgem_jax.models.layers import ACTIVATIONS, REMAT_POLICIES
from mmgem_jax.models.rotary import ROPE_TYPES
from mmgem_jax.models.vision import VISION_ATTENTIONS
from mmgem_jax.sharding import MESH_AXES

# ---- rules ---------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What a value may be: in words, for an error, and as a function from a value to a bool."""

    expected: str
    holds: Callable


def whole(least, most=2**31 - 1):
    """A whole number; by default as far as int32 goes, in which steps and rows are counted."""
    return Rule(
        f"a whole number from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
    )


def real(least=0.0, most=3e38, above=False, below=False):
    """A number; by default as far as fp32 goes, in which everything is computed.

    Args:
      least, most: the ends of its range.
      above, below: whether these ends are not part of it.
    """

    def holds(value):
        if type(value) is bool or not isinstance(value, int | float):
            return False
        return (value > least if above else value >= least) and (
            value < most if below else value <= most
        )

    low, high = "above" if above else "from", "below" if below else "to"
    return Rule(f"a number {low} {least:g} {high} {most:g}", holds)


def text(empty=True):
    """A text of one line, for a name, a path or a pattern."""
    return Rule(
        "text of one line" if empty else "text of one line, not empty",
        lambda value: isinstance(value, str) and value.isprintable() and (empty or value != ""),
    )


def one_of(choices):
    """One of some words."""
    return Rule(
        f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices
    )


def each(rule, count=None):
    """A sequence of values of one rule."""
    number = "any number" if count is None else count
    return Rule(
        f"a tuple: {number} times {rule.expected}",
        lambda value: (
            isinstance(value, tuple | list)
            and count in (None, len(value))
            and all(map(rule.holds, value))
        ),
    )


def is_pattern(value):
    """Whether it is a regular expression."""
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, OverflowError, RecursionError):
        return False


ANY_TEXT, NAME, TEMPLATE = text(), text(empty=False), Rule("text", lambda v: isinstance(v, str))
SWITCH = Rule("True or False", lambda value: isinstance(value, bool))
MESH_AXIS = Rule("-1, or a whole number above 0", lambda v: whole(-1).holds(v) and v != 0)
SETTING = Rule("a word or a number", lambda value: isinstance(value, bool | int | float | str))
COUNT, POSITIVE, AMOUNT = whole(0), whole(1), real()
SIZE = whole(1, 2**20)  # of a model; above it is a slip
SHARE, PART, MOMENT = real(0, 1), real(0, 1, above=True), real(0, 1, below=True)
POSITIVE_AMOUNT = real(0, above=True)
DTYPE, REMAT = one_of(("float32", "bfloat16")), one_of(("none", *REMAT_POLICIES))

# ---- the table -----------------------------------------------------------------------------------

# Every field of configs/base.py; in the sections with a * names are free.
FIELDS = {
    "": dict(
        seed=COUNT,
        steps=POSITIVE,
        batch_size=POSITIVE,
        accumulation_steps=POSITIVE,
        init_from=ANY_TEXT,
        average_decay=MOMENT,
        compile_cache=ANY_TEXT,
        compiled_step=ANY_TEXT,
    ),
    "mesh": dict.fromkeys(MESH_AXES, MESH_AXIS),
    "tpu_options": {"*": SETTING},
    "model": dict(
        joint_dim=SIZE,
        embedding_grid=whole(1, 1024),
        generation_grid=whole(1, 1024),
        temperature=real(1e-6, 1e6),
        image_mean=each(real(-3e38), 3),
        image_std=each(real(1e-6), 3),
    ),
    "model.vision": dict(
        dict.fromkeys(("image_size", "patch_size", "width", "depth", "heads", "mlp"), SIZE),
        activation=one_of(tuple(ACTIVATIONS)),
        norm_epsilon=POSITIVE_AMOUNT,
        attention=one_of(tuple(VISION_ATTENTIONS)),
        dtype=DTYPE,
        remat=REMAT,
        unroll=SIZE,
    ),
    "model.decoder": dict(
        dict.fromkeys(("width", "depth", "heads", "kv_heads", "head_dim", "mlp"), SIZE),
        vocab_size=whole(0, 2**24),
        rope_theta=real(1),
        norm_epsilon=POSITIVE_AMOUNT,
        tie_embeddings=SWITCH,
        attention=one_of(tuple(DECODER_ATTENTIONS)),
        dtype=DTYPE,
        remat=REMAT,
        unroll=SIZE,
    ),
    "model.decoder.rope_scaling": dict(
        dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), real(1e-6, 1e6)),
        type=one_of(ROPE_TYPES),
        original_length=POSITIVE,
    ),
    "loss": dict(
        embedding_weight=AMOUNT,
        generation_weight=AMOUNT,
        mask_duplicates=SWITCH,
        mask_overlap=SHARE,
    ),
    "optimizer": dict(
        warmup_steps=COUNT,
        final_share=SHARE,
        clip_norm=AMOUNT,
        adam_b1=MOMENT,
        adam_b2=MOMENT,
        adam_epsilon=POSITIVE_AMOUNT,
        muon_beta=MOMENT,
    ),
    "optimizer.groups.*": dict(
        pattern=Rule("a regular expression", is_pattern),
        algorithm=NAME,
        learning_rate=AMOUNT,
        weight_decay=AMOUNT,
    ),
    "data": dict(
        name=ANY_TEXT,
        dir=NAME,
        split=NAME,
        files=each(NAME),
        window=POSITIVE,
        index_dir=NAME,
        max_broken_share=PART,
        max_pixels=POSITIVE,
        max_aspect=real(1, 1000),
        max_bytes=POSITIVE,
        tokenizer=ANY_TEXT,
        image_field=NAME,
        text_templates=each(TEMPLATE),
        text_weights=each(AMOUNT),
        caption_template=TEMPLATE,
        regions_field=ANY_TEXT,
        whole_image=SWITCH,
        max_regions=whole(1, 2**16),
        min_visible=PART,
        weight=POSITIVE_AMOUNT,
        text_length=whole(3, 2**20),  # begin, a token, end
        caption_length=whole(3, 2**20),
        workers=whole(0, 4096),
        prefetch=POSITIVE,
        read_threads=whole(0, 4096),
        ahead=COUNT,
    ),
    "data.packing": dict(
        dict.fromkeys(("images", "rows", "row_length", "targets", "text_rows"), COUNT),
        waiting=POSITIVE,
    ),
    "data.augment": dict(
        min_area=PART,
        max_ratio=real(1, 1000),
        flip=SHARE,
        draft=SWITCH,
        min_scale=real(1e-3, 1000),
        max_scale=real(1e-3, 1000),
        shift=real(0, 1000),
        stretch=real(0, 1000),
        rotate=real(0, 360),
        colour=SHARE,
        background=SHARE,
    ),
    "eval": dict(
        every=COUNT,
        splits=each(NAME),
        final_splits=each(NAME),
        sample_split=ANY_TEXT,
        batch_size=POSITIVE,
        caption_field=ANY_TEXT,
        class_field=ANY_TEXT,
        pixel_floor=SWITCH,
        samples=COUNT,
    ),
    "log": dict(
        every=COUNT,
        profile_from=POSITIVE,
        profile_steps=COUNT,
        peak_flops=AMOUNT,
        conflict_every=COUNT,
    ),
    "checkpoint": dict(every=COUNT, keep=COUNT, keep_every=COUNT, best=ANY_TEXT, keep_best=COUNT),
    "faults": dict(stop_after=POSITIVE, spike=AMOUNT, window=whole(2)),
}
RULES = {
    f"{section}.{field}".strip("."): rule
    for section, rules in FIELDS.items()
    for field, rule in rules.items()
}
