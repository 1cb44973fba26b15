"""Batches of packed rows from a data set: the examples of padded rows, whoever makes them."""

import functools
import json

import jax
import many_hosts
import numpy as np
import pytest
import tiny
from unpacked import unpack

from mmgem_jax import run, sharding
from mmgem_jax.checkpoint import Checkpoints
from mmgem_jax.data.counted_batches import summed
from mmgem_jax.data.pipeline import training_batches
from mmgem_jax.errors import UserError
from mmgem_jax.run_record import merged

GROUPS, SIZE, VISUAL_TOKENS = 4, 16, 4  # A, B and G of the configs below
# So tight that some images wait, and some slots stay empty.
PACKING = {
    "data.packing.images": 4,
    "data.packing.rows": 3,
    "data.packing.row_length": 18,
    "data.packing.targets": 15,
    "data.packing.waiting": 3,
}
OF_SOURCES = {
    "drawings": dict(rows=3, row_length=18, targets=15),
    "regions": dict(rows=16, row_length=24, targets=90),
    "scenes": dict(rows=2, row_length=500, targets=150),
}


@pytest.fixture(scope="module")
def pairs(emoji_config):
    """`pairs(changes)`: a config of one source, packed."""
    return lambda changes=(): emoji_config(PACKING | dict(changes))


@pytest.fixture(scope="module")
def mixture(regions_config):
    """`mixture(changes)`: a config of three sources, packed."""

    def make(changes=()):
        config = regions_config(PACKING)
        with config.data.mixture.unlocked():
            for name, packing in OF_SOURCES.items():
                config.data.mixture[name].packing = packing
        config.update_from_flattened_dict(dict(changes))
        return config

    return make


@pytest.fixture(scope="module")
def tokenizer(emoji_config):
    return run.load_run_tokenizer(emoji_config())


def start(config, share=0, shares=1):
    return training_batches(config, run.load_run_tokenizer(config), share, shares)


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def with_sums(state):
    """A whole state with the counts of all shares together."""
    return state | {"seen": summed(state["seen"])}


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, other)


# ---- what a batch is -----------------------------------------------------------------------------


def test_a_batch_is_what_the_model_is_made_for(pairs, mixture):
    for config in (pairs(), mixture()):
        run.complete(config, run.load_run_tokenizer(config))
        names, found = list(config.data.mixture) or [""], {}
        for batch in take(start(config), 8):
            assert len(set(batch["source"].tolist())) == 1
            shapes = {name: (value.shape, value.dtype) for name, value in batch.items()}
            source = names[batch["source"][0]]
            assert found.setdefault(source, shapes) == shapes
            for key, (text, caption) in unpack(batch, VISUAL_TOKENS).items():
                assert batch["region_mask"][key] and len(text) > 2 and len(caption) > 2
        for source in names:
            expected = run.batch_shapes(config, source)
            assert found[source] == {k: (s.shape, s.dtype) for k, s in expected.items()}


