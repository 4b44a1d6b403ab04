"""What of experiments/onebit_network needs no root: the plan of a network, and what is read from /proc."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[3] / "experiments" / "onebit_network"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"onebit_network_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


network, machine = load("network"), load("machine")


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_plan_joins_every_process_and_names_only_what_is_its_own(size):
    plan = network.Plan("dsjax123", size)
    commands = [" ".join(words) for words in plan.commands()]
    added = [line.split()[-1] for line in commands if line.startswith("netns add")]
    assert added == plan.namespaces and all(name.startswith("dsjax123-") for name in added)
    assert len({plan.address(rank) for rank in range(size)}) == size
    cables = [line for line in commands if "type veth" in line]
    assert len(cables) == (1 if size == 2 else size)
    for rank in range(size):
        # Every interface lies in a namespace from the start: the machine's own network never sees it.
        assert sum(f"eth0 netns dsjax123-{rank} " in f"{line} " for line in cables) == 1
        assert f"-n dsjax123-{rank} addr add {plan.address(rank)}/24 dev eth0" in commands
        assert plan.hosts(rank, "box").splitlines()[1] == f"{plan.address(rank)} box"


def test_a_network_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2 processes"):
        network.Network(1)


def test_counters():
    text = """Inter-|   Receive                            |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo:    5    1    0    0    0     0          0         0     5      1    0    0    0     0       0          0
  eth0: 4000000000  7    0    0    0     0          0         0  1234      9    0    0    0     0       0          0
"""
    after = network.parse_counters(text, "eth0")
    assert after == network.Counters(sent=1234, received=4_000_000_000)
    assert after - network.Counters(200, 1) == network.Counters(1034, 3_999_999_999)
    with pytest.raises(ValueError, match="no interface eth1"):
        network.parse_counters(text, "eth1")


def test_others_are_counted_by_process():
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    ours, others = machine.ticks()
    sum(range(3_000_000))
    ours_later, others_later = machine.ticks()
    assert ours_later > ours and others_later >= 0 <= others
