"""Where the time goes: parts of the model, passes, the costliest, and what has no estimate."""

# ruff: noqa: E501  (a line of the compiled text is one)

import dataclasses

import pytest
from hlo_text import TEXT

from mmgem_jax.chips import CHIPS
from mmgem_jax.preflight import cost, hlo

STACK = "decoder/while/body/closed_call"
NAMES = {
    "jit(train_step)/jvp(MMGem.feature_map)/vision/patch/dot_general": ("vision", "forward"),
    f"jit(train_step)/jvp(generation)/MMGem.caption_logits/{STACK}/blocks/up/dot_general": (
        *("decoder", "forward"),
    ),
    f"jit(train_step)/transpose(jvp(embedding))/MMGem.encode_text/{STACK}/checkpoint/"
    "rematted_computation/blocks/up/dot_general": ("decoder", "recomputed"),
    f"jit(train_step)/transpose(jvp(embedding))/MMGem.encode_text/{STACK}/checkpoint/blocks/up/mul": (
        *("decoder", "backward"),
    ),
    "jit(train_step)/jvp(generation)/MMGem.caption_logits/decoder.logits/dot_general": (
        *("head", "forward"),
    ),
    "jit(train_step)/jvp(head)/jit(shmap_body)/while/body/CD,DV->CV/dot_general": (
        *("head", "forward"),
    ),
    f"jit(train_step)/transpose(jvp(MMGem.packed_states))/{STACK}/checkpoint/blocks/up/mul": (
        *("decoder", "backward"),
    ),
    "jit(train_step)/transpose(jvp(pick))/ASM,AMD->ASD/dot_general": ("decoder", "backward"),
    "jit(train_step)/jvp(embedding)/ME,CE->MC/dot_general": ("losses", "forward"),
    "jit(train_step)/transpose(jvp(embedding))/MMGem.embed_regions/region_projection/dot_general": (
        *("pooling and projections", "backward"),
    ),
    "jit(train_step)/mul": ("optimizer", "forward"),
    "jit(<lambda>)/MMGem.feature_map/vision/while/body/blocks/up/add": ("vision", "forward"),
    "": ("other", "forward"),
}


@pytest.mark.parametrize("op_name", NAMES)
def test_an_operation_s_part_and_pass(op_name):
    assert cost.part_and_phase(op_name) == NAMES[op_name]


def test_cycles_are_counted_by_trips():
    regions = hlo.regions(*hlo.parse(TEXT))
    found = cost.costs(regions, dataclasses.replace(CHIPS["v5e"], clock=10.0), {})
    assert {c.name: c.seconds for c in found} == {"f": pytest.approx(10.5), "out": 10.0}
    assert sum(sum(phases.values()) for phases in cost.by_part(found).values()) == pytest.approx(
        20.5
    )
    first, second = cost.costliest(found, 10)
    assert (first["instruction"], first["trips"], first["source"]) == ("f", 15, "jit(step)/a/mul")
    assert first["share"] + second["share"] == pytest.approx(1)


def test_a_source_is_the_end_of_its_name_without_loops():
    name = f"jit(train_step)/transpose(jvp(embedding))/{STACK}/checkpoint/blocks/up/dot_general"
    assert cost.short(name) == "blocks/up/dot_general"


SPLASH = """ENTRY %main (x: f32[8]) -> f32[8] {
  %splash_mha_fwd_segmented.1 = bf16[8,32,1152,64]{3,2,1,0} custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,3,3]{2,1,0}, bf16[8,32,1152,64]{3,2,1,0}, bf16[8,4,1152,64]{3,2,1,0}, bf16[8,4,1152,64]{3,2,1,0}, s32[8,1152,128]{2,1,0}}, metadata={op_name="a"}
  %other.7 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"300"}}
  ROOT %unknown = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
}
"""


def test_kernels_without_an_estimate_have_a_bound_where_their_flops_are_known():
    rows = cost.not_estimated(hlo.regions(*hlo.parse(SPLASH)), [], peak_flops=100.0)
    found = {row["kernel"]: (row["count"], row["least_seconds"]) for row in rows}
    # Two products of 2 B N T S C, of which the causal mask leaves half.
    splash = 2 * 8 * 32 * 1152 * 1152 * 64
    assert found == {
        "splash_mha_fwd_segmented": (1, pytest.approx(splash / 100)),
        "other": (1, pytest.approx(3.0)),
        "unknown": (1, None),
    }
