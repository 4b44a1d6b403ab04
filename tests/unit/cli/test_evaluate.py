"""dsjax evaluate: each token once, from the context promised, and the likelihood that float64 NumPy finds by itself."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, make_model
from tokenizers import processors

from dsjax.cli.main import main
from dsjax.data.config import DataConfig, FileTokenizer, TextSource
from dsjax.data.corpus.build import build_corpus
from dsjax.data.tokenizers.tokenizer import Tokenizer, byte_tokenizer
from dsjax.evaluate.perplexity import WindowBatches, read_text, score, windows
from dsjax.inference.convert import byte_tokenizer_file
from dsjax.inference.open import open_model
from dsjax.inference.text import plain_prompt
from dsjax.models.families.build import segments_of
from dsjax.models.naming import to_named

DOCUMENTS = ["The quick brown fox jumps over the lazy dog, écoute.", "ab", "x", "Zwölf Boxkämpfer jagen Viktor\nquer."]


def gpt2_log_probabilities(w, ids):
    """log P(. | ids[0 .. t]) [T, V] in float64, from the equations: nothing of the package is used."""
    norm = lambda x, n: (
        (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[f"{n}.scale"] + w[f"{n}.bias"]
    )
    x = w["embed.table"][ids] + w["positions.table"][: len(ids)]
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for layer in ("layers.0.", "layers.1."):
        h = norm(x, layer + "attention_norm")
        qkv = np.einsum("td,dcf->ctf", h, w[layer + "attention.qkv.kernel"]) + w[layer + "attention.qkv.bias"][:, None]
        q, k, v = (part.reshape(len(ids), 2, 8).transpose(1, 0, 2) for part in qkv)
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(8) + future
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(ids), 16)
        x = x + mixed @ w[layer + "attention.out.kernel"] + w[layer + "attention.out.bias"]
        h = norm(x, layer + "mlp_norm") @ w[layer + "mlp.up.kernel"] + w[layer + "mlp.up.bias"]
        h = h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2
        x = x + h @ w[layer + "mlp.down.kernel"] + w[layer + "mlp.down.bias"]
    z = norm(x, "final_norm") @ w["embed.table"].T
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def brute_force(params):
    """(documents, length, stride) -> nats, tokens: one token after the other, each from its own context."""
    named = to_named(params["gpt2"], segments_of(CONFIGS["gpt2"]))
    weights = {name: np.asarray(value, np.float64) for name, value in named.items()}

    def brute_force(documents, length, stride):
        nats, count = 0.0, 0
        for ids in documents:
            for place in range(1, len(ids)):
                begin = stride * max(0, math.ceil((place - length) / stride))
                nats -= gpt2_log_probabilities(weights, np.array(ids[begin:place]))[-1, ids[place]]
                count += 1
        return nats, count

    return brute_force


@given(st.integers(0, 300), st.integers(1, 40), st.data())
@settings(deadline=None)
def test_windows_score_every_token_once_and_give_it_context(num_tokens, length, data):
    stride = data.draw(st.integers(1, length))
    seen = []
    for begin, end, first in windows(num_tokens, length=length, stride=stride):
        assert 0 <= begin < end <= begin + length and begin < first <= end
        seen += range(first, end + 1)
        # Predicted from tokens begin .. place - 1.
        assert all(place - begin >= min(place, length - stride + 1) for place in range(first, end + 1))
    assert seen == list(range(1, num_tokens))


@given(
    st.lists(st.integers(0, 90), max_size=12),
    st.integers(1, 40),
    st.integers(1, 200),
    st.sampled_from([1, 2, 8]),
    st.data(),
)
@settings(deadline=None, max_examples=60)
def test_batches_hold_every_target_once_after_its_own_past(sizes, length, batch_tokens, multiple, data):
    stride = data.draw(st.integers(1, length))
    starts = np.cumsum([0, *sizes])
    documents = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    batches = WindowBatches(documents, length=length, stride=stride, batch_tokens=batch_tokens, multiple=multiple)
    seen, widths = [], set()
    for batch in batches:
        rows, width = batch.tokens.shape
        assert rows % multiple == 0 and width <= length
        assert rows * width <= max(batch_tokens, multiple * width) or rows == multiple
        widths.add(width)
        seen += batch.targets[batch.scored].tolist()
        assert (batch.targets - batch.tokens)[batch.scored].tolist() == [1] * int(batch.scored.sum())
    firsts = {document[0] for document in documents if len(document)}
    assert sorted(seen) == [token for token in range(sum(sizes)) if token not in firsts]
    assert len(widths) <= 3


@pytest.mark.parametrize(("length", "stride"), [(16, 5), (9, 9), (48, 24), (7, 1)])
def test_nats_are_those_of_float64(length, stride, params, brute_force):
    documents = [list(text.encode()) for text in DOCUMENTS]
    nats, count = brute_force(documents, length, stride)
    model = make_model(CONFIGS["gpt2"], params["gpt2"])
    arrays = [np.array(ids, np.int32) for ids in documents]
    found = score(model, arrays, length=length, stride=stride, batch_tokens=length)
    assert found.num_tokens == count
    # float32 against float64, relative to a sum of positive terms.
    assert found.nats == pytest.approx(nats, rel=2e-6)


def test_devices_and_chunks_of_the_logits_do_not_matter(params, monkeypatch):
    model = make_model(CONFIGS["bloom"], params["bloom"])
    documents = [np.arange(40, dtype=np.int32), np.arange(100, 113, dtype=np.int32)]
    one = score(model, documents, length=16, stride=4, devices=jax.devices()[:1])
    monkeypatch.setattr("dsjax.evaluate.perplexity._CHUNK_ELEMENTS", 264 * 4)
    many = score(model, documents, length=16, stride=4, devices=jax.devices(), batch_tokens=32)
    assert many.num_tokens == one.num_tokens == 51 and many.nats == pytest.approx(one.nats, rel=1e-6)


@pytest.mark.parametrize("kind", ["run", "hf"])
@pytest.mark.parametrize("first", [False, True])
def test_the_figures(kind, first, hf_folders, run_folder, brute_force, tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    for number, text in enumerate(DOCUMENTS[:2]):
        (folder / f"{number}.txt").write_text(text)
    lines = tmp_path / "more.jsonl"
    lines.write_text("".join(json.dumps({"body": text}) + "\n" for text in DOCUMENTS[2:]))
    source = run_folder if kind == "run" else hf_folders["gpt2"]
    more = ["--field", "body", "--length", "16", "--stride", "8", "--json"]
    more += ["--score-first"] if first else []
    assert main(["evaluate", str(source), "--data", str(folder), str(lines), *more]) == 0
    out, err = capsys.readouterr()
    metrics = json.loads(out)
    assert metrics.pop("source").endswith(str(source)) and "loss" in err
    assert all(figure["how"] for figure in metrics.values())
    values = {name: figure["value"] for name, figure in metrics.items()}
    lead = [256] if first else []
    nats, count = brute_force([lead + list(text.encode()) for text in DOCUMENTS], 16, 8)
    num_bytes = sum(len(text.encode()) - (not first) for text in DOCUMENTS)
    assert (values["tokens"], values["bytes"], values["documents"]) == (count, num_bytes, 4)
    assert values["nats_per_token"] == pytest.approx(nats / count, rel=2e-6)
    assert values["perplexity"] == pytest.approx(math.exp(nats / count), rel=2e-5)
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=2e-6)


def test_the_table_and_the_defaults(run_folder, hf_folders, tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text(DOCUMENTS[0])
    for source, window in ((run_folder, "window 16, stride 8"), (hf_folders["gpt2"], "window 48, stride 24")):
        assert main(["evaluate", str(source), "--data", str(path)]) == 0
        out = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert window in out and "bits per byte" in out and "UTF-8 bytes" in out


def test_bytes_of_a_tokenizer_that_changes_the_text(tmp_path):
    """Bytes are the text's own, whatever the tokens spell."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    library = Library(models.BPE(vocab={c: i for i, c in enumerate("abchelo")} | {"he": 7}, merges=[("h", "e")]))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "a.txt").write_text("HELLO")
    (tmp_path / "b.txt").write_text("cab")
    text = read_text([TextSource(path=str(tmp_path))], Tokenizer(library), score_first=False)
    assert (text.num_bytes, text.num_lossy) == (5 - 2 + 3 - 1, 1)
    assert [document.tolist() for document in text.documents] == [[7, 5, 5, 6], [2, 0, 1]]
    assert read_text([TextSource(path=str(tmp_path))], byte_tokenizer(), score_first=True).num_bytes == 8


