import numpy as np
import pytest

from mmgem_jax.data import text
from mmgem_jax.errors import UserError

KEYWORDS = [b"croak", b"pond", b"green", b"leap", b"amphibian"]
RECORD = {
    "name": b"frog",
    "subgroup": b"animal amphibian",
    "keywords": np.asarray(KEYWORDS, object),
    "none": np.asarray([], object),
    "accent": "piñata".encode(),
    "plain": "already text",
    "count": 7,
}


def fill(template, seed=0):
    return text.fill(template, RECORD, np.random.default_rng(seed))


def test_a_template_is_filled_from_the_record():
    assert fill("{name}") == "frog"
    assert fill("{subgroup}: {name}, {name}!") == "animal amphibian: frog, frog!"
    assert fill("{accent} {plain} {count} {none}.") == "piñata already text 7 ."
    assert fill("no field, {} and {two words}") == "no field, {} and {two words}"


def test_a_list_gives_some_of_its_words_each_at_most_once():
    known = {word.decode() for word in KEYWORDS}
    lengths, firsts, drawn = set(), set(), set()
    for seed in range(200):
        words = fill("{keywords}", seed).split(", ")
        assert set(words) <= known
        assert len(set(words)) == len(words)
        lengths.add(len(words))
        firsts.add(words[0])
        drawn.add(tuple(words))
    assert lengths == set(range(1, text.MOST_WORDS + 1))
    assert firsts == known
    assert len(drawn) > 50  # in any order
    assert fill("{keywords}", 5) == fill("{keywords}", 5)


def test_a_list_shorter_than_that_gives_what_it_has():
    record = {"keywords": [b"one", b"two"]}
    drawn = {text.fill("{keywords}", record, np.random.default_rng(s)) for s in range(40)}
    assert drawn == {"one", "two", "one, two", "two, one"}


def test_a_field_that_is_not_there_is_named():
    known = {"name", "keywords"}
    text.check_templates("data.text_templates", ["{name}: {keywords}"], known)
    with pytest.raises(UserError) as error:
        text.check_templates("data.text_templates", ["{name}", "{name} {caption}"], known)
    assert str(error.value) == (
        "data.text_templates: '{name} {caption}': has no field 'caption'; "
        "there are ['keywords', 'name']"
    )
    with pytest.raises(UserError, match=r"data\.caption_template: 'name': no \{field\}"):
        text.check_templates("data.caption_template", ["name"], known)


def test_text_ids_are_the_same_on_every_host_and_in_every_version():
    # The check value of CRC-32's definition, and `printf frog | gzip | tail -c8 | xxd`.
    assert text.text_id("123456789") == 0xCBF43926 - 2**32
    assert text.text_id("frog") == 0x59CF486E
    assert text.text_id("frog").dtype == np.int32


def test_text_ids_do_not_see_case_or_white_space():
    same = ["green frog", "Green Frog", " green\tfrog\n", "GREEN   frog"]
    assert len({int(text.text_id(words)) for words in same}) == 1
    other = ["green frogs", "frog green", "greenfrog", "green, frog", ""]
    assert len({int(text.text_id(words)) for words in [same[0], *other]}) == 6
