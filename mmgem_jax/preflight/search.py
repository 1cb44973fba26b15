"""Other values of a config's fields, compiled one after the other: which fits, which is fastest?"""

import ast
import itertools

from mmgem_jax import sharding
from mmgem_jax.errors import UserError
from mmgem_jax.models.layers import REMAT_POLICIES
from mmgem_jax.preflight.check import preflight
from mmgem_jax.preflight.topology import absent_devices

# From what keeps most to what keeps least.
REMAT = ("none", *REMAT_POLICIES)
REMAT_FIELDS = ("model.vision.remat", "model.decoder.remat")


def sweep(config, topology, slices, what, fields, say):
    """Reports on every combination of values of some fields.

    Args:
      config: the config to begin with.
      topology: such as `v5e:16x16`.
      slices: how many of it.
      what: `train`, `eval` or `decode`.
      fields: mapping from dotted names of fields to lists of values; several names joined by `+`
        have the same value.
      say: called with a line as each one is done.

    Returns:
      Rows, best first: those that fit by images a second, then those that do not, by how much.
    """
    rows = []
    for values in itertools.product(*fields.values()):
        changes = {}
        for names, value in zip(fields, values, strict=True):
            changes |= dict.fromkeys(names.split("+"), value)
        rows.append(tried(config, topology, slices, what, changes))
        say(row_text(rows[-1]))
    return sorted(rows, key=order)


def fix(config, topology, slices, what, say):
    """The first change that makes a config fit, from what costs least speed to what costs most.

    Rematerialisation comes first, a policy at a time; then parameters over twice as many chips,
    again and again; then the batch in twice as many parts, and in an evaluation half of it. What
    came before is kept.

    Returns:
      The rows of all that was tried; the last one fits, if any does.
    """
    rows = [tried(config, topology, slices, what, {})]
    say(row_text(rows[0]))
    changes = {}
    for change in remedies(config, topology, slices, what):
        if rows[-1]["fits"]:
            break
        changes |= change
        rows.append(tried(config, topology, slices, what, dict(changes)))
        say(row_text(rows[-1]))
    return rows


def remedies(config, topology, slices, what):
    """Changes that need less memory a chip, each on top of those before it."""
    found = []
    if what == "train":
        now = min(REMAT.index(field(config, name)) for name in REMAT_FIELDS)
        for policy in REMAT[now + 1 :]:
            lighter = [
                n for n in REMAT_FIELDS if REMAT.index(field(config, n)) < REMAT.index(policy)
            ]
            found.append(dict.fromkeys(lighter, policy))
    mesh = sharding.make_mesh(config.mesh, absent_devices(topology, slices))
    _, copies, splits, _ = (f"mesh.{axis}" for axis in sharding.MESH_AXES)
    _, copied, split, _ = mesh.devices.shape
    while copied % 2 == 0:
        copied, split = copied // 2, split * 2
        found.append({copies: copied, splits: split})
    shards = sharding.batch_shards(mesh)
    if what == "train":
        units = config.batch_size // max(config.data.packing.images, 1)
        parts = config.accumulation_steps
        while units % (2 * parts * shards) == 0:
            parts *= 2
            found.append({"accumulation_steps": parts})
    else:
        size = config.eval.batch_size
        while size % 2 == 0 and size // 2 % shards == 0:
            size //= 2
            found.append({"eval.batch_size": size})
    return found


