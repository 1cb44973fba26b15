from collections import Counter

import jax
import numpy as np
import pytest
from plain_reader import read_split

from mmgem_jax import run
from mmgem_jax.data import text, tfds_records
from mmgem_jax.data.pipeline import training_batches
from mmgem_jax.errors import UserError

EXAMPLES = 136  # of the fixture's split `train`


@pytest.fixture(scope="module")
def tokenizer(emoji_config):
    return run.load_run_tokenizer(emoji_config())


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, other)


# ---- what a batch is -----------------------------------------------------------------------------


def test_a_batch_is_what_the_model_is_made_for(emoji_config, tokenizer):
    config = emoji_config()
    (batch,) = take(training_batches(config, tokenizer), 1)
    found = {name: (value.shape, value.dtype) for name, value in batch.items()}
    expected = {name: (s.shape, s.dtype) for name, s in run.batch_shapes(config).items()}
    assert found == expected
    assert (batch["boxes"] == [0, 0, 1, 1]).all()
    assert batch["region_mask"].all()


def test_rows_hold_the_words_of_their_record(emoji_config, tokenizer):
    config = emoji_config({"data.text_templates": ("{subgroup}: {name}",)})
    config.data.update(text_weights=(1.0,), text_length=24, caption_length=16)
    batches = take(training_batches(config, tokenizer), 9)
    known = {r["name"]: r["subgroup"] for r in read_split(config.data, "train", 8)[1]}
    emb = tokenizer.convert_tokens_to_ids("[EMB]")
    for batch in batches:
        for i in range(config.batch_size):
            caption, words = batch["caption_tokens"][i, 0], batch["text_tokens"][i, 0]
            name = tokenizer.decode(caption, skip_special_tokens=True)
            filled = f"{known[name]}: {name}"
            assert tokenizer.decode(words, skip_special_tokens=True) == filled.lower()
            length = batch["caption_length"][i, 0]
            assert caption[length - 1] == tokenizer.eos_token_id
            assert (caption[length:] == tokenizer.pad_token_id).all()
            assert words[batch["embed_index"][i, 0]] == emb
            assert batch["group_ids"][i, 0].tolist() == [text.text_id(name), text.text_id(filled)]
    assert not any(batch["truncated"].any() for batch in batches)


def test_pairs_of_one_name_share_an_id_and_no_others_do(emoji_config, tokenizer):
    batches = take(training_batches(emoji_config(), tokenizer), 9)
    ids = {}
    for batch in batches:
        for row, group in zip(batch["caption_tokens"], batch["group_ids"], strict=True):
            name = tokenizer.decode(row[0], skip_special_tokens=True)
            ids.setdefault(name, set()).add(int(group[0, 0]))
    assert len(ids) == 34
    assert all(len(found) == 1 for found in ids.values())
    assert len(set.union(*ids.values())) == 34


def test_templates_are_drawn_by_their_weights(emoji_config, tokenizer):
    templates = ("{name}", "{subgroup}", "{group}")
    config = emoji_config({"data.text_templates": templates, "batch_size": 100})
    config.data.update(text_weights=(3.0, 0.0, 1.0), text_length=24)
    groups = {r["group"].lower() for r in read_split(config.data, "train", 8)[1]}
    texts = [
        tokenizer.decode(row, skip_special_tokens=True)
        for batch in take(training_batches(config, tokenizer), 8)
        for row in batch["text_tokens"][:, 0]
    ]
    assert np.mean([words in groups for words in texts]) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("length", [3, 4])
def test_a_cut_text_keeps_its_end_and_is_counted(emoji_config, tokenizer, length):
    config = emoji_config({"data.text_length": length, "data.caption_length": length})
    config.data.update(text_templates=("{name}",), text_weights=(1.0,))
    cut, whole = 0, 0
    for batch in take(training_batches(config, tokenizer), 9):
        emb = tokenizer.convert_tokens_to_ids("[EMB]")
        words, captions = batch["text_tokens"][:, 0], batch["caption_tokens"][:, 0]
        index = batch["embed_index"][:, 0]
        assert (np.take_along_axis(words, index[:, None], axis=1) == emb).all()
        assert ((words == emb).sum(axis=1) == 1).all()
        assert ((captions == tokenizer.eos_token_id).sum(axis=1) == 1).all()
        full = index == length - 1
        assert not (batch["truncated"][:, 0] & ~full[:, None]).any()
        cut += batch["truncated"][:, 0].sum(axis=0)
        whole += (~batch["truncated"][:, 0]).sum(axis=0)
    names = [r["name"] for r in read_split(config.data, "train", 8)[1]]
    sizes = [len(tokenizer.backend_tokenizer.encode(n, add_special_tokens=False)) for n in names]
    long = np.mean([size > length - 2 for size in sizes])
    assert 0 < long < 1
    shares = cut / (cut + whole)
    assert shares[0] == shares[1] == pytest.approx(long, abs=0.05)


# ---- the sequence --------------------------------------------------------------------------------


