import json

import pytest

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.prompts import (
    DEFAULT_TEMPLATES,
    check_templates,
    fill,
    load_class_names,
    load_templates,
)


@pytest.fixture
def files(tmp_path):
    """Class names and templates of two data sets, as CLIP_benchmark has them."""
    names = {"imagenet1k": ["tench", "missile", "missile"], "vtab/dtd": ["banded"]}
    templates = {"imagenet1k": ["a {c}.", 'the number: "{c}".'], "vtab/dtd": ["{c} texture"]}
    paths = tmp_path / "en_classnames.json", tmp_path / "en_templates.json"
    for path, content in zip(paths, (names, templates), strict=True):
        path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return paths


def test_names_and_templates_are_those_of_the_data_set_in_their_order(files):
    assert load_class_names(files[0], "imagenet1k") == ["tench", "missile", "missile"]
    assert load_class_names(str(files[0]), "vtab/dtd") == ["banded"]
    assert load_templates(files[1], "imagenet1k") == ["a {c}.", 'the number: "{c}".']


def test_a_class_goes_where_the_template_says():
    templates = ["a {c}.", "{c} beside {c}", "{d} {} {c}"]
    assert fill(templates, "mug {x}") == ["a mug {x}.", "mug {x} beside mug {x}", "{d} {} mug {x}"]


def test_our_own_templates_are_templates():
    check_templates("ours", DEFAULT_TEMPLATES)
    assert len(set(DEFAULT_TEMPLATES)) == len(DEFAULT_TEMPLATES)
    assert len(set(fill(DEFAULT_TEMPLATES, "mug"))) == len(DEFAULT_TEMPLATES)


MISTAKES = [
    ("[", r"names\.json: .*; expected JSON"),
    ("[1]", r"names\.json: found list, expected .* of 'pets'"),
    ('{"cars": ["{c}"]}', r"names\.json: found \['cars'\], expected .* of 'pets'"),
    ('{"pets": "{c}"}', r"names\.json: pets: found '{c}', expected a list of"),
    ('{"pets": []}', r"names\.json: pets: found \[\], expected a list of"),
    ('{"pets": {"cat": ["{c}"]}}', r"names\.json: pets: found {'cat': .*, expected a list of"),
    ('{"pets": ["{c}", 3]}', r"names\.json: pets: found 3, expected a text"),
    ('{"pets": ["{c}", " "]}', r"names\.json: pets: found ' ', expected a text"),
]


@pytest.mark.parametrize("load", [load_class_names, load_templates])
@pytest.mark.parametrize(("content", "message"), MISTAKES)
def test_a_file_in_another_format_is_named(tmp_path, load, content, message):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "names.json", "pets")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: No such file or directory; expected"):
        load_templates(tmp_path / "none.json", "pets")


def test_a_template_without_a_place_is_a_mistake(files):
    files[1].write_text('{"pets": ["a {c}", "a {}"]}')
    with pytest.raises(UserError, match=r"pets: found the template 'a {}', expected {c} in it"):
        load_templates(files[1], "pets")
    with pytest.raises(UserError, match="here: found no template, expected one or more"):
        check_templates("here", [])
