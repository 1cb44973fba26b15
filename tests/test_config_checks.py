"""Wrong configs: whatever is wrong in one, it is one line that names the field, and early."""

import importlib
import math
import re
import sys
from pathlib import Path

import base
import jax
import pytest
import tiny
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import config_dict, config_flags

from mmgem_jax import command_line, config_checks, config_fields, run, sharding, train_state
from mmgem_jax.errors import UserError
from mmgem_jax.optimizer import make_optimizer
from mmgem_jax.preflight.program import stand_in_tokenizer

TOKENIZER = stand_in_tokenizer(128)
CONFIGS = sorted(path.stem for path in Path(base.__file__).parent.glob("*.py"))


def put(config, name, value):
    """Sets a field as a config file can: of any type, there before or not."""
    *sections, field = name.split(".")
    target = config
    for section in sections:
        target = target[section]
    with target.unlocked(), target.ignore_type():
        if field in target:
            del target[field]
        target[field] = value


def changed(changes):
    """The tiny config with these values for fields by dotted name."""
    config = tiny.config()
    for name, value in changes.items():
        put(config, name, value)
    return config


def prepared(config):
    """What a run makes of a config before it reads data: mesh, model, optimizer and shapes."""
    config = run.complete(config, TOKENIZER)
    mesh = sharding.make_mesh(config.mesh)
    run.check_mesh(config, mesh)
    model, optimizer = run.build_model(config.model), make_optimizer(config.optimizer)
    return model, optimizer, run.batch_shapes(config), mesh


def problem(changes):
    """The one line that the changes lead to; None where they are allowed."""
    try:
        prepared(changed(changes))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return str(error)
    return None


# ---- the table -----------------------------------------------------------------------------------


def test_every_field_of_the_defaults_is_in_the_table_and_the_other_way_round():
    names = {config_checks.in_table(name) for name, _ in config_checks.leaves(base.get_config())}
    empty = {"data.mixture", "tpu_options"}
    assert names - empty | {"tpu_options.*"} == set(config_fields.RULES)


def test_no_field_may_be_what_none_is_meant_to_be():
    never = (None, math.nan, math.inf, -5, 10**5000, -0.5, object(), b"a", (None,))
    for name in config_fields.RULES.keys() - {"tpu_options.*"}:
        for value in never:
            assert not config_fields.RULES[name].holds(value), name


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_passes(name):
    config = importlib.import_module(name).get_config()
    config.model.decoder.vocab_size = 0
    config.compile_cache = ""
    completed = run.complete(config, TOKENIZER)
    assert completed.optimizer.total_steps == config.steps
    assert completed.model.decoder.vocab_size == 128


# ---- one by one ----------------------------------------------------------------------------------

SOURCE = {"text_length": 5}
BEST = {"eval.splits": ("validation",), "checkpoint.best": "eval/validation/loss"}
BEST |= {"eval.every": 15, "checkpoint.every": 10}
NEVER = "checkpoint.best: 'eval/validation/loss', with eval.every"
PACKED = {"images": 1, "rows": 8, "row_length": 16, "targets": 16}
PACKED = {f"data.packing.{name}": value for name, value in PACKED.items()}
WHOLE = "expected a whole number from"

