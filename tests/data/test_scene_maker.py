"""What makes a scene or a pair of them, and what is drawn anew."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from mmgem_jax.data import emoji, scene_maker, scenes
from mmgem_jax.data.tokenizer import load_tokenizer
from mmgem_jax.errors import UserError


@pytest.fixture(scope="module")
def read(emoji_config):
    """`read(split)`: the drawings of a split of the emoji."""
    folder = emoji.data_folder(emoji_config().data.dir, "fixture")
    return lambda split: scenes.read_drawings(folder, split)


@pytest.fixture(scope="module")
def tokenizer(emoji_config):
    """The emoji's."""
    folder = emoji.data_folder(emoji_config().data.dir, "fixture")
    return load_tokenizer(str(folder / "tokenizer"))


def test_descriptions_of_many_pairs_begin_alike_for_long_enough(read, tokenizer, monkeypatch):
    monkeypatch.setattr(scene_maker, "SHARED_TOKENS", 120)
    maker = scene_maker.SceneMaker(read("test"), tokenizer)
    for seed in range(25):
        texts = [scene.description for scene in maker.pair(np.random.default_rng(seed))]
        tokens = [tokenizer.backend_tokenizer.encode(text).ids for text in texts]
        assert tokens[0][:120] == tokens[1][:120]
        assert tokens[0] != tokens[1]


def test_what_an_object_is_says_nothing_of_where_it_stands(read, tokenizer):
    """With all drawings replaced by others, places, sizes and canvas stay."""
    own = read("validation")
    square = Image.new("RGBA", (50, 50), "red")
    others = {
        concept: [scene_maker.Drawing(concept, f"thing{concept}", "none", square) for _ in drawn]
        for concept, drawn in own.items()
    }
    equal = []
    for seed in range(30):
        scene, other = (
            scene_maker.SceneMaker(drawn, tokenizer).scene(np.random.default_rng(seed))
            for drawn in (own, others)
        )
        middles = [
            [((t + b) / 2, (le + r) / 2) for t, le, b, r in (thing.box for thing in made.things)]
            for made in (scene, other)
        ]
        equal.append(
            len(scene.things) == len(other.things)
            and np.allclose(*map(np.asarray, middles), atol=1.5 / 128)
        )
    # The rest are scenes of which one was too crowded, and was placed anew.
    assert np.mean(equal) > 0.7


def test_drawings_that_make_no_scene_are_an_error(tokenizer, monkeypatch):
    monkeypatch.setattr(scene_maker, "ATTEMPTS", 5)
    endless = Image.new("RGBA", (50, 50), "red")
    drawn = {
        str(i): [scene_maker.Drawing(str(i), f"thing{i}" * 40, "none", endless)] for i in range(7)
    }
    with pytest.raises(UserError, match=r"drawings: none of 5 attempts .* 100 to 300 tokens"):
        scene_maker.SceneMaker(drawn, tokenizer).scene(np.random.default_rng(0))


def test_what_makes_no_pair_is_drawn_anew(read, tokenizer):
    """Descriptions that begin apart, or that say the same of both objects that change places."""
    maker = scene_maker.SceneMaker(read("test"), tokenizer)
    a, b = maker.pair(np.random.default_rng(0))
    differing = [i for i, (x, y) in enumerate(zip(a.drawings, b.drawings, strict=True)) if x != y]
    assert maker._is_pair(a, b, differing)
    assert not maker._is_pair(
        a, dataclasses.replace(b, description=f"so {b.description}"), differing
    )
    one = a.things[differing[0]]
    assert not maker._is_pair(dataclasses.replace(a, things=[one] * len(a.things)), b, [0, 1])
    early = dataclasses.replace(a, first_part=10), dataclasses.replace(b, first_part=10)
    assert not maker._is_pair(*early, differing)
