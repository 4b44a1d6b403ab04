"""Collectives counted from the text of compiled programs, against counts made by hand."""

import re

import hlo_programs
import jax
import pytest
from hlo_programs import AXIS_SIZES, FIXTURES, PROGRAMS

from dsjax.collectives.hlo import Collective, count_collectives, table, total_bytes

FD, FT = ("fsdp",), ("tensor",)


def counted(text: str, axis_sizes: dict[str, int] = AXIS_SIZES) -> list[tuple[str, tuple[str, ...], int, int]]:
    return [(c.kind, c.axes, c.bytes, c.count) for c in count_collectives(text, axis_sizes)]


def fixture(name: str) -> str:
    return (FIXTURES / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", [name for name, (_, expected) in PROGRAMS.items() if expected is not None])
@pytest.mark.parametrize("live", [False, True], ids=["recorded", "compiled_now"])
def test_known_programs(name: str, live: bool) -> None:
    function, expected = PROGRAMS[name]
    if live and jax.device_count() != 8:
        pytest.skip("needs 8 devices")
    text = hlo_programs.compiled_text(function) if live else fixture(f"cpu_{name}")
    assert counted(text) == expected


def test_without_recorded_trip_counts_they_are_worked_out() -> None:
    for name in ("cpu_scan", "cpu_nested_scan", "cpu_gradient"):
        text = fixture(name)
        without = re.sub(r',"known_trip_count":\{"n":"\d+"\}', "", text)
        assert without != text
        assert counted(without) == counted(text)


def test_gradient_of_a_sharded_model() -> None:
    """A GPT-like gradient: 3 layers, 3 accumulation steps, D 16, F 64, V 64, rows split over fsdp, ZeRO-3."""
    collectives = count_collectives(fixture("cpu_gradient"), AXIS_SIZES)
    # Over data only the mean of the gradient shards E [16,16], W1 and W2 [3,16,16], and the loss, once.
    assert total_bytes(collectives, axis="data") == 4 * (16 * 16 + 2 * 3 * 16 * 16 + 1)
    # Weights [16,32]: 2 per layer, forward and again for the backward, 3 layers, 3 steps; E [32,16] is hoisted out.
    gathers = [c for c in collectives if (c.kind, c.axes, c.bytes) == ("all-gather", FD, 16 * 32 * 4)]
    in_layers = sum(c.count for c in gathers if c.count == 3 * 3)
    assert in_layers == 2 * 2 * 3 * 3
    # Row-parallel products [2,8,16]: once forward, once backward a layer, and the embedding's once a step.
    products = sum(c.count for c in collectives if (c.kind, c.axes, c.bytes) == ("all-reduce", FT, 1024))
    assert products == 2 * 3 * 3 + 3
    assert total_bytes(collectives) == sum(row[-1] for row in table(collectives))


def test_asynchronous_pairs_as_gpus_print_them() -> None:
    assert counted(fixture("gpu_async")) == [
        ("all-gather", FT, 8 * 16 * 2, 1),
        ("all-gather", FD, 16 * 16 * 4 + 8 * 16 * 2, 1),
        ("all-reduce", ("data",), 8 * 16 * 4, 1),
        ("all-reduce", ("data", "fsdp", "tensor"), 8 * 16 * 4 + 4, 1),
        ("all-reduce", FD, 8 * 16 * 4, 1),
        ("collective-permute", ("data",), 4 * 16 * 2, 1),
        ("reduce-scatter", ("fsdp", "tensor"), 8 * 16 * 4, 1),
        ("reduce-scatter", FT, 8 * 16 * 4, 1),
        ("all-to-all", ("data",), 4 * 16 * 2, 1),
    ]
    first, second = count_collectives(fixture("gpu_async"), AXIS_SIZES)[:2]
    assert (first.dtype, first.op_name, second.dtype) == ("bf16", "jit(step)/gather", "f32+bf16")


def test_forms_of_groups_and_shapes() -> None:
    found = {c.name: (c.axes, c.bytes) for c in count_collectives(fixture("forms"), AXIS_SIZES)}
    everything = ("data", "fsdp", "tensor")
    assert found == {
        "all": (everything, 16),
        "lists": (FD, 16),
        "unordered": (("data",), 16),
        "iota": (("fsdp", "tensor"), 16),
        # [2,2,2]T(1,0,2): the first group is data and tensor at fsdp 0
        "iota_transposed": (("data", "tensor"), 16),
        "mesh_reversed": (("data", "tensor"), 16),
        "mesh_other_names": (("fsdp", "tensor"), 16),
        "mesh_part_of_axis": (FD, 16),
        "mesh_first_part": (("data",), 16),
        # devices 0 4 1 5 2 6 3 7 in rows of 2
        "mesh_iota_devices": (("data",), 16),
        # devices in rows 0 2, 1 3, 4 6, 5 7
        "mesh_listed_devices": (FD, 16),
        "packed": (FT, 3),
        "unpacked": (FT, 6),
        "eight_bit": (FT, 16),
        "truth": (FT, 6),
        "bounded": (FT, 64),
        "many": (FT, 8 + 3 + 4 + 4 + 4 + 8),
        "ragged": (FT, 128),
        "ring": (("data", "fsdp"), 16),
        # operand: 4 devices times (2 + 1) floats
        "scatter": (("fsdp", "tensor"), 48),
        "named": (FT, 16),
    }


def test_calls_loops_and_branches() -> None:
    """i = 1; while 10 >= i: i += 3 runs 4 times and asks 5 times; of two branches the larger counts."""
    found = {c.name: c.count for c in count_collectives(fixture("calls"), {"data": 2})}
    in_loop, called, in_larger_branch = 4, 1, 1
    assert found == {"ar.asked": 5, "ar.shared": in_loop + called + in_larger_branch, "ag.large": 1}


LOOP = fixture("calls")


@pytest.mark.parametrize(
    ("old", "new", "times"),
    [
        ("direction=GE", "direction=GT", 3),  # 10 > i: 1, 4, 7
        ("constant(10)", "constant(0)", 0),
        ("constant(3)", "constant(1)", 10),
        ("compare(%b, %a), direction=GE", "compare(%a, %b), direction=LT", 3),
        ("compare(%b, %a), direction=GE", "compare(%a, %b), direction=LE", 4),
    ],
)
def test_trip_counts(old: str, new: str, times: int) -> None:
    assert old in LOOP
    found = {c.name: c.count for c in count_collectives(LOOP.replace(old, new), {"data": 2})}
    assert found == {"ar.asked": times + 1, "ar.shared": times + 2, "ag.large": 1}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=GE", "direction=NE"),
        ("constant(3)", "constant(-1)"),
        ("s32[] constant(10)", "s32[] get-tuple-element(%loop), index=1"),
        ("copy(%first)", "negate(%first)"),
        ("add(%three, %counter.1)", "multiply(%three, %counter.1)"),
        ("add(%three, %counter.1)", "add(%three, %three)"),
        ("(f32[4]{0}, s32[]) tuple(%p.3, %first.copy)", "(f32[4]{0}, s32[]) opt-barrier(%p.3)"),
    ],
)
def test_a_loop_that_cannot_be_read_is_named(old: str, new: str) -> None:
    assert old in LOOP
    with pytest.raises(ValueError, match=r"while.*how often this loop runs cannot be read.*ar\.asked, ar\.shared"):
        count_collectives(LOOP.replace(old, new), {"data": 2})


