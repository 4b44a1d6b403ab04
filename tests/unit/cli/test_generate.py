"""dsjax generate: the text is what a plain loop over the whole model's logits gives, from either kind of folder."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import CONFIGS, make_model, write_run

from dsjax.cli.main import main
from dsjax.inference.open import open_model
from dsjax.inference.text import generate_text, plain_prompt, without_unused_tokens
from dsjax.models.generate import Generation

PROMPT = "héllo"


@pytest.fixture(scope="module")
def greedy(params):
    """(family, parameters) -> tokens that a loop without a cache chooses after the prompt, among the first 257."""

    def greedy(kind="gpt2", parameters=None, count=20):
        model = make_model(CONFIGS[kind], params[kind] if parameters is None else parameters)
        graph, state = nnx.split(model)
        logits = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))
        ids = list(PROMPT.encode())
        for _ in range(count):
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(np.argmax(np.asarray(logits(state, jnp.asarray(padded)))[0, len(ids) - 1, :257])))
        return ids[len(PROMPT.encode()) :]

    return greedy


def text_of(tokens):
    return bytes(tokens).decode("utf-8", "replace")


def generate(source, *more):
    return main(["generate", str(source), "--prompt", PROMPT, "--max-new-tokens", "20", *more])


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_text(kind, hf_folders, greedy, capsys):
    expected = greedy(kind)
    assert 256 not in expected, "the model of this test ends its text"
    assert generate(hf_folders[kind]) == 0
    assert capsys.readouterr() == (f"{PROMPT}{text_of(expected)}\n", "")


def test_a_console_without_the_characters(hf_folders, greedy, monkeypatch):
    """What it cannot print is escaped: the text has been made by then."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert generate(hf_folders["gpt2"]) == 0
    expected = f"{PROMPT}{text_of(greedy())}\n"
    assert not expected.isascii()
    assert written.getvalue() == expected.encode("ascii", "backslashreplace")


def test_a_run_and_its_json(run_folder, greedy, capsys):
    assert generate(run_folder) == 0
    assert capsys.readouterr() == (f"{PROMPT}{text_of(greedy())}\n", "")
    assert generate(run_folder, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "source": f"step 3 of the run {run_folder}",
        "prompt": PROMPT,
        "text": text_of(greedy()),
        "prompt_tokens": 6,
        "new_tokens": 20,
        "stopped_by": "max_new_tokens",
    }


