"""The compiled text: computations, instructions, and loops by their trips."""

import pytest
from hlo_text import TEXT

from mmgem_jax.preflight import hlo


def test_an_instruction_has_its_parts():
    computations, entry = hlo.parse(TEXT)
    assert entry == "main"
    assert [item.name for item in computations["main"]] == ["x", "start", "while.2", "last", "out"]
    fusion = computations["inner_body"][1]
    assert (fusion.opcode, fusion.operands, fusion.cycles) == ("fusion", ("b",), 7)
    assert fusion.op_name == "jit(step)/a/mul"
    assert fusion.attribute("calls") == "fused"
    assert fusion.arrays == [("f32", (8,))]
    assert computations["main"][3].cycles is None
    pair = computations["inner_body"][2]
    assert (pair.opcode, pair.arrays) == ("tuple", [("s32", ()), ("f32", (8,))])


def test_loops_in_loops_multiply():
    regions = {r.name: r for r in hlo.regions(*hlo.parse(TEXT))}
    trips = {name: region.trips for name, region in regions.items()}
    assert trips["main"] == 1 and trips["outer_body"] == 3 and trips["inner_body"] == 15
    assert regions["inner_body"].op_name == "jit(step)/while"
    assert "fused" not in regions  # a fusion's cycles stand on the fusion
    assert all(region.known for region in regions.values())


def test_a_loop_that_does_not_say_how_often_it_turns_is_known_not_to():
    text = TEXT.replace("s32[] constant(3)", "s32[] parameter(0)")
    regions = {r.name: r for r in hlo.regions(*hlo.parse(text))}
    assert regions["outer_body"].trips == 1 and not regions["outer_body"].known
    assert regions["inner_body"].trips == 5 and not regions["inner_body"].known
    assert regions["main"].known


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048),
        ("(f32[4]{0}, /*index=1*/s32[], pred[3])", 16 + 4 + 3),
        ("f32[]", 4),
        ("(s4[10], token[])", 5),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo.size_in_bytes(hlo.arrays(shape)) == size


def test_an_instruction_may_go_on_over_several_lines():
    more = """, frontend_attributes={kernel_metadata={
"block": "{\\"q\\": 384}"
}}, metadata={op_name="a/b"}
  ROOT"""
    text = TEXT.replace("index=1\n  ROOT", f"index=1{more}")
    computations, _ = hlo.parse(text)
    assert [item.name for item in computations["main"]][-2:] == ["last", "out"]
    assert computations["main"][3].op_name == "a/b"
