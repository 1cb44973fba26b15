"""Collectives of a schedule: what they send, and what runs beside them."""

# ruff: noqa: E501  (a line of the compiled text is one)

import pytest
from torus import torus_mesh

from mmgem_jax.chips import CHIPS
from mmgem_jax.preflight import cost, hlo
from mmgem_jax.preflight.collectives import find_collectives, summary

GROUPS = "replica_groups={{0,1,2,3}}"
LINK = CHIPS["v5e"].link_bandwidth
TEXT = f"""%all-reduce-scatter.3 (a: f32[64,8]) -> f32[16,8] {{
  %r = f32[64,8]{{1,0}} all-reduce(%a), channel_id=3, {GROUPS}, to_apply=%sum
  ROOT %s = f32[16,8]{{1,0}} dynamic-slice(%r)
}}

%started (a: bf16[8]) -> bf16[32] {{
  ROOT %g = bf16[32]{{0}} all-gather(%a), channel_id=4, {GROUPS}, frontend_attributes={{chain_id="2"}}
}}

%async_collective_fusion.1 (a: bf16[8]) -> bf16[32] {{
  ROOT %g = bf16[32]{{0}} all-gather(%a), channel_id=4, {GROUPS}, frontend_attributes={{chain_id="2"}}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %reduced = (f32[100]{{0}}, f32[28]{{0}}) all-reduce(%x, %x), channel_id=1, {GROUPS}, to_apply=%sum
  %scattered = f32[16,8]{{1,0}} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  %async-collective-start = bf16[32]{{0}} fusion(%x), kind=kCustom, calls=%started
  %carries = bf16[32]{{0}} fusion(%x), kind=kOutput, calls=%async_collective_fusion.1, backend_config={{"estimated_cycles":"1500"}}
  %more = bf16[32]{{0}} add(%x, %x), backend_config={{"estimated_cycles":"3000"}}
  %async-collective-done = bf16[32]{{0}} fusion(%x), kind=kCustom, calls=%started
  %p = (f32[64]{{0}}, f32[64]{{0}}, u32[]) collective-permute-start(%x), channel_id=5, source_target_pairs={{{{0,1}},{{1,2}}}}
  %idle = f32[8]{{0}} copy(%x)
  %q = f32[64]{{0}} collective-permute-done(%p)
  %o = (f32[16]{{0}}, f32[64]{{0}}) all-gather-start(%x), channel_id=6, {GROUPS}, dimensions={{0}}
  %beside = f32[8]{{0}} copy(%x), backend_config={{"estimated_cycles":"150"}}
  ROOT %d = f32[64]{{0}} all-gather-done(%o)
}}
"""


def found():
    computations, entry = hlo.parse(TEXT)
    regions = hlo.regions(computations, entry)
    seconds = cost.seconds_of(cost.costs(regions, CHIPS["v5e"], {}))
    mesh = torus_mesh((4, 1), (4,), ("chips",))
    return find_collectives(regions, computations, mesh, CHIPS["v5e"], seconds)


def test_each_collective_is_found_once_with_its_bytes():
    kinds = [(c.kind, c.size, c.axes) for c in found()]
    assert kinds == [
        ("all-reduce", 512, ("chips",)),
        ("reduce-scatter", 64 * 8 * 4, ("chips",)),
        ("all-gather", 64, ("chips",)),
        ("collective-permute", 256, ("chips",)),
        ("all-gather", 256, ("chips",)),
    ]


def test_what_is_asynchronous_hides_behind_what_runs_between_start_and_end():
    beside = [c.beside for c in found()]
    assert beside == [None, None, pytest.approx(3e-6), 0.0, pytest.approx(1e-7)]


def test_times_are_those_of_a_line_of_four():
    times = [c.seconds for c in found()]
    bytes_sent = [2 * 512 * 3 / 4, 2048 * 3 / 4, 64 * 3 / 4, 256, 256 * 3 / 4]
    assert times == pytest.approx([size / LINK for size in bytes_sent])
    assert [c.exposed for c in found()][:3] == pytest.approx([*times[:2], 0.0])


def test_the_summary_adds_up():
    rows = {(row["kind"], row["asynchronous"]): row for row in summary(found())}
    assert rows["all-gather", True]["count"] == 2
    assert rows["all-gather", True]["bytes"] == 64 + 256
    total = sum(row["exposed_seconds"] for row in rows.values())
    assert total == pytest.approx(sum(c.exposed for c in found()))
