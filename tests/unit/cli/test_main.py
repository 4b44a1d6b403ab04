"""The command: lazy imports, one message a mistake, exit codes, help on one screen."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsjax.cli import config as config_verb
from dsjax.cli import env as env_verb
from dsjax.cli import main as command
from dsjax.cli.main import UserError, main

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "configs/run/quickstart.yaml")
BUILT = [verb for verb in command.VERBS if (ROOT / f"dsjax/cli/{verb}.py").exists()]


def shell(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, on a terminal of 100 columns."""
    settings = os.environ | {"COLUMNS": "100"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, timeout=60)


@pytest.mark.parametrize("verb", BUILT)
def test_help_fits_one_screen_and_does_not_import_jax(verb):
    done = shell(
        "import sys; from dsjax.cli.main import main\n"
        f"assert main(['{verb}', '--help']) == 0\n"
        "assert not {'jax', 'numpy', 'flax', 'grain', 'tokenizers'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert lines[0].startswith(f"usage: dsjax {verb}")


def test_the_first_screen():
    done = shell(
        "import sys; from dsjax.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        "ours = {name for name in sys.modules if name.startswith('dsjax.')}\n"
        "assert ours == {'dsjax.cli', 'dsjax.cli.main'}, ours"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert all(any(line.split()[:1] == [verb] for line in lines) for verb in command.VERBS)


def test_the_table_and_the_files_say_the_same():
    assert command.VERBS["config"] == config_verb.HELP
    assert command.VERBS["env"] == env_verb.HELP


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no verb 'trian'; closest: train; there are train, generate"),
        (["zzz"], "no verb 'zzz'; there are train, generate"),
        (["config"], "the following arguments are required: show | diff | docs (see dsjax config --help)"),
        (["config", "show"], "the following arguments are required: CONFIG (see dsjax config show --help)"),
        (["config", "show", "nowhere.yaml"], "no such config file: nowhere.yaml"),
        (
            ["config", "show", QUICKSTART, "--set", "seed=x", "--set", "modle=1"],
            "--set: modle: unknown key; closest: model",
        ),
        (["config", "docs", "--write", str(ROOT)], f"Is a directory: {ROOT}"),
        (["env", "--jsno"], "unrecognized arguments: --jsno (see dsjax env --help)"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dsjax: error: " + message)
    assert "Traceback" not in err


def test_several_problems_are_indented(capsys):
    assert main(["config", "show", QUICKSTART, "--set", "seed=x", "--set", "evaluate.rows=y"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "dsjax: error: --set: seed: want a whole number; got 'x' (text)"
    assert second == "  --set: evaluate.rows: want a whole number; got 'y' (text)"


def test_no_verb_prints_the_overview_and_fails(capsys):
    assert main([]) == 2
    assert "usage: dsjax VERB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("x"), 2),
        (ValueError("x"), 2),
        (FileExistsError("x"), 2),
        (PermissionError(13, "Permission denied", "x"), 2),
        (KeyboardInterrupt(), 130),
        (SystemExit(7), 7),
        (SystemExit(None), 0),
    ],
)
def test_exit_codes(error, code, monkeypatch, capsys):
    def fail(arguments):
        raise error

    monkeypatch.setattr(config_verb, "run", fail)
    assert main(["config", "docs"]) == code
    if code == 2:
        assert capsys.readouterr().err in ("dsjax: error: x\n", "dsjax: error: Permission denied: x\n")


def test_bugs_are_not_hidden(monkeypatch):
    def fail(arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(config_verb, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["config", "docs"])


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("DSJAX_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["config", "show", "nowhere.yaml"])


def test_a_closed_pipe_is_quiet():
    command_line = f"{sys.executable} -m dsjax config docs | head -c 10"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command_line}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 141) and done.stderr == "" and len(done.stdout) == 10


def test_python_m_dsjax():
    done = subprocess.run([sys.executable, "-m", "dsjax", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()[0]) == (0, "dsjax")


def test_config_show(capsys):
    assert main(["config", "show", QUICKSTART, "--json", "--set", "seed=3"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 3
    assert main(["config", "show", QUICKSTART, "--origins", "--set", "seed=3"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["seed", "3", "--set"] in rows
    assert ["mesh.tensor", "2", str(ROOT / "configs/mesh/cpu8.yaml")] in rows
    assert main(["config", "show", QUICKSTART, "--origins", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == {"value": 0, "origin": "default"}


def test_config_show_prints_a_file_that_loads_to_the_same(tmp_path, capsys):
    assert main(["config", "show", QUICKSTART]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert main(["config", "diff", QUICKSTART, str(tmp_path / "shown.yaml")]) == 0
    assert capsys.readouterr().out == ""


def test_config_diff(capsys):
    other = QUICKSTART.replace("quickstart", "quickstart_gpu")
    assert main(["config", "diff", QUICKSTART, other]) == 1
    assert "name " in (out := capsys.readouterr().out) and '"quickstart" -> "quickstart_gpu"' in out
    assert main(["config", "diff", QUICKSTART, other, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0] == {"path": "name", "a": "quickstart", "b": "quickstart_gpu"}


def test_env(capsys):
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert {"python", "jax", "flax", "devices", "cores", "memory"} <= {line.split()[0] for line in lines}
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["devices"][0]["count"] == 8 and "parquet" in report["extras"] and "jax" in report["packages"]


def test_an_unknown_setting_is_named_once_in_one_line(hf_folders, tmp_path):
    """In a process of its own: here warnings are errors."""
    shutil.copytree(hf_folders["gpt2"], tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings | {"attention_window": 7}))
    done = shell(
        "from dsjax.cli.main import main\nfrom dsjax.models.formats.pretrained import load_pretrained\n"
        f"main(['env'])\nfor _ in range(2): load_pretrained({str(tmp_path / 'model')!r})"
    )
    lines = [line for line in done.stderr.splitlines() if "unknown settings" in line]
    assert len(lines) == 1 and lines[0].startswith("dsjax: warning: config.json of a gpt2 model: unknown settings")
