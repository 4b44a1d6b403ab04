"""Groups of devices that communicate in a collective, and the mesh axes that they span.

XLA prints the groups of devices in three forms, all expanded here to lists of device numbers:

- lists, `{{0,1},{2,3}}`; `{}` is one group of all devices;
- iota, `[groups,size]<=[dims]T(perm)`: number the devices 0..n-1 in an array of shape dims, transpose, reshape;
- mesh, `mesh['data'=2,'tensor'=4] {'tensor'}`: one group per setting of the axes not named, `'tensor':(2)2` being the
  part of size 2 of an axis, inside a part of size 2. Partitioner and user may name the same mesh differently.

The number of a device is its row-major place in the mesh, which is how JAX numbers the partitions of a program.
"""

import functools
import itertools
import math
import re

import numpy as np

_LISTS = re.compile(r"\{\s*(?:\{\s*\d+(?:\s*,\s*\d+)*\s*\}\s*,?\s*)*\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:,\s*device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?|[\d,\s]+)\))?\s*\{([^{}]*)\}")
_AXIS_SIZE = re.compile(r"'?([^'=]+)'?=(\d+)")
_AXIS_USE = re.compile(r"'?([^':]+)'?(?::\((\d+)\)(\d+))?")


def groups_text(attributes: str) -> str:
    """The value of replica_groups among the attributes of an instruction.

    Raises:
        ValueError: no replica_groups, or a form that is not one of the three.

    Example:
        >>> groups_text("x), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}")
        '[4,2]<=[8]'
    """
    _, found, text = attributes.partition("replica_groups=")
    if not found:
        raise ValueError("it has no replica_groups")
    match = _MESH.match(text) or _IOTA.match(text) or _LISTS.match(text)
    if not match or text[match.end() :].lstrip()[:1] not in ("", ","):
        raise ValueError(f"replica_groups in an unknown form: {text[:80]}")
    return match[0]


def parse_groups(text: str, *, num_devices: int) -> list[list[int]]:
    """Groups of devices, from the value of replica_groups.

    Raises:
        ValueError: a form that is not one of the three, or a mesh axis that cannot be read.

    Example:
        >>> parse_groups("[4,2]<=[2,2,2]T(0,2,1)", num_devices=8)
        [[0, 2], [1, 3], [4, 6], [5, 7]]
        >>> parse_groups("mesh['a'=2,'b'=2] {'a'}", num_devices=4)
        [[0, 2], [1, 3]]
    """
    if match := _MESH.fullmatch(text):
        return _mesh_groups(*match.groups())
    if match := _IOTA.fullmatch(text):
        return _iota(match[2], match[3]).reshape(_integers(match[1])).tolist()
    if match := _LISTS.fullmatch(text):
        groups = [_integers(group) for group in re.findall(r"\{([\d,\s]+)\}", match[0])]
        return groups or [list(range(num_devices))]
    raise ValueError(f"replica_groups in an unknown form: {text[:80]}")


def parse_pairs(attributes: str) -> list[tuple[int, int]]:
    """(source, target) of a collective-permute.

    Raises:
        ValueError: no source_target_pairs, or an unknown form.

    Example:
        >>> parse_pairs("x), channel_id=1, source_target_pairs={{0,1},{1,0}}")
        [(0, 1), (1, 0)]
    """
    match = re.search(r"source_target_pairs=(\{(?:\s*\{\d+,\d+\}\s*,?)*\s*\})", attributes)
    if not match:
        raise ValueError("it has no source_target_pairs in the form {{0,1},{1,0}}")
    return [(int(source), int(target)) for source, target in re.findall(r"\{(\d+),(\d+)\}", match[1])]


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    shape = _integers(dims)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_integers(permutation)) if permutation else ids