def test_a_real_loop_that_depends_on_its_data_is_named() -> None:
    with pytest.raises(ValueError, match=r"while\.\d+ .*how often this loop runs cannot be read"):
        count_collectives(fixture("cpu_while"), AXIS_SIZES)


FORMS = fixture("forms")
ONE = "replica_groups={{0,2},{1,3},{4,6},{5,7}}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (ONE, "replica_groups={{0,2},{1,3},{4,6},{5}}", "lists.*do not hold each of the 8 devices"),
        (ONE, "replica_groups={{0,2},{1,3}}", "lists.*do not hold each of the 8 devices"),
        (ONE, "replica_groups={{0,3},{1,2},{4,7},{5,6}}", "lists.*not those of a set of axes"),
        (ONE, "replica_groups={{0,1},{2,3},{4,6},{5,7}}", "lists.*not those of a set of axes"),
        (ONE, "replica_groups={{0,1,2},{3,4,5},{6,7}}", "lists.*not those of a set of axes"),
        (ONE, "replica_groups=[4,2]<=[2,4]T(1,0)@x", "lists.*unknown form"),
        (ONE, "replica_groups=everyone", "lists.*unknown form"),
        (ONE, "to_all=true", "lists.*no replica_groups"),
        ("channel_id=2, ", "", "lists.*of replicas"),
        ("{'axis_0':(2)2}", "{'axis_0':(3)2}", "mesh_part_of_axis.*does not divide"),
        ("{'axis_0':(2)2}", "{'axis_9'}", "mesh_part_of_axis.*cannot be read"),
        ("mesh['axis_0'=8] {'axis_0':(2)2}", "mesh['a'=3,'b'=3] {'b'}", "mesh_part_of_axis.*do not hold each"),
        ("s4[2,3]{1,0:E(4)}", "q4[2,3]{1,0}", "packed.*unknown shape"),
        ("{{0,2},{2,4},{4,6},{6,0}}", "{{0,2},{2,9}}", r"ring.*devices \[9\]"),
        ("{{0,2},{2,4},{4,6},{6,0}}", "ring(8)", "ring.*source_target_pairs"),
        ("f32[4]{0} collective-permute(%p), channel_id=22", "f32[4]{0} all-shuffle(%p), channel_id=22", "all-shuffle"),
        ("f32[4]{0} collective-permute(%p), channel_id=22", "f32[4]{0} send(%p), channel_id=22", "still.*send"),
        ("f32[4]{0} collective-permute(%p), channel_id=22", "f32[4]{0} = what", "cannot read the opcode of still"),
        ("  %still = ", "  still ", "cannot read this line"),
        ("HloModule forms", "module @forms", "not HLO text"),
        (", is_scheduled=true", "", "has not been compiled"),
        ("num_partitions=8", "num_partitions=4", "for 4 devices but the mesh data=2, fsdp=2, expert=1, tensor=2 has 8"),
        ("num_partitions=8", "replica_count=2, num_partitions=4", "replicas and partitions together"),
        ('source_file="f.py"}\n}', 'source_file="f.py"}\n', "not closed"),
        ("ENTRY ", "", "no ENTRY"),
    ],
)
def test_what_cannot_be_read_raises(old: str, new: str, message: str) -> None:
    assert old in FORMS
    with pytest.raises(ValueError, match=message):
        count_collectives(FORMS.replace(old, new, 1), AXIS_SIZES)


