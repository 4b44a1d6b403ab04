"""launch/local.py with small stand-ins for `dsjax train`: real processes, real signals."""

import doctest
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[3] / "launch" / "local.py"
spec = importlib.util.spec_from_file_location("launch_local", LOCAL)
assert spec and spec.loader
local = importlib.util.module_from_spec(spec)
sys.modules["launch_local"] = local  # dataclasses look their module up
spec.loader.exec_module(local)

# Every stand-in says what it was given, one line of JSON a life, and then runs the test's own lines, which see
# `me` (its number), `life` (0, 1, ... of that process) and `folder`.
PRELUDE = '''
import json, os, signal, sys, time
from pathlib import Path
folder, me = Path(sys.argv[1]), int(os.environ["DSJAX_PROCESS_ID"])
record = folder / f"lives-{me}.jsonl"
life = len(record.read_text().splitlines()) if record.exists() else 0
environment = {k: v for k, v in os.environ.items() if k.startswith("DSJAX_")}
with record.open("a") as file:
    print(json.dumps({"pid": os.getpid(), "args": sys.argv[2:], "env": environment}), file=file, flush=True)
def on_signal(code):
    def handler(signum, frame):
        (folder / f"signal-{me}").open("a").write(f"{signum}\\n")
        if code is not None:
            os._exit(code)
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    (folder / f"ready-{me}").touch()
def wait_for_others():
    """Until every process has recorded its life: one that is ended earlier would take its next for the first."""
    records = [folder / f"lives-{i}.jsonl" for i in range(int(os.environ["DSJAX_NUM_PROCESSES"]))]
    while not all(record.exists() and record.stat().st_size for record in records):
        time.sleep(0.01)
'''

