"""Where the time goes, by the compiler's own estimates: cycles of instructions times trips.

The compiler writes its estimate of an instruction's cycles beside it, memory traffic considered.
Kernels written by hand have none, and count by their schedules (kernels.py); the SparseCores' work
has none.
"""

import math
import re
from dataclasses import dataclass

from mmgem_jax.preflight.hlo import arrays

PARTS = ("vision", "pooling and projections", "decoder", "head", "losses", "optimizer", "other")
PHASES = ("forward", "recomputed", "backward")

# Scopes of the model's code, in the order in which they decide.
SCOPES = (
    ("head", ("decoder.logits", "head")),
    ("decoder", ("decoder", "decoder.embed", "DecoderBlock", "pick", "MMGem.packed_states")),
    ("vision", ("vision", "MMGem.feature_map")),
    (
        "pooling and projections",
        (
            *("MMGem.embed_regions", "MMGem.visual_tokens", "MMGem.encode_text"),
            *("region_projection", "visual_token_projection", "text_projection"),
        ),
    ),
    ("losses", ("embedding", "generation")),
)


@dataclass(frozen=True)
class Cost:
    """An instruction of the schedule and what it costs in a run of the program."""

    name: str
    op_name: str
    part: str
    phase: str
    trips: int
    seconds: float


def costs(regions, chip, schedules):
    """The Cost of every instruction that has an estimate, and of kernels that have a schedule.

    Args:
      regions: of `hlo.regions`.
      chip: the Chip.
      schedules: bundles by Kernel, of `kernels.bundles_of`.
    """
    found = []
    for region in regions:
        for item in region.instructions:
            if item.opcode == "while":
                continue
            seconds = item.cycles / chip.clock if item.cycles is not None else None
            if seconds is None:
                known = [kernel for kernel in schedules if kernel.is_called_by(item)]
                if known and schedules[known[0]]:
                    seconds = known[0].seconds(schedules[known[0]], chip)
            if seconds is not None:
                op_name = item.op_name or region.op_name
                part = part_and_phase(op_name)
                found.append(Cost(item.name, op_name, *part, region.trips, seconds * region.trips))
    return found


def seconds_of(found):
    """Seconds of one run of each instruction, by name."""
    return {c.name: c.seconds / c.trips for c in found}


def part_and_phase(op_name):
    """Which part of the model an operation belongs to, and in which pass it runs.

    What a step does outside of the gradient is the optimizer's.
    """
    phase = "backward" if "transpose(" in op_name else "forward"
    if "rematted_computation" in op_name:
        phase = "recomputed"
    names = set(re.split(r"[/()]", op_name))
    for part, scopes in SCOPES:
        if names & set(scopes):
            return part, phase
    outside = op_name.startswith("jit(train_step)/") and "jvp(" not in op_name
    return ("optimizer" if outside and "/blocks" not in op_name else "other"), phase


def by_part(found):
    """Seconds by part and phase, without what is zero."""
    table = {}
    for part in PARTS:
        for phase in PHASES:
            own = [c.seconds for c in found if (c.part, c.phase) == (part, phase)]
            if sum(own):
                table.setdefault(part, {})[phase] = sum(own)
    return table


def costliest(found, count):
    """The instructions that cost most, with the end of their op_name and their share of all."""
    whole = sum(c.seconds for c in found)
    return [
        {
            "instruction": c.name,
            "source": short(c.op_name),
            "part": c.part,
            "phase": c.phase,
            "trips": c.trips,
            "seconds": c.seconds,
            "share": c.seconds / whole,
        }
        for c in sorted(found, key=lambda c: -c.seconds)[:count]
    ]


def short(op_name):
    """The end of an op_name, without the scopes of loops and checkpoints."""
    noise = ("while", "body", "closed_call", "checkpoint", "rematted_computation")
    return "/".join([name for name in op_name.split("/") if name not in noise][-3:])


def not_estimated(regions, known, peak_flops):
    """What is not among the `known` costs: name, how often it runs, its time at the chip's peak.

    The last is a lower bound, None where a kernel does not say how many FLOPs it takes.
    """
    found, known = {}, {cost.name for cost in known}
    for region in regions:
        for item in region.instructions:
            kernel = item.opcode == "custom-call" and "tpu_custom_call" in item.attributes
            offloaded = item.opcode == "call-start"
            if item.name in known or not (kernel or offloaded):
                continue
            flops = kernel_flops(item)
            name = re.sub(r"[.\d]+$", "", item.name)
            row = found.setdefault(name, {"kernel": name, "count": 0, "least_seconds": None})
            row["count"] += region.trips
            if flops:
                least = flops * region.trips / peak_flops
                row["least_seconds"] = (row["least_seconds"] or 0.0) + least
    return list(found.values())


def kernels(found, regions):
    """Of the costs, those of kernels written by hand: name, how often they run, seconds in all."""
    estimated = {
        item.name for region in regions for item in region.instructions if item.cycles is not None
    }
    rows = {}
    for c in found:
        if c.name not in estimated:
            name = re.sub(r"[.\d]+$", "", c.name)
            row = rows.setdefault(name, {"kernel": name, "count": 0, "seconds": 0.0})
            row["count"] += c.trips
            row["seconds"] += c.seconds
    return list(rows.values())


def kernel_flops(item):
    """FLOPs of a kernel written by hand; None where they are not known.

    It may say them. JAX's splash attention does not, but its name says which pass it is, and its
    arguments, q [..., N, T, C] and k [..., K, S, C], how large: two products forward and five
    backward, of which a causal mask leaves half.
    """
    if item.attribute("flops"):
        return int(item.attribute("flops"))
    passes = [n for name, n in (("splash_mha_fwd", 2), ("splash_mha_dkv", 5)) if name in item.name]
    if not passes:
        return None
    given = re.search(r"operand_layout_constraints=\{(.*?\})\}", item.attributes)
    # The mask's blocks come before them, as bytes.
    floats = [sizes for dtype, sizes in arrays(given[1]) if dtype in ("bf16", "f32")]
    (*rows, C), (*_, S, _) = floats[:2]
    return passes[0] * math.prod(rows) * C * S