@pytest.fixture
def with_begin(hf_folders, tmp_path):
    """The GPT-2 folder with a tokenizer that puts <s>, id 257, before a text; only special_tokens_map.json names it."""
    folder = tmp_path / "model"
    shutil.copytree(hf_folders["gpt2"], folder)
    library = byte_tokenizer_file().library
    assert library is not None
    library.add_special_tokens(["<s>"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 257)]
    )
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "<|endoftext|>"}}')
    return folder


def test_training_scoring_and_prompts_have_one_beginning(with_begin, brute_force, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(DOCUMENTS[0])
    text = list(DOCUMENTS[0].encode())
    trained = open_model(with_begin, report=lambda line: None)
    assert plain_prompt(trained, DOCUMENTS[0]).ids == [257, *text]
    data = DataConfig(
        sources=(TextSource(path=str(tmp_path / "a.txt")),),
        tokenizer=FileTokenizer(path=str(with_begin)),
        validation_fraction=0,
        cache_dir=str(tmp_path / "cache"),
    )
    assert build_corpus(data).train[0].document(0).tolist() == [257, *text, 256]
    nats, count = brute_force([[257, *text]], 16, 8)
    assert count == len(text)
    for more in ([], ["--score-first"]):
        command = ["evaluate", str(with_begin), "--data", str(tmp_path / "a.txt"), "--length", "16", "--stride", "8"]
        assert main([*command, "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["tokens"]["value"], found["bytes"]["value"]) == (count, len(text))
        assert found["nats_per_token"]["value"] == pytest.approx(nats / count, rel=2e-6)
        assert "after what its tokenizer puts before a text" in found["tokens"]["how"]


def test_a_model_that_has_diverged(params):
    broken = jax.tree.map(lambda p: p * np.nan, params["gpt2"])
    with pytest.raises(ValueError, match="not finite"):
        score(make_model(CONFIGS["gpt2"], broken), [np.arange(9, dtype=np.int32)], length=16, stride=5)


def test_folders_that_do_not_fit(spoiled_folder, refused):
    path, said = spoiled_folder
    refused(["evaluate", path, "--data", "x"], said)


def test_sources_that_are_none(no_source, refused):
    path, said = no_source
    refused(["evaluate", path, "--data", "x"], said)


@pytest.mark.parametrize(
    ("name", "content", "more", "said"),
    [
        ("a.txt", None, [], ["there is no file or folder"]),
        ("a.txt", b"", [], ["is empty"]),
        (".", b"", [], ["no file that matches *.txt and has content"]),
        ("a.txt", b"abc\xff", [], ["a.txt: 0xff at byte 3 is not UTF-8"]),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "a"}\n', [], ["a.jsonl:2: no key 'text'; its keys are 'txt'"]),
        ("a.jsonl", b"a\n", [], ["a.jsonl:1 is not JSON", "one JSON object a line"]),
        ("a.txt", b"a", [], ["nothing to score"]),
        ("a.txt", b"abcd", ["--length", "49"], ["49 tokens is longer than the 48 positions"]),
        ("a.txt", None, ["--length", "49"], ["49 tokens is longer than the 48 positions"]),  # before the text is read
        ("a.txt", b"abcd", ["--stride", "17"], ["stride in 1 .. length; got 16 and 17"]),
        ("a.txt", b"abcd", ["--stride", "0"], ["stride in 1 .. length"]),
        ("a.txt", b"abcd", ["--length", "0"], ["length must be at least 1"]),
        ("a.txt", b"abcd", ["--batch-tokens", "0"], ["batch_tokens must be at least 1"]),
    ],
)
def test_mistakes(name, content, more, said, run_folder, tmp_path, refused):
    if content is not None:
        (tmp_path / ("empty.txt" if name == "." else name)).write_bytes(content)
    refused(["evaluate", run_folder, "--data", tmp_path / name, *more], said)


def test_bytes_that_are_not_utf8_may_be_passed_over(run_folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    (tmp_path / "b.txt").write_bytes(b"abc")
    for how, tokens in (("skip", 2), ("replace", 2 + 5)):
        assert main(["evaluate", str(run_folder), "--data", str(tmp_path), "--undecodable", how, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"]["value"] == tokens