def default_fields(config, topology, slices, what):
    """What `--sweep auto` tries: mesh shapes, rematerialisation, half and double the batch."""
    mesh = sharding.make_mesh(config.mesh, absent_devices(topology, slices))
    _, copies, splits, _ = (f"mesh.{axis}" for axis in sharding.MESH_AXES)
    _, copied, split, _ = mesh.devices.shape
    sizes = [size for size in (split // 2, split, split * 2) if size and copied * split % size == 0]
    batch = "batch_size" if what == "train" else "eval.batch_size"
    size, shards = field(config, batch), sharding.batch_shards(mesh)
    batches = [n for n in (size // 2, size, size * 2) if n % shards == 0]
    found = {copies: [-1], splits: sizes, batch: batches}
    if what == "train":
        found["+".join(REMAT_FIELDS)] = list(REMAT[1:])
    return found


def fields_of(text, config, topology, slices, what):
    """`mesh.fsdp=8,16 batch_size=4096,8192`, or `auto`, as a mapping from names to values.

    Raises:
      UserError: the text is not of this form, or there is no such field.
    """
    if text == "auto":
        return default_fields(config, topology, slices, what)
    found = {}
    for word in text.split():
        names, _, values = word.partition("=")
        if not values:
            raise UserError(f"--sweep: found {word!r}; expected FIELD=VALUE,VALUE or auto")
        now = [field(config, name) for name in names.split("+")]
        try:
            found[names] = [value_of(value, now[0]) for value in values.split(",")]
        except (ValueError, SyntaxError):
            kind = type(now[0]).__name__
            raise UserError(f"--sweep: {names}={values}; expected values of {kind}") from None
    return found


def value_of(text, now):
    """The text as a value of the kind of `now`; ValueError or SyntaxError where it is none."""
    value = text if isinstance(now, str) else type(now)(ast.literal_eval(text))
    if isinstance(now, bool) and text not in ("True", "False"):
        raise ValueError(text)
    return value


def field(config, name):
    """The value of a field by its dotted name."""
    for part in name.split("."):
        if not hasattr(config, "keys") or part not in config:
            raise UserError(f"--sweep: no field {name!r} in the config")
        config = config[part]
    return config


def tried(config, topology, slices, what, changes):
    """One row: the changes, and what became of the config with them."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    try:
        report, _ = preflight(config, topology, slices, what)
    except UserError as error:
        return {"changes": changes, "fits": False, "error": str(error)}
    programs = report["programs"]
    row = {"changes": changes, "fits": report["fits"], "report": report}
    row["peak_bytes"] = max(program["memory"]["peak"] for program in programs)
    row["exceeds_by"] = max(program["memory"]["exceeds_by"] for program in programs)
    if report["fits"]:
        found = [program["prediction"] for program in programs]
        row["seconds"] = sum(prediction["seconds"] for prediction in found)
        row["mfu"] = sum(prediction["ideal_seconds"] for prediction in found) / row["seconds"]
        # A mixture's steps are of other images; an evaluation's programs all of the same.
        steps = programs if what == "train" else programs[:1]
        row["images_per_second"] = sum(step["batch"] for step in steps) / row["seconds"]
    return row


def order(row):
    """Key by which rows are sorted, best first."""
    return not row["fits"], -row.get("images_per_second", 0.0), row.get("exceeds_by", float("inf"))


def verdict(rows):
    """What `fix` found, as one line."""
    if not rows[-1]["fits"]:
        return "nothing that was tried fits"
    changes = overrides(rows[-1]["changes"])
    return f"fits with {changes}" if changes else "fits as it is"


def overrides(changes):
    """Changes as they stand on a command line."""
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())


def row_text(row):
    """A row on one line."""
    changes = overrides(row["changes"]) or "as it is"
    if "error" in row:
        return f"{'error':>40s}  {changes}: {row['error']}"
    peak = f"{row['peak_bytes'] / 2**30:6.2f} GiB"
    if not row["fits"]:
        return f"{peak} does not fit, by {row['exceeds_by'] / 2**30:6.2f} GiB  {changes}"
    return f"{peak}  {row['images_per_second']:9,.0f} images/s  MFU {row['mfu']:.3f}  {changes}"


def plot(rows, path):
    """A picture of a sweep: images a second against memory, one dot for each row that fits.

    Raises:
      UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "--plot: matplotlib is not installed; expected it (pip install -e '.[preflight]')"
        ) from None
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if row["fits"]:
            place = row["peak_bytes"] / 2**30, row["images_per_second"]
            axes.plot(*place, "o", color="#0072B2")
            label = ", ".join(f"{n.split('.')[-1]} {v}" for n, v in row["changes"].items())
            axes.annotate(label, place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("HBM a chip (GiB)")
    axes.set_ylabel("predicted images a second")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot: {path}: {error}; expected a picture's name") from None
