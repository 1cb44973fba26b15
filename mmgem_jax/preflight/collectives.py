"""What the chips send each other in a run of a program, and what the sending can hide behind.

A collective is synchronous, and nothing runs beside it; or it starts at one instruction and is done
at a later one, and what runs between them hides it. The compiler gives no time for either, so the
time is that of rings at the links' bandwidth, as if nothing else were on the links.
"""

import re
from dataclasses import dataclass

import numpy as np

from mmgem_jax.preflight.groups import (
    device_groups,
    mesh_axes_of,
    ring_bandwidth,
    slice_axes,
    slices_of,
    torus_axes_of,
)
from mmgem_jax.preflight.hlo import Instruction, size_in_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One collective of the schedule; its figures are of one run of it."""

    kind: str
    op_name: str
    size: int  # bytes of the array that a member ends with, or starts with where it is scattered
    axes: tuple[str, ...]  # of the mesh
    trips: int
    seconds: float  # at the links' bandwidth
    beside: float | None  # seconds of compute between its start and its end; None: synchronous
    arrays: tuple = ()  # (dtype, sizes) of what it gives

    @property
    def exposed(self):
        """Seconds that nothing hides."""
        return max(0.0, self.seconds - (self.beside or 0.0))


def find_collectives(regions, computations, mesh, chip, seconds):
    """Every Collective of a program.

    Args:
      regions: of `hlo.regions`.
      computations: of `hlo.parse`.
      mesh: the mesh.
      chip: the Chip.
      seconds: of one run of each instruction, by name, as far as known.
    """
    found = []
    for region in regions:
        under_way, passed = {}, 0.0  # by key: what has started, and the seconds until then
        for item in region.instructions:
            role, key, carrier = role_of(item, computations)
            if role == "whole":
                found.append(made(carrier, item, region, mesh, chip, None))
            elif role in ("start", "during") and key not in under_way:
                under_way[key] = (carrier, item, passed)
            elif role == "end" and key in under_way:
                carrier, begun, since = under_way.pop(key)
                found.append(made(carrier, begun, region, mesh, chip, passed - since))
            passed += seconds.get(item.name, 0.0)
        for carrier, begun, since in under_way.values():  # they end in the next turn of the loop
            found.append(made(carrier, begun, region, mesh, chip, passed - since))
    return found


def role_of(item: Instruction, computations):
    """What an instruction does to a collective, which one, and the instruction that describes it.

    Returns:
      `whole`, `start`, `during`, `end` or None; a key that start and end share; the collective.
    """
    base = re.sub("-(start|done)$", "", item.opcode)
    if base in KINDS:
        role = item.opcode[len(base) + 1 :]
        return {"start": "start", "done": "end"}.get(role, "whole"), key_of(item), item
    # Between slices: the host's network takes what is sent, and gives back the result.
    if base in ("send", "recv") and "is_host_transfer=true" in item.attributes:
        role = {"recv": "start", "recv-done": "end"}.get(item.opcode)
        return role, item.attribute("channel_id"), item
    called = item.attribute("calls") if item.opcode in ("fusion", "async-start") else None
    inner = next((i for i in computations.get(called, ()) if i.opcode in KINDS), None)
    if inner is None:
        return ("end", key_of(item), item) if item.opcode == "async-done" else (None, None, None)
    if item.opcode == "async-start":
        return "start", item.name, inner
    key = inner.attribute("chain_id") or inner.attribute("channel_id")
    for name, role in (("async-collective-start", "start"), ("async-collective-done", "end")):
        if item.name.startswith(name):
            return role, key, inner
    return ("during" if called.startswith("async_collective") else "whole"), key, inner


def key_of(item):
    """The name of the instruction that started what this one starts or ends."""
    return item.operands[0] if item.opcode.endswith("-done") else item.name


def made(carrier, item, region, mesh, chip, beside):
    """The Collective that `carrier` describes; `item` is the instruction of the schedule."""
    op_name = carrier.op_name or item.op_name or region.op_name
    if carrier.opcode == "recv":
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', carrier.attributes)
        kind = kind[1].lower().replace("_", "-") if kind else "send"
        slices, axes = slices_of(range(mesh.devices.size), mesh), slice_axes(mesh)
        size = size_in_bytes(carrier.arrays[:1]) * (slices if kind == "reduce-scatter" else 1)
        seconds = rounds(kind) * size * (slices - 1) / slices / chip.network_bandwidth
        return Collective(kind, op_name, int(size), axes, region.trips, seconds, beside)
    groups = device_groups(carrier.attributes)
    group = np.arange(mesh.devices.size) if groups is None else groups[0]
    kind, size = kind_and_size(carrier, item, len(group))
    seconds = seconds_of(kind, size, group, mesh, chip)
    axes = mesh_axes_of(group, mesh)
    arrays = tuple(carrier.arrays)
    return Collective(kind, op_name, int(size), axes, region.trips, seconds, beside, arrays)


def kind_and_size(carrier, item, members):
    """The kind of a collective and the bytes of its array, gathered or not yet scattered."""
    kind, arrays = carrier.opcode.removesuffix("-start"), carrier.arrays
    if kind == "all-reduce" and (item.attribute("calls") or "").startswith("all-reduce-scatter"):
        return "reduce-scatter", size_in_bytes(arrays)
    if kind == "collective-permute":
        return kind, size_in_bytes(arrays[:1])
    if carrier.opcode == "all-gather-start":  # the operands and the results
        return kind, size_in_bytes(arrays[len(arrays) // 2 :])
    return kind, size_in_bytes(arrays) * (members if kind == "reduce-scatter" else 1)


def rounds(kind):
    """How often a collective sends its array around: an all-reduce scatters, then gathers."""
    return 2 if kind == "all-reduce" else 1


def seconds_of(kind, size, group, mesh, chip):
    """Time of a collective of a group of positions in the mesh, of `size` bytes.

    In a ring of n each member receives (n - 1) / n of the array. An all-to-all sends a share of it
    n / 4 links far on average (Austin et al. 2025, chapter 3).
    """
    slices = slices_of(group, mesh)
    members = len(group) // slices
    bandwidth = ring_bandwidth(group, mesh, chip)
    if kind == "collective-permute":
        return size / (chip.link_bandwidth if slices == 1 else chip.network_bandwidth)
    between = rounds(kind) * size / members * (slices - 1) / slices / chip.network_bandwidth
    if members == 1 or not bandwidth:
        return between
    if kind == "all-to-all":
        along_axis = members ** (1 / torus_axes_of(group, mesh))
        return size * along_axis / 4 / bandwidth + between
    return rounds(kind) * size * (members - 1) / members / bandwidth + between


def summary(found):
    """Rows by kind and mesh axes: count, bytes and seconds of a run, and what hides them."""
    rows = {}
    for c in found:
        names = (c.kind, "+".join(c.axes) or "-", c.beside is not None)
        row = rows.setdefault(
            names,
            dict(zip(("kind", "axes", "asynchronous"), names, strict=True))
            | {
                "count": 0,
                "bytes": 0,
                "seconds": 0.0,
                "beside_seconds": 0.0,
                "exposed_seconds": 0.0,
            },
        )
        row["count"] += c.trips
        row["bytes"] += c.trips * c.size
        row["seconds"] += c.trips * c.seconds
        row["beside_seconds"] += c.trips * (c.beside or 0.0)
        row["exposed_seconds"] += c.trips * c.exposed
    return sorted(rows.values(), key=lambda row: -row["seconds"])