# The launcher as a program, with the stand-in in place of `python -m dsjax train`.
LAUNCHER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("launch_local", sys.argv[1])
local = sys.modules["launch_local"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(local)
local.SECONDS_TO_END = 0.5
sys.exit(local.main(sys.argv[4:], program=(sys.executable, "-S", sys.argv[2], sys.argv[3])))
"""


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_left():
    """Whatever a failed test leaves behind is ended."""
    yield
    while STARTED:
        launcher = STARTED.pop()
        if launcher.poll() is None:
            launcher.kill()
            launcher.communicate()


def start(folder: Path, body: str, *options: str) -> subprocess.Popen[str]:
    """The launcher over a stand-in that runs `body`, in a process group of its own."""
    program = folder / "stand_in.py"
    program.write_text(PRELUDE + textwrap.dedent(body))
    arguments = [str(LOCAL), str(program), str(folder), "--log-dir", str(folder / "logs"), *options]
    if "--" not in options:
        arguments += ["--", "run.yaml", "--run-dir", "here"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *arguments],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True,
    )  # fmt: skip
    STARTED.append(launcher)
    return launcher


def run(folder: Path, body: str, *options: str) -> tuple[int, str, str]:
    launcher = start(folder, body, *options)
    out, err = launcher.communicate(timeout=30)
    return launcher.returncode, out, err


def lives(folder: Path, process: int) -> list[dict]:
    path = folder / f"lives-{process}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"never appeared: {paths}"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """True when no such process runs (one that only waits to be reaped does not run)."""
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in pids if not gone(pid)]}"
        time.sleep(0.02)


def test_every_process_gets_its_number_and_one_shared_coordinator(tmp_path: Path):
    code, out, err = run(tmp_path, "print('from', me)", "--processes", "3")
    assert code == 0, err
    first = [lives(tmp_path, i)[0] for i in range(3)]
    assert [each["env"]["DSJAX_PROCESS_ID"] for each in first] == ["0", "1", "2"]
    assert {each["env"]["DSJAX_NUM_PROCESSES"] for each in first} == {"3"}
    (coordinator,) = {each["env"]["DSJAX_COORDINATOR"] for each in first}
    host, port = coordinator.split(":")
    assert host == "127.0.0.1" and 1024 <= int(port) < 65536
    assert all(each["args"] == ["run.yaml", "--run-dir", "here"] for each in first)
    assert out == "from 0\n"  # process 0 writes here, the others to their files
    assert (tmp_path / "logs" / "start-0-process-2.log").read_text() == "from 2\n"


@pytest.mark.parametrize("death", ["sys.exit(9)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_death_restarts_all_with_resume_on_a_new_port(tmp_path: Path, death: str):
    body = f"""
    if life == 0 and me == 1:
        wait_for_others()
        print("last words", flush=True)
        {death}
    if life == 0:
        time.sleep(60)
    """
    began = time.monotonic()
    code, _, err = run(tmp_path, body, "--processes", "3")
    assert code == 0, err
    assert time.monotonic() - began < 20
    for process in range(3):
        before, after = lives(tmp_path, process)
        assert after["args"] == [*before["args"], "--resume-if-any"]
        assert after["env"]["DSJAX_COORDINATOR"] != before["env"]["DSJAX_COORDINATOR"]
        assert gone(before["pid"])
    assert "process 1" in err and "last words" in err and "restart 1 of 3" in err
    assert ("exit code 9" in err) or ("SIGKILL" in err)


def test_no_more_restarts_than_allowed_and_the_code_of_the_failed_one(tmp_path: Path):
    body = "sys.exit(9) if me == 1 else time.sleep(60)"
    code, _, err = run(tmp_path, body, "--processes", "2", "--max-restarts", "2", "--", "run.yaml", "--resume")
    assert code == 9, err
    assert len(lives(tmp_path, 1)) == 3
    assert lives(tmp_path, 1)[-1]["args"] == ["run.yaml", "--resume"]  # not given twice
    assert "gave up after 2 restarts" in err


def test_a_death_by_signal_has_the_shells_code(tmp_path: Path):
    body = "os.kill(os.getpid(), signal.SIGSEGV) if me else time.sleep(60)"
    code, _, _ = run(tmp_path, body, "--processes", "2", "--max-restarts", "0")
    assert code == 128 + signal.SIGSEGV


@pytest.mark.parametrize(("code", "body"), [(2, "sys.exit(2) if me == 0 else time.sleep(60)"), (75, "sys.exit(75)")])
def test_mistakes_and_stops_are_final(tmp_path: Path, code: int, body: str):
    assert run(tmp_path, body, "--processes", "2")[0] == code
    assert len(lives(tmp_path, 0)) == 1


def test_a_companion_that_ignores_sigterm_is_killed_with_what_it_started(tmp_path: Path):
    body = """
    import subprocess
    if me == 1:
        on_signal(None)
        child = subprocess.Popen(["sleep", "60"])
        (folder / "grandchild").write_text(str(child.pid))
        time.sleep(60)
    while not (folder / "grandchild").exists():
        time.sleep(0.02)
    sys.exit(3)
    """
    code, _, err = run(tmp_path, body, "--processes", "2", "--max-restarts", "0")
    assert code == 3, err
    wait_until_gone(lives(tmp_path, 1)[0]["pid"], int((tmp_path / "grandchild").read_text()))
    assert (tmp_path / "signal-1").read_text() == f"{signal.SIGTERM}\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_once_and_75_is_passed_on(tmp_path: Path, signum: int):
    launcher = start(tmp_path, "on_signal(75); time.sleep(60)", "--processes", "2")
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    os.killpg(launcher.pid, signum)  # as Ctrl-C does it: the whole foreground group, which the children are not in
    _, err = launcher.communicate(timeout=20)
    assert launcher.returncode == 75, err
    for process in range(2):
        assert (tmp_path / f"signal-{process}").read_text() == f"{int(signum)}\n"
        assert len(lives(tmp_path, process)) == 1


def test_a_second_signal_kills_at_once(tmp_path: Path):
    launcher = start(tmp_path, "on_signal(None)\nwhile True: time.sleep(60)", "--processes", "2")
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    launcher.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "signal-0", tmp_path / "signal-1")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=10) == 128 + signal.SIGTERM
    launcher.communicate()
    wait_until_gone(*(lives(tmp_path, i)[0]["pid"] for i in range(2)))


def test_a_stop_that_takes_longer_than_the_grace_is_ended(tmp_path: Path):
    launcher = start(tmp_path, "on_signal(None)\nwhile True: time.sleep(60)", "--processes", "1", "--grace", "0.3")
    wait_for(tmp_path / "ready-0")
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=20)
    assert launcher.returncode == 128 + signal.SIGKILL and "--grace 0.3" in err


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_no_process_outlives_a_killed_launcher(tmp_path: Path):
    launcher = start(tmp_path, "on_signal(None); time.sleep(60)", "--processes", "2")
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    launcher.kill()
    launcher.communicate(timeout=10)
    wait_until_gone(*(lives(tmp_path, i)[0]["pid"] for i in range(2)))


def test_much_output_does_not_block(tmp_path: Path):
    body = "sys.stdout.write('x' * 79 + '\\n') if me == 0 else [print('y' * 79) for _ in range(20_000)]"
    code, out, err = run(tmp_path, body, "--processes", "2")
    assert code == 0, err
    assert out == "x" * 79 + "\n"
    assert (tmp_path / "logs" / "start-0-process-1.log").stat().st_size == 20_000 * 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "2"], "end with -- CONFIG"),
        (["--processes", "2", "--", "--set", "seed=1", "run.yaml"], "end with -- CONFIG"),
        (["--processes", "0", "--", "run.yaml"], "at least 1"),
        (["--processes", "2", "--devices-per-process", "many", "--", "run.yaml"], "auto or a number"),
    ],
)
def test_bad_usage_is_exit_code_2(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        local.main(options)
    assert message in capsys.readouterr().err


def test_devices_are_shared_without_overlap():
    environments, added = local.share_devices(2, None, gpus=["4", "5", "6", "7"])
    assert environments == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}] and added == []
    assert local.share_devices(2, 1, gpus=["4", "5", "6"])[0][1] == {"CUDA_VISIBLE_DEVICES": "5"}
    assert local.share_devices(2, None, gpus=[]) == ([{}, {}], [])
    assert local.share_devices(2, 4, gpus=[]) == ([{}, {}], ["--set", "mesh.cpu_devices=8"])
    with pytest.raises(ValueError, match="cannot be shared equally"):
        local.share_devices(2, None, gpus=["0", "1", "2"])
    with pytest.raises(ValueError, match="need 8; got 4"):
        local.share_devices(2, 4, gpus=["0", "1", "2", "3"])


def test_hidden_gpus_are_not_given_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert local.visible_gpus() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.visible_gpus() == []


def test_an_unnamed_run_folder_is_a_free_one(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine-2").mkdir()
    train = ["a/mine.yaml", "--set", "seed=1"]
    assert local.with_run_dir(train, root=tmp_path) == [*train, "--run-dir", str(tmp_path / "mine-3")]
    for named in (["--run-dir", "x"], ["--run-dir=x"], ["--resume"], ["--resume-if-any"]):
        assert local.with_run_dir([*train, *named], root=tmp_path) == [*train, *named]


def test_the_examples_in_the_docstrings_hold():
    results = doctest.testmod(local)
    assert results.attempted and not results.failed