def test_a_collective_where_its_executions_are_unknown_raises() -> None:
    text = LOOP.replace("f32[4]{0} call(%p.3), to_apply=%shared", "f32[4]{0} map(%p.3), to_apply=%shared")
    with pytest.raises(ValueError, match=r"call\.main: how often a map runs"):
        count_collectives(text, {"data": 2})
    with pytest.raises(ValueError, match="calls computation gone"):
        count_collectives(LOOP.replace("to_apply=%shared", "to_apply=%gone"), {"data": 2})
    with pytest.raises(ValueError, match="several programs"):
        count_collectives(LOOP + LOOP, {"data": 2})


def test_summaries() -> None:
    collectives = [
        Collective("all-reduce", ("data",), 100, 2, "f32", "a", ""),
        Collective("all-reduce", ("data",), 100, 3, "f32", "b", ""),
        Collective("all-gather", ("data", "fsdp"), 1000, 1, "bf16", "c", ""),
    ]
    assert total_bytes(collectives) == 1500
    assert total_bytes(collectives, axis="data", kind="all-reduce") == 500
    assert total_bytes(collectives, axis="fsdp") == 1000
    assert table(collectives) == [
        ("all-gather", "data+fsdp", "bf16", 1, 1000, 1000),
        ("all-reduce", "data", "f32", 5, 100, 500),
    ]
    with pytest.raises(ValueError, match="unknown kind of collective 'allreduce'"):
        total_bytes(collectives, kind="allreduce")


def test_control_predecessors_are_instructions_not_calls() -> None:
    """Seen in a gradient with dropout: `copy(...), control-predecessors={%copy.983}`."""
    text = fixture("cpu_gradient")
    ordered = re.sub(r"( copy\([^)]*\))", r"\1, control-predecessors={%bitcast.5}", text)
    assert ordered != text
    assert counted(ordered) == counted(text)
