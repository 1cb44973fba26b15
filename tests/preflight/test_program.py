"""What is compiled for a config, before it is compiled."""

import tiny
from ml_collections import ConfigDict

from mmgem_jax import sharding
from mmgem_jax.preflight.program import complete, programs

SOURCES = {
    "pairs": dict(weight=1.0),
    "regions": dict(weight=2.0, regions_field="regions", whole_image=False, max_regions=3),
}


def train_programs(changes=()):
    config = complete(tiny.config(changes))
    return programs("train", config, sharding.make_mesh(config.mesh))


def test_each_source_of_a_mixture_is_a_program_of_its_own_shape():
    pairs, regions = train_programs({"data.mixture": ConfigDict(SOURCES)})
    assert (pairs.name, regions.name) == ("train step, pairs", "train step, regions")
    shapes = [program.arguments[1]["text_tokens"].shape for program in (pairs, regions)]
    assert shapes == [(8, 1, 7), (8, 3, 7)]
    assert regions.flops["text decoder"] == 3 * pairs.flops["text decoder"]


def test_without_a_mixture_there_is_one():
    (step,) = train_programs()
    assert step.name == "train step"


def test_useful_flops_are_those_of_typical_captions_alone():
    (padded,) = train_programs({"data.text_length": 77, "data.caption_length": 77})
    sizes = dict(images=1, rows=3, row_length=80, targets=76, text_rows=0, waiting=8)
    changes = {f"data.packing.{name}": value for name, value in sizes.items()}
    (packed,) = train_programs(changes | {"data.text_length": 77, "data.caption_length": 77})
    assert packed.useful_flops == padded.useful_flops < sum(padded.flops.values())
    assert packed.useful_flops < sum(packed.flops.values())
    assert packed.arguments[1]["tokens"].shape == (24, 80)
