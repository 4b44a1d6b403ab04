"""Any set of axes of any mesh, printed in each of XLA's three forms, is read back."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.collectives.hlo_groups import axes_of_groups, axes_of_pairs, parse_groups

NAMES = ("data", "fsdp", "expert", "tensor")


@st.composite
def meshes(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    chosen = draw(st.sets(st.integers(0, len(sizes) - 1)))
    return tuple(zip(NAMES, sizes, strict=False)), sorted(chosen)


def brute_force(axis_sizes, chosen) -> list[list[int]]:
    """Devices are in one group when they agree on every axis that is not chosen."""
    places = list(itertools.product(*(range(size) for _, size in axis_sizes)))
    groups: dict[tuple, list[int]] = {}
    for device, place in enumerate(places):
        key = tuple(x for axis, x in enumerate(place) if axis not in chosen)
        groups.setdefault(key, []).append(device)
    return list(groups.values())


def printed(axis_sizes, chosen, form: str) -> str:
    sizes = [size for _, size in axis_sizes]
    groups = brute_force(axis_sizes, chosen)
    if form == "lists":
        return "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"
    if form == "mesh":
        mesh = ",".join(f"'axis_{i}'={size}" for i, size in enumerate(sizes))
        return f"mesh[{mesh}] {{{','.join(f"'axis_{i}'" for i in reversed(chosen))}}}"
    order = [axis for axis in range(len(sizes)) if axis not in chosen] + chosen
    return f"[{len(groups)},{len(groups[0])}]<=[{','.join(map(str, sizes))}]T({','.join(map(str, order))})"


@settings(deadline=None, max_examples=60)
@given(meshes(), st.sampled_from(["lists", "iota", "mesh"]))
def test_every_form_gives_the_groups_and_their_axes(mesh, form: str) -> None:
    axis_sizes, chosen = mesh
    text = printed(axis_sizes, chosen, form)
    num_devices = math.prod(size for _, size in axis_sizes)
    groups = parse_groups(text, num_devices=num_devices)
    assert {frozenset(group) for group in groups} == {frozenset(group) for group in brute_force(axis_sizes, chosen)}
    spanned = tuple(axis_sizes[axis][0] for axis in chosen if axis_sizes[axis][1] > 1)
    assert axes_of_groups(text, axis_sizes) == (spanned, math.prod(axis_sizes[axis][1] for axis in chosen))


@settings(deadline=None, max_examples=60)
@given(meshes(), st.randoms(use_true_random=False))
def test_shuffled_devices_are_named_or_refused_never_misnamed(mesh, random) -> None:
    axis_sizes, chosen = mesh
    groups = brute_force(axis_sizes, chosen)
    devices = [device for group in groups for device in group]
    random.shuffle(devices)
    size = len(groups[0])
    shuffled = [devices[i : i + size] for i in range(0, len(devices), size)]
    every_set = itertools.chain.from_iterable(
        itertools.combinations(range(len(axis_sizes)), n) for n in range(len(axis_sizes) + 1)
    )
    wanted = {frozenset(group) for group in shuffled}
    spanned = {
        tuple(axis_sizes[axis][0] for axis in axes if axis_sizes[axis][1] > 1)
        for axes in every_set
        if {frozenset(group) for group in brute_force(axis_sizes, axes)} == wanted
    }
    text = "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in shuffled) + "}"
    if spanned:
        assert axes_of_groups(text, axis_sizes)[0] == spanned.pop()
        assert not spanned
    else:
        with pytest.raises(ValueError, match="not those of a set of axes"):
            axes_of_groups(text, axis_sizes)


@settings(deadline=None, max_examples=40)
@given(meshes(), st.data())
def test_pairs_span_the_axes_along_which_something_moves(mesh, data) -> None:
    axis_sizes, _ = mesh
    shape = [size for _, size in axis_sizes]
    device = st.integers(0, math.prod(shape) - 1)
    pairs = data.draw(st.lists(st.tuples(device, device), max_size=6))
    moved = [np.array(np.unravel_index(a, shape)) != np.array(np.unravel_index(b, shape)) for a, b in pairs]
    expected = tuple(name for axis, (name, _) in enumerate(axis_sizes) if any(m[axis] for m in moved))
    assert axes_of_pairs(pairs, axis_sizes) == expected
