"""What a training step sends, by kind, axis and bytes, counted from the compiled programs on the named meshes.

Bytes are those of one device and one step, and every one is accounted for. P: bytes of all parameters; L: of the
layers' part of them; M: of the layers' matrices; E: of the embedding; X: of one activation [b, T, D] on one device; S:
of [b, T] figures. XLA:CPU writes a reduce-scatter as an all-reduce of the whole and a slice, so gradients that go
straight into their shards count with their full size.
"""

import collections
import dataclasses

import pytest

from dsjax.collectives.hlo import Collective, count_collectives
from tests.helpers import LTD, LTD_COUNTS, MESHES, TINY, Training, make_params, make_training

SIZES = {name: value.nbytes for name, value in make_params(TINY).items()}
P = sum(SIZES.values())
L = sum(size for name, size in SIZES.items() if name.startswith("layers"))
M = sum(size for name, size in SIZES.items() if name.startswith("layers") and name.endswith("kernel"))
E = SIZES["embed.table"]
# With tensor 2: matrices, the embedding and the biases of split outputs are halved.
HALVED = M + E + sum(size for name, size in SIZES.items() if name.endswith(("qkv.bias", "up.bias")))
X = 16 * 16 * TINY.model_dim * 4
S = 16 * 16 * 4
FLOAT = 4
"""Figures of a step: the loss, the number of tokens, and one partial sum of each."""


def counted(training: Training, text: str) -> list[Collective]:
    return count_collectives(text, dict(training.layout.mesh.shape))


def totals(collectives: list[Collective]) -> dict[str, int]:
    found: collections.Counter[str] = collections.Counter()
    for one in collectives:
        found[f"{one.kind} {'+'.join(one.axes)}"] += one.total_bytes
    return dict(found)


def in_fsdp(parts: int, *, gathered: int, layers: int, matrices: int, table: int) -> tuple[int, int]:
    """ZeRO-3: bytes gathered and bytes reduced in a step of so many accumulated parts.

    What lies outside the loop over layers is gathered once. Layers are gathered in the forward pass and their matrices
    again in the backward pass. Gradients are reduced once, the tied table's twice: for the look-up and for the logits.
    """
    return (gathered - layers) + parts * (layers + matrices), parts * (gathered + table + FLOAT) + FLOAT


GATHERED, REDUCED = in_fsdp(2, gathered=P, layers=L, matrices=M, table=E)
HALF = HALVED // 2
HALF_GATHERED, HALF_REDUCED = in_fsdp(2, gathered=P - HALF, layers=L - (HALF - E // 2), matrices=M // 2, table=E // 2)
GRADIENT = {
    # One all-reduce of the gradients, whatever happens before it.
    "data": {"all-reduce data": P + 2 * FLOAT},
    "fsdp": {"all-gather fsdp": GATHERED, "all-reduce fsdp": REDUCED},
    # Activations: the look-up, two sums a layer in each direction, the logits' gradient; and three figures a position.
    "tensor": {"all-reduce tensor": (2 + 2 * 2 * 2) * X + 3 * S},
    # ZeRO-2 leaves a quarter of each gradient to be summed over data.
    "expert": {"all-reduce fsdp+expert": REDUCED, "all-reduce data": P // 4 + 2 * FLOAT},
    "zero1": {"all-reduce fsdp": REDUCED, "all-reduce data": P + 2 * FLOAT},
    "all": {
        "all-gather fsdp": HALF_GATHERED,
        "all-reduce fsdp": HALF_REDUCED,
        "all-reduce tensor": ((2 + 2 * 2 * 2) * X + 3 * S) // 4,
        "all-reduce data": (P - HALF) // 2 + 2 * FLOAT,
    },
}
# Norms are sums over shards, one figure per tensor (of a stack per layer); changed parameters are gathered once.
UPDATE = {
    "data": {},
    "fsdp": {"all-reduce fsdp": 29 * FLOAT},
    "tensor": {"all-reduce tensor": 13 * FLOAT},
    "expert": {"all-reduce fsdp+expert": 29 * FLOAT, "all-gather fsdp+expert": P},
    "zero1": {"all-gather fsdp": P},
    "all": {"all-reduce fsdp": 16 * FLOAT, "all-reduce fsdp+tensor": 13 * FLOAT},
}


@pytest.mark.parametrize("mesh_name", MESHES)
def test_the_gradient_sends_what_is_accounted_for(mesh_name):
    training = make_training(MESHES[mesh_name])
    assert totals(counted(training, training.gradient_text(accumulation=2))) == GRADIENT[mesh_name]


def test_dropping_tokens_sends_nothing_more():
    """Nothing is exchanged to gather and scatter tokens; the sums over `tensor` in both layers are of half as many."""
    training = make_training(MESHES["all"], TINY, random_ltd=LTD)
    found = totals(counted(training, training.gradient_text(accumulation=2, num_kept=8, counts=LTD_COUNTS)))
    assert found == GRADIENT["all"] | {"all-reduce tensor": ((2 + 2 * 2 * 2 // 2) * X + 3 * S) // 4}


@pytest.mark.parametrize("mesh_name", MESHES)
def test_the_update_sends_what_is_accounted_for(mesh_name):
    training = make_training(MESHES[mesh_name])
    assert totals(counted(training, training.update_text())) == UPDATE[mesh_name]


@pytest.mark.parametrize("mesh_name", ["zero1", "expert", "all"])
def test_bytes_on_data_do_not_depend_on_accumulation(mesh_name):
    training = make_training(MESHES[mesh_name])
    limit = {"zero1": (1, 2), "expert": (1, 2), "all": (1, 2, 4)}[mesh_name]
    found = {}
    for parts in limit:
        collectives = counted(training, training.gradient_text(accumulation=parts))
        found[parts] = sorted((c.kind, c.axes, c.bytes, c.count) for c in collectives if "data" in c.axes)
    assert all(one == found[1] for one in found.values())
    assert all(axes == ("data",) and count == 1 for _, axes, _, count in found[1])


@pytest.mark.parametrize("mesh_name", ["data", "all"])
def test_per_worker_gradients_send_only_scalars_over_data(mesh_name):
    training = make_training(MESHES[mesh_name], per_worker=True)
    collectives = counted(training, training.gradient_text(accumulation=2))
    assert sum(c.total_bytes for c in collectives if "data" in c.axes) == 2 * FLOAT


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_a_stack_with_single_layers_sends_no_more(remat):
    """The default segments (1, 2, 1) with attention dropout: the same kinds on the same axes, nothing permuted."""
    config = dataclasses.replace(TINY, num_layers=4, segments=(), attention_dropout=0.1, remat=remat)
    training = make_training(MESHES["all"], config)
    found = totals(counted(training, training.gradient_text()))
    assert found.keys() == GRADIENT["all"].keys()
    layer_sums = 4 * 4 + (2 * 2 if remat == "full" else 0)
    assert found["all-reduce tensor"] <= ((2 + layer_sums) * X + 3 * S) // 4
