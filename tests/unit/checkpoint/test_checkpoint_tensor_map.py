"""TensorMap: there and back, and everything that does not fit in one message."""

import numpy as np
import pytest

from dsjax.checkpoint.safetensors_folder import (
    TRANSPOSE,
    Entry,
    Transform,
    open_folder,
    read_tree,
    write_folder,
    write_tree,
)
from dsjax.checkpoint.tensor_map import Unread

# BLOOM's fused projection interleaves q, k, v by head: [heads, 3, size, in]; ours is [in, 3, heads, size].
HEADS, SIZE, WIDTH = 2, 3, 6
QKV = Transform(
    lambda theirs: theirs.reshape(HEADS, 3, SIZE, WIDTH).transpose(3, 1, 0, 2),
    lambda ours: ours.transpose(2, 1, 3, 0).reshape(3 * HEADS * SIZE, WIDTH),
)
ENTRIES = (
    Entry(("embedding", "table"), "wte.weight"),
    Entry(("layers", "{i}", "qkv"), "h.{i}.qkv.weight", QKV),
    Entry(("layers", "{i}", "up"), "h.{i}.up.weight", TRANSPOSE),
    Entry(("layers", "{i}", "bias"), "h.{i}.up.bias", optional=True),
    Entry(("head",), "lm_head.weight", prefixed=False),
)
SHAPES = {("embedding", "table"): (10, WIDTH), ("head",): (WIDTH, 10)} | {
    ("layers", str(i), name): shape
    for i in range(2)
    for name, shape in {"qkv": (WIDTH, 3, HEADS, SIZE), "up": (WIDTH, 8), "bias": (8,)}.items()
}


def make_flat():
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_there_and_back(tmp_path, prefix):
    flat = make_flat()
    pairs = write_tree(flat, ENTRIES, num_layers=2, prefix=prefix)
    write_folder(tmp_path / "model", pairs, config={}, max_shard_bytes=300)
    folder = open_folder(tmp_path / "model")
    assert "lm_head.weight" in folder.names() and f"{prefix}h.1.up.weight" in folder.names()
    assert folder.shape(f"{prefix}h.1.up.weight") == (8, WIDTH)
    theirs = folder.read(f"{prefix}h.0.qkv.weight")
    head, which, k, column = 1, 2, 0, 4  # one element, followed by hand
    row = head * 3 * SIZE + which * SIZE + k
    assert theirs[row, column] == flat["layers", "0", "qkv"][column, which, head, k]
    back = read_tree(folder, ENTRIES, SHAPES, num_layers=2)
    assert back.keys() == flat.keys()
    for path, array in flat.items():
        np.testing.assert_array_equal(back[path], array)


def test_optional_tensors_and_ignored_buffers(tmp_path):
    flat = {path: array for path, array in make_flat().items() if path[-1] != "bias"}
    pairs = [*write_tree(flat, ENTRIES, num_layers=2, prefix="transformer.")]
    pairs += [("transformer.h.0.attn.masked_bias", np.ones(1)), ("score", np.ones(1))]
    write_folder(tmp_path / "model", pairs, config={})
    unread = (Unread(r"h\.\d+\.attn\.(masked_)?bias", holds=lambda array: bool((array == 1).all())), Unread("score"))
    back = read_tree(open_folder(tmp_path / "model"), ENTRIES, SHAPES, num_layers=2, unread=unread)
    assert back.keys() == flat.keys()
    back.check_unread()


def test_what_is_passed_over_says_what_is_used(tmp_path):
    pairs = dict(write_tree(make_flat(), ENTRIES, num_layers=2, prefix="transformer."))
    rules = (Unread("copy", same_as="wte.weight"), Unread("ones", holds=lambda array: bool((array == 1).all())))
    for number, (head, ones, said) in enumerate(
        [
            (pairs["transformer.wte.weight"], np.ones(3), ""),
            (pairs["transformer.wte.weight"] + 1, np.ones(3), "copy is to be the same as transformer.wte.weight"),
            (pairs["transformer.wte.weight"][1:], np.ones(3), "copy is to be the same as transformer.wte.weight"),
            (pairs["transformer.wte.weight"], np.zeros(3), "ones does not hold the values that this model"),
        ]
    ):
        folder = tmp_path / f"{number}"
        write_folder(folder, {**pairs, "copy": head, "ones": ones}, config={})
        tree = read_tree(open_folder(folder), ENTRIES, SHAPES, num_layers=2, unread=rules)
        if not said:
            tree.check_unread()
            continue
        with pytest.raises(ValueError, match=said):
            tree.check_unread()


def test_older_names_are_read_where_the_newer_are_absent(tmp_path):
    entries = [Entry(("norm", "scale"), "norm.weight", others=("norm.gamma", "norm.g"))]
    for number, (names, found) in enumerate(
        [(["norm.g"], "norm.g"), (["norm.gamma"], "norm.gamma"), (["norm.weight"], "norm.weight"), (["a"], "")]
    ):
        write_folder(tmp_path / f"{number}", {name: np.ones(2) for name in names}, config={})
        read = lambda number=number: read_tree(
            open_folder(tmp_path / f"{number}"), entries, {("norm", "scale"): (2,)}, num_layers=0
        )
        if found:
            assert read().found["norm", "scale"][0] == found
        else:
            with pytest.raises(ValueError, match=r"missing: norm.weight \[2\]\n.*extra: a \[2\]"):
                read()
    write_folder(tmp_path / "both", {"norm.weight": np.ones(2), "norm.gamma": np.ones(2)}, config={})
    with pytest.raises(ValueError, match=r"extra: norm.gamma"):
        read_tree(open_folder(tmp_path / "both"), entries, {("norm", "scale"): (2,)}, num_layers=0)


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path):
    pairs = dict(write_tree(make_flat(), ENTRIES, num_layers=2))
    pairs["h.0.up.weight"] = np.ones((9, WIDTH))
    pairs["h.1.qkv.weight"] = np.ones((17, WIDTH))  # 17 rows cannot even be cut into heads
    pairs["h.2.up.weight"] = np.ones((8, WIDTH))
    del pairs["wte.weight"]
    del pairs["h.1.up.bias"]  # optional
    write_folder(tmp_path / "model", pairs, config={})
    with pytest.raises(ValueError) as caught:
        read_tree(open_folder(tmp_path / "model"), ENTRIES, SHAPES, num_layers=2)
    first, *lines = str(caught.value).splitlines()
    assert "does not fit the model (4 tensors)" in first
    assert sorted(line.strip() for line in lines) == [
        "extra: h.2.up.weight [8, 6]",
        "misshapen: h.0.up.weight [9, 6]: the model needs [6, 8] as layers/{i}/up",
        "misshapen: h.1.qkv.weight [17, 6]: the model needs [6, 3, 2, 3] as layers/{i}/qkv",
        "missing: wte.weight [10, 6]",
    ]


def test_writing_says_what_lacks(tmp_path):
    flat = make_flat() | {("layers", "2", "up"): np.ones(1), ("extra",): np.ones(1)}
    del flat["head",]
    with pytest.raises(
        ValueError, match=r"3 tensors(.|\n)*missing: head(.|\n)*layers/2/up(.|\n)*not in the map: extra"
    ):
        write_tree(flat, ENTRIES, num_layers=2)
    with pytest.raises(ValueError, match="must be in both or in neither"):
        Entry(("layers", "{i}"), "h.weight")
