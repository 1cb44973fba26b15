import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgem_jax.data import text
from mmgem_jax.data import tokenizer as text_rows
from mmgem_jax.data.broken import Broken
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
    "captions": {"text": np.asarray([b"a frog", b"a green frog", b"it"], object), "id": [1, 2, 3]},
    "json": {"alt": "leaping", "page": {"title": "Frogs"}, "tags": []},
}


def fill(template, seed=0):
    return text.fill(template, RECORD, np.random.default_rng(seed))


def test_a_template_is_filled_from_the_record():
    assert fill("{name}") == "frog"
    assert fill("{subgroup}: {name}, {name}!") == "animal amphibian: frog, frog!"
    assert fill("{accent} {plain} {count} {none}.") == "piñata already text 7 ."
    assert fill("no field, {} and {two words}") == "no field, {} and {two words}"


def test_words_of_the_template_alone_are_no_caption():
    for template in ("a photo of {txt}", "{txt}, {none}", "{none|one}: {gone}"):
        with pytest.raises(Broken, match="no_caption"):
            text.fill(template, RECORD | {"txt": b" \n", "gone": []}, np.random.default_rng(0))


def test_what_is_no_text_in_a_list_is_passed_over():
    record = {"k": [b"\xff", None, "", "good"], "bad": [None, b"\xff"]}
    for rule in ("", "|one", "|first", "|longest"):
        assert text.fill(f"{{k{rule}}}", record, np.random.default_rng(0)) == "good"
        with pytest.raises(Broken, match="encoding"):
            text.fill(f"{{bad{rule}}}", record, np.random.default_rng(0))


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


def test_a_field_may_be_within_a_field():
    assert fill("{json.alt}: {json.page.title}") == "leaping: Frogs"
    assert fill("{captions.text|first} {captions.id|first}") == "a frog 1"


def test_a_rule_says_which_text_of_a_list_is_meant():
    assert fill("{captions.text|longest}") == "a green frog"
    assert fill("{captions.text|first}") == "a frog"
    assert fill("{name|one} {name|first} {name|longest}") == "frog frog frog"
    assert fill("{name}{json.tags|one}{json.tags|first}{json.tags|longest}") == "frog"
    drawn = [fill("{captions.text|one}", seed) for seed in range(300)]
    for caption in ("a frog", "a green frog", "it"):
        assert drawn.count(caption) == pytest.approx(100, abs=30)
    assert fill("{captions.text|one}", 5) == fill("{captions.text|one}", 5)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{captions.text|any}", r"no rule 'any'; there are \['one', 'first', 'longest'\]"),
        ("{name|}", "no rule ''"),
        ("{captions..text}", r"'captions\.\.text'; expected names between the dots"),
        ("{.name}", r"'\.name'; expected names between the dots"),
        ("a frog", r"no \{field\} in the template; expected one"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_before_the_records_are_known(template, found):
    with pytest.raises(UserError, match=f"^data.caption_template: '.*': {found}"):
        text.check_templates("data.caption_template", [template])


def test_of_a_field_within_a_field_the_outer_one_has_to_be_known():
    text.check_templates("data.text_templates", ["{captions.text|one}, {any.thing}"])
    with pytest.raises(UserError, match=r"no field 'captions'; there are \['name'\]"):
        text.check_templates("data.text_templates", ["{captions.text|one}"], {"name"})


NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (b"caf\xe9", "encoding"),  # Latin-1
        (json.loads('"\\ud83d"'), "encoding"),  # half of a pair
        ([b"\xff"], "encoding"),
        ("", "no_caption"),
        (b" \t\n", "no_caption"),
        ("\u3000\xa0", "no_caption"),  # white space of other scripts
        ([], "no_caption"),
        (None, "no_caption"),
        ([None], "no_caption"),
        ({"text": "a frog"}, "no_caption"),
        (True, "no_caption"),
        (NAN, "no_caption"),
        (np.float32(NAN), "no_caption"),
        (np.asarray([[1, 2]]), "no_caption"),
    ],
)
def test_a_record_without_a_text_has_a_cause(value, cause):
    with pytest.raises(Broken) as error:
        text.fill("{caption}", {"caption": value}, np.random.default_rng(0))
    assert error.value.cause == cause


@pytest.mark.parametrize("path", ["caption", "json.caption", "name.caption", "captions.text.x"])
def test_a_record_without_the_field_has_a_cause_too(path):
    with pytest.raises(Broken) as error:
        fill(f"a {{{path}}}")
    assert (error.value.cause, error.value.detail) == ("no_caption", f"no field {path!r}")


def test_numbers_and_arrays_of_no_dimension_are_texts():
    record = {"a": np.int64(3), "b": 0.5, "c": np.asarray("sea"), "d": np.str_("d"), "e": 0}
    filled = text.fill("{a} {b} {c} {d} {e}", record, np.random.default_rng(0))
    assert filled == "3 0.5 sea d 0"


# ---- any text ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe():
    return text_rows.train_bpe(["a green frog in a pond", "two frogs"], 300)


SPECIAL = st.sampled_from(["[EMB]", "[PAD]", "<s>", "</s>", "[emb]", " [EMB]", "</s", ">"])
ANY_TEXT = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=40)
CAPTIONS = st.lists(SPECIAL | ANY_TEXT, max_size=6).map("".join)


@settings(max_examples=300)
@given(CAPTIONS, st.integers(3, 40), st.booleans())
def test_any_text_is_two_rows_or_broken(bpe, caption, length, as_bytes):
    """Special tokens only where a row has its own, and as many tokens as asked for."""
    value = caption.encode("utf-8", "surrogatepass") if as_bytes else caption
    try:
        words = text.fill("{caption}", {"caption": value}, np.random.default_rng(0))
    except Broken as error:
        half_a_pair = any("\ud800" <= c <= "\udfff" for c in caption)
        assert error.cause == ("encoding" if half_a_pair else "no_caption")
        assert half_a_pair or not caption.strip()
        return
    assert words == caption
    assert text.text_id(words).dtype == np.int32
    pad, bos, eos, emb = bpe.convert_tokens_to_ids(["[PAD]", "<s>", "</s>", "[EMB]"])
    row, index, _ = text_rows.embedding_row(bpe, words, length)
    assert (row.shape, row[index]) == ((length,), emb)
    caption_row, _ = text_rows.caption_row(bpe, words, length)
    for tokens, end in ((row, emb), (caption_row, eos)):
        last = np.flatnonzero(tokens != pad)[-1]
        assert (tokens[0], tokens[last]) == (bos, end)
        assert not np.isin(tokens[1:last], [pad, bos, eos, emb]).any()


@settings(max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.binary(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2)
        ),
        max_leaves=5,
    ),
    st.sampled_from(["{a}", "{a|one}", "{a.b|longest}", "{a.a.b|first} {a}"]),
)
def test_any_value_is_a_text_or_broken(value, template):
    try:
        filled = text.fill(template, {"a": value}, np.random.default_rng(0))
    except Broken as error:
        assert error.cause in ("no_caption", "encoding")
    else:
        assert filled.strip() and filled.encode("utf-8")


# ---- ids -----------------------------------------------------------------------------------------


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
