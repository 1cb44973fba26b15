"""Groups of devices as the compiled text writes them, on meshes and tori made for the test."""

import pytest
from torus import torus_mesh

from mmgem_jax.chips import CHIPS
from mmgem_jax.preflight import groups

FORMS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}, use": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "replica_groups=[2,4]<=[8], dim": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "replica_groups=[4,2]<=[2,4]T(1,0), dim": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups=mesh['a'=2,'b'=4] {'a'}, dim": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups=mesh['a'=2,'b'=4] {'b'}, dim": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dim": [
        *([0, 1, 2, 3], [4, 5, 6, 7])
    ],
    "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, dim": [[0, 1, 4, 5], [2, 3, 6, 7]],
    "source_target_pairs={{0,1},{1,0}}, use": [[0, 1], [1, 0]],
}


@pytest.mark.parametrize("text", FORMS)
def test_every_form_of_groups(text):
    assert groups.device_groups(f"channel_id=7, {text}").tolist() == FORMS[text]


@pytest.mark.parametrize("text", ["channel_id=7, use", "replica_groups={}, use"])
def test_no_groups_are_all_devices(text):
    assert groups.device_groups(text) is None


def test_groups_have_the_axes_along_which_they_differ():
    mesh = torus_mesh((4, 4), (2, 2, 4), ("data", "fsdp", "tensor"))
    assert groups.mesh_axes_of([0, 1, 2, 3], mesh) == ("tensor",)
    assert groups.mesh_axes_of([0, 4], mesh) == ("fsdp",)
    assert groups.mesh_axes_of([1, 9], mesh) == ("data",)
    assert groups.mesh_axes_of(range(16), mesh) == ("data", "fsdp", "tensor")


def test_slices_are_known_by_their_axis():
    mesh = torus_mesh((2, 2), (2, 4), ("slice", "data"), slices=2)
    assert groups.slice_axes(mesh) == ("slice",)
    assert groups.slices_of([0, 1], mesh) == 1 and groups.slices_of([0, 4], mesh) == 2
    one = torus_mesh((2, 2), (1, 4), ("slice", "data"))
    assert groups.slice_axes(one) == ()


def links(torus, shape, group, chip="v5e"):
    """The bandwidth of a group, in links of the chip."""
    mesh = torus_mesh(torus, shape, tuple("abc"[: len(shape)]))
    return groups.ring_bandwidth(group, mesh, CHIPS[chip]) / CHIPS[chip].link_bandwidth


def test_a_whole_axis_is_a_ring_of_two_links_and_a_part_a_line_of_one():
    assert links((16, 16), (16, 16), range(16)) == 2
    assert links((8, 16), (8, 16), range(0, 128, 16)) == 1
    assert links((16, 16), (32, 8), range(8)) == 1
    assert links((8, 8, 4), (64, 4), range(4), "v5p") == 2


def test_a_group_over_several_axes_has_the_links_of_all():
    assert links((16, 16), (256,), range(256)) == 4
    assert links((4, 4, 4), (64,), range(64), "v5p") == 6


def test_groups_that_lie_between_one_another_share_the_links():
    # Every fourth chip of a ring of sixteen: four such groups on each link.
    assert links((16, 16), (64, 4), range(0, 16, 4)) == pytest.approx(2 / 4)