def test_it_stops_at_each_end_of_text(hf_folders, greedy, tmp_path, capsys):
    tokens = greedy()
    end = tokens[4]
    path = tmp_path / "model"
    shutil.copytree(hf_folders["gpt2"], path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [263, end]}))
    assert generate(path, "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert written["text"] == text_of(tokens[: tokens.index(end)])
    assert (written["new_tokens"], written["stopped_by"]) == (tokens.index(end), "end of text")


def test_text_appears_as_it_is_made(run_folder, greedy):
    trained, shown = open_model(run_folder, report=print), []
    generate_text(trained, [plain_prompt(trained, PROMPT)], options=Generation(max_new_tokens=20), show=shown.append)
    assert shown[0] == PROMPT and len(shown) == 1 + 20 + 1 and "".join(shown) == PROMPT + text_of(greedy())


def test_every_piece_is_flushed(run_folder, monkeypatch):
    """What the reader of a pipe has seen when the next token is asked for."""
    seen, flushed = [], []
    output = SimpleNamespace(write=seen.append, flush=lambda: flushed.append("".join(seen)))
    monkeypatch.setattr(sys, "stdout", output)
    generate(run_folder)
    assert len(flushed) >= 22 and flushed[0] == PROMPT


def test_the_average_is_used_where_a_run_keeps_one(params, greedy, tmp_path, capsys):
    average = jax.tree.map(lambda p: jnp.flip(p, axis=-1), params["gpt2"])
    both = {"params": params["gpt2"], "ema": average}
    path = write_run(tmp_path / "run", CONFIGS["gpt2"], {1: both}, ema_decay=0.9)
    assert generate(path) == 0
    averaged, plain = text_of(greedy(parameters=average)), text_of(greedy())
    assert capsys.readouterr().out == f"{PROMPT}{averaged}\n" and averaged != plain


def test_rows_of_the_embedding_without_a_token_are_never_written(hf_folders):
    trained = open_model(hf_folders["gpt2"], report=print)
    state = nnx.to_pure_dict(nnx.state(trained.model, nnx.Param))
    state["embed"]["table"] = state["embed"]["table"].at[257:].multiply(100.0)  # now far likelier than any token
    loud = dataclasses.replace(trained, model=make_model(trained.model.config, state))
    ids = np.array([list(PROMPT.encode())])
    models = (trained.model, loud.model, without_unused_tokens(loud))
    plain, wrong, right = (model.generate(ids, max_new_tokens=20) for model in models)
    assert wrong.max() > 256 >= plain.max() and (right == plain).all()


def test_draws_depend_on_the_seed(run_folder, capsys):
    def drawn(*more):
        assert generate(run_folder, "--temperature", "2", *more) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    assert drawn() == drawn("--seed", "0") != drawn("--seed", "1")
    assert generate(run_folder) == 0
    greedy = capsys.readouterr().out
    assert drawn("--top-k", "1", "--seed", "5") == drawn("--top-p", "1e-6") == greedy
    assert generate(run_folder, "--top-k", "3", "--seed", "1") == 0
    assert "nothing is drawn: --top-k and --seed not used" in capsys.readouterr().err


def test_the_prompt_from_standard_input(run_folder, greedy, monkeypatch, capsys):
    for encoding in ("utf-8", "utf-16"):  # PowerShell pipes the second
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\r\n".encode(encoding))))
        assert main(["generate", str(run_folder), "--prompt", "-", "--max-new-tokens", "20"]) == 0
        assert capsys.readouterr().out == f"{PROMPT}{text_of(greedy())}\n"


def test_a_damaged_checkpoint_is_named_and_passed_over(params, greedy, tmp_path, capsys, refused):
    other = jax.tree.map(lambda p: jnp.flip(p, axis=-1), params["gpt2"])
    path = write_run(tmp_path / "run", CONFIGS["gpt2"], {5: {"params": params["gpt2"]}, 6: {"params": other}})
    damage(path / "checkpoints" / "step_00000006")
    assert generate(path) == 0
    out, err = capsys.readouterr()
    assert out == f"{PROMPT}{text_of(greedy())}\n"
    assert err.startswith("dsjax: passed over: step_00000006 is not used: ")
    damage(path / "checkpoints" / "step_00000005")
    refused(["generate", path, "--prompt", "x"], ["none of the checkpoints [5, 6] is whole"])


def damage(checkpoint):
    """Flip one bit of its largest file."""
    file = max((file for file in checkpoint.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_folders_that_do_not_fit(spoiled_folder, refused):
    path, said = spoiled_folder
    refused(["generate", path, "--prompt", "x"], said)


def test_sources_that_are_none(no_source, refused):
    path, said = no_source
    refused(["generate", path, "--prompt", "x"], said)


TEMPLATE = "{% for m in messages %}{{ '<|endoftext|>' ~ m.role[0] ~ m.content }}{% endfor %}\n"


@pytest.fixture
def chat_folder(hf_folders, tmp_path):
    """The GPT-2 model with a chat template, which begins every message with the end-of-text token (256)."""
    path = tmp_path / "chat"
    shutil.copytree(hf_folders["gpt2"], path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def test_a_chat_is_rendered_with_special_tokens_and_only_the_answer_is_shown(chat_folder, capsys):
    ids = [256, *b"sBe", 256, *b"uHi"]
    answer = open_model(chat_folder, report=print).model.generate(np.array([ids]), max_new_tokens=9)[0, len(ids) :]
    assert (answer < 256).all(), "the model of this test ends its answer"
    arguments = ["generate", str(chat_folder), "--prompt", "Hi", "--chat", "--system", "Be", "--max-new-tokens", "9"]
    assert main(arguments) == 0
    assert capsys.readouterr() == (text_of(answer.tolist()) + "\n", "")
    assert main([*arguments, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["prompt"], written["prompt_tokens"]) == ("Hi", len(ids))


def test_several_prompts_are_what_each_gives_alone(hf_folders, capsys):
    prompts = ["a", "hello world", "zz zz"]
    alone = []
    for prompt in prompts:
        assert main(["generate", str(hf_folders["gpt2"]), "--prompt", prompt, "--max-new-tokens", "12"]) == 0
        alone.append(capsys.readouterr().out.removesuffix("\n"))
    several = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    command = ["generate", str(hf_folders["gpt2"]), *several, "--max-new-tokens", "12"]
    assert main(command) == 0
    assert capsys.readouterr().out == "\n\n".join(alone) + "\n"
    assert main([*command, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] + line["text"] for line in lines] == alone


def test_it_stops_before_a_stop_string_that_tokens_share(run_folder, greedy, capsys):
    text = text_of(greedy())
    stop = text[5:8]  # three tokens of one byte, or parts of characters that are longer
    assert generate(run_folder, "--json", "--stop", stop, "--stop", "not there") == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["text"], written["stopped_by"]) == (text[: text.index(stop)], "stop string")
    assert written["new_tokens"] < 20
    assert generate(run_folder, "--stop", stop) == 0
    assert capsys.readouterr().out == f"{PROMPT}{text[: text.index(stop)]}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "x", "--chat"], ["has no chat template", "leave --chat out"]),
        (["--prompt", "x", "--system", "y"], ["give --chat too"]),
        (["--prompt", "x", "--prompt", ""], ["the prompt is empty"]),
        (["--prompt", "x", "--stop", ""], ["a stop string is empty"]),
        (["--prompt", "x", "--min-p", "2", "--temperature", "1"], ["min_p must be in [0, 1]"]),
        (["--prompt", "x", "--repetition-penalty", "0"], ["repetition_penalty above 0"]),
        (["--prompt", ""], ["the prompt is empty"]),
        (["--prompt", os.fsdecode(b"a\xff")], ["not UTF-8: byte 0xff at 1"]),
        (["--prompt", "x" * 40, "--max-new-tokens", "9"], ["need 49 positions, but the model has 48", "at most 8"]),
        (["--prompt", "x" * 49], ["the model has 48"]),
        (["--prompt", "x", "--max-new-tokens", "0"], ["max_new_tokens must be at least 1"]),
        (["--prompt", "x", "--temperature", "-1"], ["temperature"]),
        (["--prompt", "x", "--temperature", "1", "--top-p", "0"], ["top_p in (0, 1]"]),
        (["--prompt", "x", "--temperature", "1", "--top-k", "-2"], ["top_k must be 0 or more"]),
        ([], ["--prompt"]),
    ],
)
def test_mistakes(arguments, said, run_folder, refused):
    refused(["generate", run_folder, *arguments], said)


def test_a_process_of_its_own(run_folder, greedy):
    """On one device, with a pipe for output."""
    command = [sys.executable, "-m", "dsjax", "generate", str(run_folder), "--prompt", PROMPT, "--max-new-tokens", "5"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == f"{PROMPT}{text_of(greedy()[:5])}\n"