def test_every_example_of_the_padded_rows_comes_once_in_the_stream_of_its_group(pairs):
    packed = take(start(pairs()), 24)
    padded = joined(take(start(pairs({"data.packing.images": 0})), 27))  # some wait
    order = {image.tobytes(): number for number, image in enumerate(padded["image"])}
    assert len(order) == 27 * SIZE
    placed, waited, empty = set(), 0, 0
    for batch in packed:
        rows = unpack(batch, VISUAL_TOKENS)
        for slot, image in enumerate(batch["image"]):
            if (slot, 0) not in rows:
                assert not image.any() and not batch["region_mask"][slot].any()
                empty += 1
                continue
            number = order[image.tobytes()]
            assert number % GROUPS == slot // 4 and number not in placed
            placed.add(number)
            words, caption = rows[slot, 0]
            text_row, caption_row = padded["text_tokens"][number], padded["caption_tokens"][number]
            assert words == text_row[0, : padded["embed_index"][number, 0] + 1].tolist()
            assert caption == caption_row[0, : padded["caption_length"][number, 0]].tolist()
            for name in ("boxes", "group_ids", "truncated", "region_counts", "source"):
                np.testing.assert_array_equal(batch[name][slot], padded[name][number])
        waited += (batch["data_position"][:, 1:] >= 0).sum()
    assert empty and waited
    for stream, (taken, *waiting) in enumerate(packed[-1]["data_position"].tolist()):
        left = [number for number in waiting if number >= 0]
        assert left == sorted(left) and waiting[len(left) :] == [-1] * (3 - len(left))
        found = [number // GROUPS for number in placed if number % GROUPS == stream]
        assert sorted(found + left) == list(range(taken))


def test_texts_and_captions_have_rows_of_their_own(pairs):
    config = pairs({"data.packing.text_rows": 2, "data.packing.rows": 6})
    for batch in take(start(config), 4):
        assert unpack(batch, VISUAL_TOKENS)
        visual = (batch["visual_index"] >= 0).reshape(GROUPS, 4, -1).any(axis=2)
        filled = (batch["segment_ids"] > 0).reshape(GROUPS, 6, -1).any(axis=2)
        np.testing.assert_array_equal(visual, filled[:, 2:])


def test_batches_are_of_the_sources_that_padded_ones_are_of(mixture):
    weights = {"regions": 3.0, "scenes": 1.0, "drawings": 2.0}
    config = mixture({f"data.mixture.{name}.weight": w for name, w in weights.items()})
    packed = [int(batch["source"][0]) for batch in take(start(config), 12)]
    config.data.packing.images = 0
    padded = [int(batch["source"][0]) for batch in take(start(config), 12)]
    assert packed == padded and len(set(packed)) == 3


# ---- who makes it --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sequences(pairs, mixture):
    """Batches of both configs by one process without workers, and the state before each."""
    found = {}
    for name, config in {"pairs": pairs(), "mixture": mixture()}.items():
        batches, taken, states = start(config), [], []
        for _ in range(9):
            states.append(json.dumps(batches.get_state()))
            taken.append(next(batches))
        batches.close()
        found[name] = taken, states
    assert len({int(batch["source"][0]) for batch in found["mixture"][0]}) == 3
    return found


def config_of(name, request, changes=()):
    return request.getfixturevalue(name)(changes)


@pytest.mark.parametrize("name", ["pairs", "mixture"])
def test_it_goes_on_after_any_batch(sequences, name, request):
    expected, states = sequences[name]
    batches = start(config_of(name, request))
    for place in (0, 1, 2, 3, 4, 7, 5):
        batches.set_state(json.loads(states[place]))
        assert json.dumps(batches.get_state()) == states[place]
        assert_same([next(batches) for _ in range(2)], expected[place : place + 2])
    assert json.dumps(batches.get_state()) == states[7]
    batches.close()


@pytest.mark.parametrize(("name", "workers", "after"), [("pairs", 1, 2), ("mixture", 2, 0)])
def test_workers_change_nothing_nor_does_their_number(sequences, name, workers, after, request):
    expected, states = sequences[name]
    batches = start(config_of(name, request, {"data.workers": workers}))
    batches.set_state(json.loads(states[2]))
    assert_same([next(batches) for _ in range(3)], expected[2:5])
    state = batches.get_state()  # what was made ahead does not count
    assert json.dumps(state) == states[5]
    batches.close()
    resumed = start(config_of(name, request, {"data.workers": after}))
    resumed.set_state(state)
    assert_same(take(resumed, 2), expected[5:7])


@pytest.mark.parametrize("shares", [2, 4])
@pytest.mark.parametrize("name", ["pairs", "mixture"])
def test_shares_put_together_are_the_whole_and_so_are_their_states(
    sequences, name, shares, request
):
    expected, states = sequences[name]
    parts = [start(config_of(name, request), share, shares) for share in range(shares)]
    assert_same([joined([next(part) for part in parts]) for _ in range(4)], expected[:4])
    whole = functools.reduce(merged, [part.get_state() for part in parts])
    assert with_sums(whole) == with_sums(json.loads(states[4]))
    for others in {1, 2, 4} - {shares}:
        parts = [start(config_of(name, request), share, others) for share in range(others)]
        for part in parts:
            part.set_state(whole)
        assert_same([joined([next(part) for part in parts]) for _ in range(3)], expected[4:7])


@pytest.mark.parametrize(
    ("shares", "asked", "expected"), [(1, 3, 2), (1, 9, 4), (2, 9, 2), (4, 2, 1), (1, 0, 0)]
)
def test_workers_have_equal_parts_of_a_share_s_streams(pairs, shares, asked, expected):
    batches = start(pairs({"data.workers": asked}), 0, shares)
    assert batches.batches.workers == expected
    batches.close()


PROGRAM = """
import argparse, sys
import numpy as np
sys.path.insert(0, {configs!r})
import emoji_fixture
from mmgem_jax import processes, run, sharding
from mmgem_jax.checkpoint import Checkpoints
from mmgem_jax.data.pipeline import training_batches

parser = argparse.ArgumentParser()
processes.add_arguments(parser)
args = parser.parse_args()
with processes.joined(args.coordinator, args.process_id, args.process_count):
    config = emoji_fixture.get_config()
    config.update_from_flattened_dict({changes!r})
    mesh = sharding.make_mesh(config.mesh)
    batches = training_batches(
        config, run.load_run_tokenizer(config), *sharding.process_share(mesh)
    )
    for _ in range(5):
        next(batches)
    with Checkpoints("run") as checkpoints:
        checkpoints.save(5, sharding.from_whole({{"x": np.zeros(2)}}, mesh), batches)
"""


def test_a_checkpoint_has_the_streams_of_all_processes(pairs, sequences, tmp_path):
    changes = PACKING | {"data.dir": pairs().data.dir}
    configs = str(many_hosts.ROOT / "configs")
    (tmp_path / "program.py").write_text(PROGRAM.format(configs=configs, changes=changes))
    done, _ = many_hosts.run_processes([["program.py"]] * 2, 1, tmp_path)
    assert [process.returncode for process in done] == [0, 0], done
    batches = start(pairs())
    state = sharding.from_whole({"x": np.zeros(2)}, tiny.mesh_of((2, 1, 1)))
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.restore(state, batches)
    assert with_sums(batches.get_state()) == with_sums(json.loads(sequences["pairs"][1][5]))
    assert_same(take(batches, 2), sequences["pairs"][0][5:7])


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES = [
    ({"images": 3}, r"data\.packing\.images: 3; expected a divisor of batch_size 16, or 0"),
    ({"images": -1}, r"data\.packing\.images: -1; expected a"),
    ({"rows": 0}, r"data\.packing\.rows: 0; expected at least 1"),
    ({"row_length": 12}, r"data\.packing\.row_length: 12; expected at least 13, the longest seg"),
    ({"targets": 8}, r"data\.packing\.targets: 8; expected at least 9, of an image"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_names_its_field(pairs, tokenizer, changes, message):
    changes = {f"data.packing.{name}": value for name, value in changes.items()}
    for use in (run.complete, training_batches):
        with pytest.raises(UserError, match=f"^{message}") as error:
            use(pairs(changes), tokenizer)
        assert "\n" not in str(error.value)


def test_a_mistake_names_its_source(mixture, tokenizer):
    config = mixture()
    config.data.mixture.regions.packing.targets = 53
    with pytest.raises(UserError, match=r"^data\.mixture\.regions\.packing\.targets: 53; .* 54"):
        run.complete(config, tokenizer)
    for images in (0, 8):
        config = mixture()
        with config.data.mixture.scenes.packing.unlocked():
            config.data.mixture.scenes.packing.images = images
        with pytest.raises(UserError, match=r"^data\.mixture\.scenes\.packing\.images: is for all"):
            run.complete(config, tokenizer)


def test_groups_are_not_split_over_devices(pairs):
    run.check_mesh(pairs(), tiny.mesh_of((2, 2, 1)))
    with pytest.raises(UserError, match=r"^batch_size: 16, in 4 groups of .*images 4, is not a m"):
        run.check_mesh(pairs(), tiny.mesh_of((4, 2, 1)))