MISTAKES = [
    ({"steps": None}, f"steps: None; {WHOLE} 1 to 2147483647"),
    ({"model.decoder.depth": True}, f"model.decoder.depth: True; {WHOLE} 1 to 1048576"),
    ({"average_decay": math.nan}, "average_decay: nan; expected a number from 0 below 1"),
    ({"model.vision": None}, "model.vision: None; expected a section"),
    ({"data.mixture": None}, "data.mixture: None; expected a section"),
    ({"steps": 3.0}, f"steps: 3.0; {WHOLE} 1"),
    ({"model.vision": {}}, "model.vision.image_size: missing; expected a whole number"),
    ({"optimizer.groups.vision": {}}, "optimizer.groups.vision.pattern: missing; expected a reg"),
    ({"loss.wieght": 1.0}, "loss.wieght: 1.0; expected a field that configs/base.py has"),
    # ranges
    ({"steps": -1}, f"steps: -1; {WHOLE} 1"),
    ({"batch_size": 10**5000}, f"batch_size: a number of thousands of digits; {WHOLE} 1"),
    ({"mesh.fsdp": 0}, "mesh.fsdp: 0; expected -1, or a whole number above 0"),
    ({"mesh.fsdp": -1}, "mesh: slice=1, data=-1, fsdp=-1, tensor=1; expected -1, the rest of the"),
    ({"data.max_broken_share": 0.0}, "data.max_broken_share: 0.0; expected a number above 0 to 1"),
    ({"data.augment.shift": math.inf}, "data.augment.shift: inf; expected a number from 0 to 1000"),
    ({"data.max_aspect": 1001.0}, "data.max_aspect: 1001.0; expected a number from 1 to 1000"),
    ({"data.max_bytes": 0}, f"data.max_bytes: 0; {WHOLE} 1"),
    ({"data.read_threads": -1}, f"data.read_threads: -1; {WHOLE} 0"),
    ({"faults.window": 1}, f"faults.window: 1; {WHOLE} 2"),
    ({"data.split": ""}, "data.split: ''; expected text of one line, not empty"),
    (
        {"model.vision.dtype": "float16"},
        "model.vision.dtype: 'float16'; expected one of float32, b",
    ),
    # sequences
    ({"model.image_mean": (0.5, 0.5)}, "model.image_mean: (0.5, 0.5); expected a tuple: 3 times a"),
    ({"model.image_std": (0.5, 0.5, 0)}, "model.image_std: (0.5, 0.5, 0); expected a tuple: 3 tim"),
    ({"data.files": "a.tar"}, "data.files: 'a.tar'; expected a tuple: any number times text of"),
    ({"data.files": ("a.tar", 3)}, "data.files: ('a.tar', 3); expected a tuple"),
    # groups of the optimizer, and sources of a mixture
    ({"optimizer.groups.vision.learning_rate": -1.0}, "optimizer.groups.vision.learning_rate: -1"),
    (
        {"optimizer.groups.vision.pattern": "("},
        "optimizer.groups.vision.pattern: '('; expected a r",
    ),
    ({"optimizer.groups.vision.algorithm": "sgd"}, "optimizer.groups.vision.algorithm: 'sgd'; exp"),
    ({"optimizer.groups": {"a": 3}}, "optimizer.groups.a: 3; expected a section"),
    ({"data.mixture": {"a": 3}}, "data.mixture.a: 3; expected a section"),
    ({"data.mixture": {"a": {"text_length": 2}}}, f"data.mixture.a.text_length: 2; {WHOLE} 3"),
    ({"data.mixture": {"a": {"size": 2}}}, "data.mixture.a.size: 2; expected a field that"),
    ({"data.mixture": {"a": {"weight": math.inf}}}, "data.mixture.a.weight: inf; expected a num"),
    (
        {"data.mixture": {"a": {"augment": {"min_scale": 2.0}}}},
        "data.mixture.a.augment: min_scale 2 and max_scale 1; expected",
    ),
    # fields that do not fit together
    (
        {"data.mixture": {"a": {"whole_image": False}}},
        "data.mixture.a.whole_image: False, and data.mixture.a.regions_field empty; expected one",
    ),
    ({"model.decoder.head_dim": 7}, "model.decoder.head_dim: 7; expected an even number"),
    (
        {"model.vision.attention": "rows", "model.vision.heads": 64},
        "model.vision.width 32 is not a multiple of vision.heads 64",
    ),
    (
        PACKED | {"loss.generation_weight": 0.0},
        "data.packing.images: 1, with loss.embedding_weight",
    ),
    (BEST | {"eval.every": 0}, f"{NEVER} 0 and checkpoint.every 10: no step before the last of"),
    (BEST | {"checkpoint.every": 0}, f"{NEVER} 15 and checkpoint.every 0: no step before the last"),
    (BEST | {"checkpoint.every": 20, "steps": 60}, f"{NEVER} 15 and checkpoint.every 20: no step"),
    (BEST | {"eval.splits": ("test",)}, "checkpoint.best: 'eval/validation/loss'; expected a metr"),
    (BEST | {"checkpoint.best": "eval/validation/"}, "checkpoint.best: 'eval/validation/'; expec"),
    (
        {"data.mixture": {f"s{n}": SOURCE for n in range(17)}, "faults.spike": 4.0},
        "faults.spike: 4 with 17 sources in data.mixture; expected at most 16, or 0",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_names_its_field_first(changes, message):
    assert str(problem(changes)).startswith(message)


@pytest.mark.parametrize(
    "changes",
    [
        BEST,
        BEST | {"checkpoint.every": 20, "steps": 61},
        BEST | {"checkpoint.best": "-eval/validation/loss"},
        PACKED,
        {"optimizer.groups.vision.learning_rate": 1},  # a config file may leave out the point
        {"data.files": ["a.tar", "gs://b/{00..99}.tar"]},
        {"data.mixture": {f"s{n}": SOURCE for n in range(16)}, "faults.spike": 4.0},
        {"data.mixture": {f"s{n}": {} for n in range(17)}},
        {"log.every": 0, "eval.every": 0, "checkpoint.every": 0, "checkpoint.keep": 0},
        {"tpu_options.xla_a": 3, "tpu_options.xla_b": True, "tpu_options.xla_c": "d"},
    ],
)
def test_what_is_no_mistake_passes(changes):
    assert problem(changes) is None


def test_a_placeholder_that_nothing_has_filled_in_is_a_mistake():
    config = tiny.config()
    config.data.name = config_dict.required_placeholder(str)
    with pytest.raises(UserError, match=r"^data\.name: None; expected text of one line$"):
        prepared(config)


# ---- any value for any field ---------------------------------------------------------------------

NAMES = [name for name in config_fields.RULES if "*" not in name]
NAMES += [name for name, _ in config_checks.leaves(tiny.config()) if ".groups." in name]
WORDS = ("", "train", "adamw", "muon", "frozen", "rows", "splash", "(", "a{99999999999}", "two\nl")
SCALARS = st.one_of(
    st.sampled_from([-2, -1, 0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 64, 2**20, 2**31, 10**12, 10**5000]),
    st.floats(),
    st.sampled_from([0.0, 0.5, 1.0, 1e-300, 1e300, math.nan]),
    st.sampled_from(WORDS),
    st.text(max_size=5),
    st.none(),
    st.booleans(),
)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=4).map(tuple)
    | st.dictionaries(st.sampled_from(("a", "width")), SCALARS, max_size=2)
)


