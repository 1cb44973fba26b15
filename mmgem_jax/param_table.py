"""Every parameter on one line: what it is, how the mesh splits it, what a chip holds of it."""

import jax
import numpy as np

from mmgem_jax import sharding

HEADER = ("parameter", "shape", "dtype", "axes", "split over", "KiB a chip")


def param_table(boxed_params, mesh):
    """The table as text, with a line of totals.

    Args:
      boxed_params: parameters, or their shapes, that carry their logical axis names (Linen's boxes,
        as `objective.init_params` makes them).
      mesh: the mesh; an abstract one will do.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    shardings = sharding.param_shardings(boxed_params, mesh)
    is_box = lambda x: hasattr(x, "names")  # noqa: E731
    boxes = jax.tree_util.tree_leaves_with_path(boxed_params, is_leaf=is_box)
    rows, count, held, whole = [HEADER], 0, 0, 0
    for (path, box), split in zip(boxes, jax.tree.leaves(shardings), strict=True):
        value = box.value
        own = int(np.prod(split.shard_shape(value.shape))) * value.dtype.itemsize
        count, held, whole = (
            count + value.size,
            held + own,
            whole + value.size * value.dtype.itemsize,
        )
        rows.append(
            (
                sharding.path_name(path),
                " x ".join(map(str, value.shape)) or "scalar",
                str(value.dtype),
                " x ".join(map(str, box.names)) or "-",
                split_text(split.spec, mesh),
                f"{own / 2**10:,.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [aligned(row, widths) for row in rows]
    total = f"{count:,} parameters; a chip holds {held / 2**20:,.1f} of {whole / 2**20:,.1f} MiB"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", total])


def split_text(spec, mesh):
    """The mesh axes that split each axis of an array, with their sizes; `-` where none does."""

    def one(entry):
        axes = () if entry is None else tuple(np.atleast_1d(entry))
        return "+".join(f"{axis} {mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)

    entries = [one(entry) for entry in spec]
    return " x ".join(entry or "-" for entry in entries) if any(entries) else "-"


def aligned(row, widths):
    """The cells of a row under their heads; the last, a number, to the right."""
    cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
    return "  ".join([*cells, row[-1].rjust(widths[-1])])
