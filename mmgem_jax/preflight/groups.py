"""Which devices talk to which in a collective, as the compiled text writes it."""

import math
import re

import numpy as np

from mmgem_jax.preflight.topology import slice_of, torus_shape


def device_groups(attributes):
    """The groups of a collective: int [groups, members], positions in the mesh's flat order.

    The text has three forms: `{{0,1},{2,3}}`; `[2,4]<=[8]` or `[2,4]<=[4,2]T(1,0)`, a reshaped and
    transposed range; and `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`, such a range as a
    mesh, of which the named axes are the groups. A permutation's pairs are groups of two. None
    where the text says nothing or all devices are one group.
    """
    explicit = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes)
    if explicit:
        rows = re.findall(r"\{([\d, ]+)\}", explicit[1])
        return np.array([[int(i) for i in row.split(",")] for row in rows])
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\) )?\s*\{([^}]*)\}", attributes
    )
    if mesh:
        sizes = [int(size) for size in re.findall(r"=(\d+)", mesh[1])]
        names = re.findall(r"'([^']*)'=", mesh[1])
        chosen = [names.index(name) for name in re.findall(r"'([^']*)'", mesh[3])]
        ids = iota(mesh[2] or f"[{math.prod(sizes)}]").reshape(sizes)
        kept = [axis for axis in range(len(sizes)) if axis not in chosen]
        members = math.prod(sizes[axis] for axis in chosen)
        return ids.transpose(*kept, *chosen).reshape(-1, members)
    ranged = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if ranged:
        return iota(ranged[2]).reshape([int(size) for size in ranged[1].split(",")])
    return None


def iota(text):
    """The numbers 0, 1, ... as `[4,2]T(1,0)` says: shaped, then transposed, then flat."""
    shape, _, order = text.partition("T")
    sizes = [int(size) for size in re.findall(r"\d+", shape)]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(axis) for axis in re.findall(r"\d+", order)] or None).ravel()


def mesh_axes_of(group, mesh):
    """Names of the mesh axes along which the members of a group differ, in the mesh's order."""
    places = np.unravel_index(np.asarray(group), mesh.devices.shape)
    differ = [len(set(place.tolist())) > 1 for place in places]
    return tuple(name for name, varies in zip(mesh.axis_names, differ, strict=True) if varies)


def slice_axes(mesh):
    """Names of the mesh axes along which the slice changes."""
    slices = np.vectorize(slice_of)(mesh.devices)
    return tuple(
        name for axis, name in enumerate(mesh.axis_names) if np.ptp(slices, axis=axis).any()
    )


def slices_of(group, mesh):
    """How many slices the members of a group are in."""
    return len({slice_of(mesh.devices.flat[place]) for place in group})


def ring_bandwidth(group, mesh, chip):
    """Bytes a second at which each member of a group within a slice receives in a ring.

    Over each axis of the torus that the members lie along: two links, where the axis is a ring and
    they have it to themselves; one where it is a line; and less where they are `stride` apart, for
    then as many groups share each link.
    """
    devices = [mesh.devices.flat[place] for place in group]
    whole = torus_shape(list(mesh.devices.flat))
    found = 0.0
    for axis, size in enumerate(whole):
        own = sorted({device.coords[axis] for device in devices})
        if len(own) > 1:
            stride = (own[-1] - own[0]) / (len(own) - 1)
            ring = len(own) * stride >= size and chip.wraps(size)
            found += chip.link_bandwidth * (2 if ring else 1) / stride
    return found


def torus_axes_of(group, mesh):
    """Along how many axes of the torus the members of a group differ."""
    devices = [mesh.devices.flat[place] for place in group]
    return sum(len(set(axis)) > 1 for axis in zip(*(d.coords for d in devices), strict=True))