def _mesh_groups(sizes_text: str, ids_text: str | None, axes_text: str) -> list[list[int]]:
    sizes = {name: int(size) for name, size in _AXIS_SIZE.findall(sizes_text)}
    # Every axis is cut into (before, used, after); a whole axis is its own middle part.
    cuts = {name: (1, 1, size) for name, size in sizes.items()}
    pieces = [piece.strip() for piece in axes_text.split(",") if piece.strip()]
    for piece in pieces:
        match = _AXIS_USE.fullmatch(piece)
        if not match or match[1] not in sizes or cuts[match[1]][1] != 1:
            raise ValueError(f"axis {piece} of the mesh form {{{axes_text}}} over mesh[{sizes_text}] cannot be read")
        size = sizes[match[1]]
        before, used = (int(match[2]), int(match[3])) if match[2] else (1, size)
        if size % (before * used):
            raise ValueError(f"{piece} does not divide the axis of size {size}")
        cuts[match[1]] = (before, used, size // (before * used))
    if ids_text is None:
        ids = np.arange(math.prod(sizes.values()))
    elif ids_text.startswith("["):
        dims, _, permutation = ids_text[1:].partition("]")
        ids = _iota(dims, permutation[2:-1] or None)
    else:
        ids = np.array(_integers(ids_text))
    parts = ids.reshape([part for cut in cuts.values() for part in cut])
    used = [3 * position + 1 for position in range(len(cuts))]
    kept = [position for position in range(parts.ndim) if position not in used]
    return parts.transpose(kept + used).reshape(-1, math.prod(cut[1] for cut in cuts.values())).tolist()


@functools.lru_cache(maxsize=4096)
def axes_of_groups(text: str, axis_sizes: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], int]:
    """Mesh axes that the groups of a collective span exactly, in mesh order, and the size of a group.

    `((), 1)` when every device is alone. Cached, because a program repeats few groups many times.

    Raises:
        ValueError: groups that are not the groups of some set of axes, or do not hold every device once.

    Example:
        >>> axes_of_groups("{{0,1},{2,3}}", (("data", 2), ("tensor", 2)))
        (('tensor',), 2)
    """
    num_devices = math.prod(size for _, size in axis_sizes)
    groups = parse_groups(text, num_devices=num_devices)
    if sorted(itertools.chain(*groups)) != list(range(num_devices)):
        raise ValueError(f"its groups do not hold each of the {num_devices} devices of the mesh once: {_short(groups)}")
    coordinates = _coordinates(axis_sizes)
    spanned = {_varying([coordinates[device] for device in group]) for group in groups}
    positions = spanned.pop()
    axes = tuple(axis_sizes[position][0] for position in positions)
    size = math.prod(axis_sizes[position][1] for position in positions)
    # Distinct devices that differ along these axes only, as many as there are: exactly those axes.
    if spanned or any(len(group) != size for group in groups):
        mesh = ", ".join(f"{name}={size}" for name, size in axis_sizes)
        raise ValueError(f"its groups are not those of a set of axes of the mesh {mesh}: {_short(groups)}")
    return axes, size


def axes_of_pairs(pairs: list[tuple[int, int]], axis_sizes: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """Mesh axes along which some source differs from its target, in mesh order; () when nothing moves.

    Raises:
        ValueError: a device that the mesh does not have.

    Example:
        >>> axes_of_pairs([(0, 1), (1, 0)], (("data", 2), ("tensor", 2)))
        ('tensor',)
    """
    num_devices = math.prod(size for _, size in axis_sizes)
    if outside := sorted({device for pair in pairs for device in pair if device >= num_devices}):
        raise ValueError(f"its pairs name devices {outside} of a mesh of {num_devices}")
    coordinates = _coordinates(axis_sizes)
    moved = {position for pair in pairs for position in _varying([coordinates[device] for device in pair])}
    return tuple(axis_sizes[position][0] for position in sorted(moved))


@functools.lru_cache(maxsize=8)
def _coordinates(axis_sizes: tuple[tuple[str, int], ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(size) for _, size in axis_sizes)))


def _varying(coordinates: list[tuple[int, ...]]) -> tuple[int, ...]:
    first = coordinates[0]
    return tuple(axis for axis in range(len(first)) if any(place[axis] != first[axis] for place in coordinates))


def _short(groups: list[list[int]]) -> str:
    text = str(groups)
    return text if len(text) < 120 else text[:117] + "..."
