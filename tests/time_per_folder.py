"""Time of the tests by folder, and of the whole beside its budget, at the end of pytest's output."""

import collections
import time

import pytest

BUDGETS = {"not slow": 10, "slow": 15}
"""Minutes on two cores, of the tiers `make test` and `make test-slow`: CONTRIBUTING.md says what lies in which."""


def folder_of(test: str) -> str:
    """The folder under which a test's time is counted: that of its room.

    Example:
        >>> folder_of("tests/unit/data/rows/test_pack.py::test_it"), folder_of("dsjax/mesh/build.py::dsjax.mesh")
        ('tests/unit/data', 'dsjax')
        >>> folder_of("tests/e2e/test_lora.py::test_it"), folder_of("tests/unit/test_docs.py::test_it")
        ('tests/e2e', 'tests/unit')
    """
    parts = test.partition("::")[0].split("/")[:-1]
    return "/".join(parts[: 1 if parts[0] != "tests" else 3])


class TimePerFolder:
    """Counts the seconds of all reports; with pytest-xdist these come from the workers."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds: collections.Counter[str] = collections.Counter()
        self.tests: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        folder = folder_of(report.nodeid)
        self.seconds[folder] += report.duration
        self.tests[folder] += report.when == "call"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        terminalreporter.section("time per folder, of all processes together")
        for folder, seconds in self.seconds.most_common():
            terminalreporter.line(f"{seconds:7.1f} s {self.tests[folder]:5} tests  {folder}")
        minutes = (time.monotonic() - self.began) / 60
        line = f"{self.seconds.total():7.1f} s {self.tests.total():5} tests  in {minutes:.1f} minutes"
        if budget := BUDGETS.get(config.option.markexpr):
            line += f"; the budget of this tier is {budget} on two cores"
        terminalreporter.line(line)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # not in a process of pytest-xdist, which reports to this one
        config.pluginmanager.register(TimePerFolder(), "time_per_folder_counts")
