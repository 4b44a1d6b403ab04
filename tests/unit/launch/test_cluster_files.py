"""The cluster scripts: as far as they can be checked without a cluster."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[3] / "launch"
BASH = shutil.which("bash")


def container(job: dict) -> dict:
    (one,) = job["template"]["spec"]["containers"]
    return one


def test_jobset_numbers_and_names_agree():
    jobset = yaml.safe_load((LAUNCH / "k8s-jobset.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    environment = {each["name"]: each for each in container(job)["env"]}
    nodes = environment["DSJAX_NUM_PROCESSES"]["value"]
    assert isinstance(nodes, str) and int(nodes) == job["parallelism"] == job["completions"]
    name = jobset["metadata"]["name"]
    host, port = environment["DSJAX_COORDINATOR"]["value"].split(":")
    assert host == f"{name}-{replicated['name']}-0-0.{name}" and port.isdigit()
    assert "job-completion-index" in environment["DSJAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]


def test_jobset_restarts_all_pods_together_but_not_after_a_mistake():
    jobset = yaml.safe_load((LAUNCH / "k8s-jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}]
    assert jobset["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    assert "--resume-if-any" in container(job)["args"]
    mounted = {each["name"] for each in container(job)["volumeMounts"]}
    assert mounted == {each["name"] for each in job["template"]["spec"]["volumes"]}


@pytest.mark.skipif(BASH is None, reason="no bash")
@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_slurm_script_requeues_a_stopped_job_only(tmp_path: Path, code: int, requeued: bool):
    """The script with srun and scontrol replaced by programs that write down how they were called."""
    assert BASH
    for name, ending in (("srun", f"exit {code}"), ("scontrol", "exit 0")):
        program = tmp_path / name
        program.write_text(f'#!{BASH}\nprintf "%s\\n" "$@" > "{tmp_path}/{name}.called"\n{ending}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "big",
    }  # fmt: skip
    script = [BASH, str(LAUNCH / "slurm.sbatch"), "run.yaml", "--set", "a.b=two words"]
    assert subprocess.run(script, env=environment, check=False).returncode == code
    called = (tmp_path / "srun.called").read_text().splitlines()
    train = called[called.index("train") + 1 :]
    assert train == [
        "run.yaml",
        "--set",
        "a.b=two words",
        "--distributed",
        "--run-dir",
        "runs/big-7",
        "--resume-if-any",
    ]
    assert (tmp_path / "scontrol.called").exists() == requeued


@pytest.mark.skipif(BASH is None, reason="no bash")
def test_slurm_script_without_a_config_says_how():
    assert BASH
    done = subprocess.run([BASH, str(LAUNCH / "slurm.sbatch")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr
