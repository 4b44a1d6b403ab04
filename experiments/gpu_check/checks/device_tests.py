"""tests/gpu, by pytest in a process of its own; a rehearsal only collects them."""

import collections
import re
import subprocess
import sys

from item import Context, Outcome

RESULT = re.compile(r"^(tests/gpu/\S+) (PASSED|FAILED|ERROR|SKIPPED)")
COLLECTED = re.compile(r"^=* ?(\d+) tests? collected")
COMMAND = (
    "-m", "pytest", "tests/gpu", "--confcutdir=tests/gpu", "-vv", "--tb=short", "-p", "no:cacheprovider",
    # Warnings of packages that are not ours to choose here are no reason to fail.
    "-W", "default",
)  # fmt: skip


def run(context: Context) -> Outcome:
    """Passed and failed so far are noted after each test."""
    command = [sys.executable, *COMMAND, *(["--collect-only"] if context.rehearse else [])]
    counts: collections.Counter[str] = collections.Counter()
    failed, collected = [], 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := RESULT.match(line):
                counts[found[2].lower()] += 1
                failed += [found[1]] if found[2] in ("FAILED", "ERROR") else []
                context.note(counts=counts, failed=failed)
            elif found := COLLECTED.match(line):
                collected = int(found[1])
    if context.rehearse:
        context.note(collected=collected)
        return Outcome(ours=f"{collected} collected, none run", passed=process.returncode == 0 and collected > 0)
    ours = ", ".join(f"{count} {word}" for word, count in counts.items()) or f"pytest: exit code {process.returncode}"
    return Outcome(ours=ours, passed=process.returncode == 0 and set(counts) == {"passed"})
