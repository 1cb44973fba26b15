"""A report as text, to read on a terminal."""

GIB = 2**30


def report_text(report):
    """All of a report (`check.preflight`)."""
    axes = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    slices = f" x {report['slices']} slices" if report["slices"] > 1 else ""
    lines = [
        f"{'topology':14s}{report['topology']}{slices}: {report['chips']} x "
        f"{report['device_kind']}, mesh {axes}"
    ]
    lines += ["", report["parameters"]]
    for program in report["programs"]:
        lines += ["", *program_lines(program)]
    matmul = report["calibration"]
    lines += [
        "",
        f"{'calibration':14s}a matmul of {matmul['matmul']} is predicted to run at "
        f"{matmul['flops_per_second'] / 1e12:,.1f} TFLOP/s, {matmul['share_of_peak']:.3f} of the "
        f"peak of {matmul['peak_flops_per_second'] / 1e12:,.0f}",
        f"{'note':14s}{report['predicted']}",
    ]
    return "\n".join(lines)


def program_lines(program):
    """One program: memory, time, collectives, problems."""
    memory = program["memory"]
    parts = [name for name in memory if name not in ("peak", "capacity", "exceeds_by")]
    split = ", ".join(f"{name} {memory[name] / GIB:.2f}" for name in parts)
    verdict = "fits" if program["fits"] else f"DOES NOT FIT, by {memory['exceeds_by'] / GIB:.2f}"
    flops = program["flops"]
    lines = [
        f"{program['name']}",
        f"{'batch':14s}{program['batch']:,} images, {program['batch_per_chip']:g} a chip",
        f"{'HBM a chip':14s}{memory['peak'] / GIB:.2f} of {memory['capacity'] / GIB:.2f} GiB: "
        f"{verdict} ({split})",
        f"{'model FLOPs':14s}{flops['total']:.4g} a run, {flops['an_image']:.4g} an image: "
        + ", ".join(f"{part} {of / flops['total']:.1%}" for part, of in flops["by_part"].items()),
    ]
    if "prediction" in program:
        lines += [*time_lines(program), *collective_lines(program["collectives"])]
    else:
        lines.append(f"{'what may mend':14s}{remedies(memory)}")
    lines += [f"{'PROBLEM':14s}{problem}" for problem in program["problems"]]
    lines.append(
        f"{'compile':14s}{program['compile_seconds']:.0f} s, at most "
        f"{program['peak_host_bytes'] / GIB:.1f} GiB of this machine's memory"
    )
    return lines


def remedies(memory):
    """What there is to change where a program does not fit, by what takes the most."""
    held = memory["params"] + memory.get("optimizer", 0) + memory.get("average", 0)
    split = "split parameters over more chips (mesh.fsdp)"
    lighter = "recompute more (model.vision.remat, model.decoder.remat: full), a batch in parts "
    lighter += "(accumulation_steps) or a smaller one"
    order = (split, lighter) if held > memory["temporaries"] else (lighter, split)
    return f"{'; '.join(order)}; --fix tries them"


def time_lines(program):
    """The predicted time and where it goes."""
    found = program["prediction"]
    ms = lambda seconds: f"{1e3 * seconds:,.1f} ms"  # noqa: E731
    lines = [
        f"{'predicted':14s}{ms(found['seconds'])}, MFU {'at most ' if found['at_most'] else ''}"
        f"{found['mfu']:.3f}, "
        f"{found['images_per_second']:,.0f} images/s"
        + (f"; of useful tokens {found['useful_mfu']:.3f}" if found["useful_mfu"] else ""),
        f"{'':14s}{ms(found['ideal_seconds'])} at the chip's peak; recomputed "
        f"{ms(found['recomputed_seconds'])}; collectives that nothing hides "
        f"{ms(found['exposed_collective_seconds'])}",
    ]
    for kernel in program["kernels"]:
        lines.append(
            f"{'kernel':14s}{kernel['kernel']} x {kernel['count']}: {ms(kernel['seconds'])} by "
            "its schedule"
        )
    for kernel in program["not_estimated"]:
        least = kernel["least_seconds"]
        bound = "of unknown cost" if least is None else f"at least {ms(least)} in all"
        lines.append(f"{'NOT ESTIMATED':14s}{kernel['kernel']} x {kernel['count']}: {bound}")
    if found["loops_of_unknown_trips"]:
        lines.append(f"{'NOT ESTIMATED':14s}loops of unknown trips, counted as one turn")
    lines.append("where the time goes")
    for row in sorted(program["time"], key=lambda row: -row["seconds"]):
        place = f"{row['part']}, {row['phase']}"
        lines.append(f"    {place:36s}{ms(row['seconds']):>12s}  {row['share']:6.1%}")
    lines.append("costliest instructions")
    for row in program["costliest"]:
        times = f"x {row['trips']}" if row["trips"] > 1 else ""
        lines.append(
            f"    {row['source'][-60:]:60s} {row['phase']:10s} {times:5s}"
            f"{ms(row['seconds']):>11s}  {row['share']:6.1%}  {row['instruction']}"
        )
    return lines


def collective_lines(rows):
    """The collectives, by kind and mesh axes."""
    if not rows:
        return ["no collectives"]
    heads = ("count", "MiB", "ms on links", "ms beside", "ms exposed")
    kind = f"    {'collectives':20s}{'over':22s}"
    lines = [kind + "".join(f"{head:>13s}" for head in heads)]
    for row in rows:
        beside = f"{1e3 * row['beside_seconds']:,.1f}" if row["asynchronous"] else "sync"
        cells = (
            *(f"{row['count']:,}", f"{row['bytes'] / 2**20:,.1f}", f"{1e3 * row['seconds']:,.2f}"),
            *(beside, f"{1e3 * row['exposed_seconds']:,.2f}"),
        )
        lines.append(
            f"    {row['kind']:20s}{row['axes']:22s}" + "".join(f"{cell:>13s}" for cell in cells)
        )
    return lines