def rows_of(batches):
    """Every row of some batches, in order, as bytes that identify all of it."""
    return [
        b"".join(np.ascontiguousarray(batch[name][i]).tobytes() for name in sorted(batch))
        for batch in batches
        for i in range(len(batch["image"]))
    ]


def test_every_example_comes_once_an_epoch_in_a_new_order_each_time(emoji_config, tokenizer):
    plain = dict.fromkeys(("shift", "stretch", "rotate", "colour", "background"), 0.0)
    config = emoji_config({"batch_size": 17})  # 8 batches are an epoch
    config.data.augment.update(plain, min_scale=1.0, max_scale=1.0)
    batches = take(training_batches(config, tokenizer), 16)
    drawings = [image.tobytes() for batch in batches for image in batch["image"]]
    stored = [image.tobytes() for image in read_split(config.data, "train", 32)[0]]
    first, second = drawings[:EXAMPLES], drawings[EXAMPLES:]
    assert Counter(first) == Counter(second) == Counter(stored)
    assert max(Counter(stored).values()) == 1
    assert first != stored and second != first
    config.seed = 1
    other = take(training_batches(config, tokenizer), 1)[0]["image"]
    assert [image.tobytes() for image in other] != first[:17]


def test_a_second_epoch_is_augmented_anew(emoji_config, tokenizer):
    config = emoji_config({"batch_size": EXAMPLES})
    first, second = take(training_batches(config, tokenizer), 2)
    images = [image.tobytes() for batch in (first, second) for image in batch["image"]]
    assert len(set(images)) == 2 * EXAMPLES


def test_two_processes_share_the_sequence_of_one(emoji_config, tokenizer):
    config = emoji_config()  # 12 batches of 16 go past the end of the first epoch
    one = take(training_batches(config, tokenizer), 12)
    shares = [take(training_batches(config, tokenizer, i, 2), 12) for i in range(2)]
    assert all(len(batch["image"]) == 8 for share in shares for batch in share)
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert_same(joined, one)


def test_a_position_is_that_of_any_number_of_processes(emoji_config, tokenizer):
    config = emoji_config()
    four = training_batches(config, tokenizer, 3, 4)
    take(four, 5)
    one = training_batches(config, tokenizer)
    one.set_state(four.get_state())
    assert_same(take(one, 2), take(training_batches(config, tokenizer), 7)[5:])


@pytest.mark.parametrize("workers", [0, 2])  # tests/test_train.py restarts a run with one
def test_the_sequence_is_the_same_with_workers_and_after_a_restart(
    emoji_config, tokenizer, workers
):
    sequence = take(training_batches(emoji_config(), tokenizer), 14)
    config = emoji_config({"data.workers": workers})
    batches = training_batches(config, tokenizer)
    start = [next(batches) for _ in range(5)]
    state = batches.get_state()
    start.append(next(batches))  # what was made ahead does not count
    batches.close()
    resumed = training_batches(config, tokenizer)
    resumed.set_state(state)
    assert_same(start, sequence[:6])
    assert_same(take(resumed, 9), sequence[5:])


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES = [
    ({"data.name": "emoji/nothing"}, r"data\.name: no data set 'emoji/nothing' in data\.dir"),
    ({"data.name": "nothing"}, r"data\.name: no data set 'nothing' in data\.dir"),
    ({"data.name": ""}, r"data\.name: no data set '' in data\.dir"),
    ({"data.name": "a folder/somewhere"}, r"data\.name: no data set 'a folder/somewhere'"),
    ({"data.dir": "/nowhere"}, r"data\.name: no data set 'emoji/fixture' in data\.dir '/nowhere'"),
    ({"data.split": "training"}, r"data\.split: emoji/fixture has no split 'training'; .*'train'"),
    ({"data.image_field": "picture"}, r"data\.image_field: no field 'picture'; .*'image'"),
    ({"data.caption_template": "{caption}"}, r"data\.caption_template: .*no field 'caption'"),
    ({"data.caption_template": "{image}"}, r"data\.caption_template: .*no field 'image'"),
    ({"data.text_templates": ("{nam}",)}, r"data\.text_templates: .*no field 'nam'; .*'name'"),
    ({"data.text_weights": (1.0, 2.0)}, r"data\.text_weights: found \(1\.0, 2\.0\) for 5"),
    ({"data.text_weights": (1.0, 1.0, 1.0, 1.0, -1.0)}, r"data\.text_weights: .*none below 0"),
    ({"data.text_weights": (0.0,) * 5}, r"data\.text_weights: .*one above"),
    ({"data.augment.min_scale": 0.0}, r"data\.augment: min_scale 0 and"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_names_its_field(emoji_config, tokenizer, changes, message):
    with pytest.raises(UserError, match=message) as error:
        training_batches(emoji_config(changes), tokenizer)
    assert "\n" not in str(error.value)


def test_a_data_set_that_is_known_but_not_built_is_missing(emoji_config):
    # TFDS makes a builder from the class alone, of which some test has surely been importing one.
    from mmgem_jax.data import emoji  # noqa: F401

    with pytest.raises(UserError, match=r"data\.name: no data set 'emoji/things'"):
        tfds_records.find_builder(emoji_config({"data.name": "emoji/things"}).data)