def changes_of(names):
    """One or two fields of these names, with values of any kind."""
    return st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=2)


# Fields of which an error names another, which the value asks for.
ASKS_FOR = {"data.packing.images": "data.packing."}
ASKS_FOR |= {name: "mesh: " for name in NAMES if name.startswith("mesh.")}
ASKS_FOR |= {
    f"{data}.augment.{name}": f"{data}.augment: "
    for data in ("data", "data.mixture.a")
    for name in ("min_scale", "max_scale")
}


def names_one(message, changes):
    """Whether the message names one of the changed fields; `model.` may be left out."""
    for name in changes:
        word = re.escape(name.removeprefix("model."))
        if re.search(rf"(?<![\w.])(model\.)?{word}(?!\w)", message):
            return True
        if message.startswith(ASKS_FOR.get(name, "\n")):
            return True
    return False


@settings(max_examples=300)
@given(changes_of(NAMES))
def test_any_value_is_allowed_or_one_line_that_names_its_field(changes):
    message = problem(changes)
    assert message is None or names_one(message, changes), message


SOURCES = {"data.mixture": {"a": {"augment": {}, "packing": {}}, "b": {}}}


@settings(max_examples=100)
@given(changes_of([f"data.mixture.a.{name[5:]}" for name in NAMES if name.startswith("data.")]))
def test_and_so_it_is_for_a_source_of_a_mixture(changes):
    message = problem(SOURCES | changes)
    assert message is None or names_one(message, changes), message


# ---- what is allowed has a state -----------------------------------------------------------------


def test_the_largest_sizes_need_no_memory_to_be_checked():
    changes = {"model.vision.width": 2**20, "model.vision.mlp": 2**20, "batch_size": 2**31 - 8}
    changes |= {f"model.decoder.{name}": 2**20 for name in ("width", "head_dim", "depth")}
    changes |= {"model.generation_grid": 1024, "data.text_length": 2**20}
    model, _, shapes, mesh = prepared(changed(changes))
    boxed = train_state.boxed_params(model, shapes)
    assert jax.tree.leaves(sharding.param_shardings(boxed, mesh))


# ---- from the command line -----------------------------------------------------------------------

ARGUMENTS = [
    ("steps=many", "--config.steps=many"),
    ("steps=1.5", "--config.steps=1.5"),
    ("steps=", "--config.steps="),
    ("average_decay=x", "--config.average_decay=x"),
    ("data.whole_image=3", "--config.data.whole_image=3"),
    ("model=3", "--config.model"),
    ("mesh.fdsp=3", "--config.mesh.fdsp: no field 'fdsp'"),
]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' way
@pytest.mark.parametrize(("argument", "message"), ARGUMENTS)
def test_a_wrong_type_on_the_command_line_is_one_line(monkeypatch, capsys, argument, message):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(sys, "path", list(sys.path))
    argv = ["train", f"--config={base.__file__}", f"--config.{argument}"]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for fields
    with pytest.raises(SystemExit) as ended:
        command_line.parse_flags(argv)
    out, line = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert line.startswith("error: ") and line.count("\n") == 1 and message in line
