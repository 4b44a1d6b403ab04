"""One function reads JSON that others wrote, and whoever calls it says which file it was."""

import ast
import struct
from pathlib import Path

import pytest

from dsjax.checkpoint.manifest import read_json
from dsjax.checkpoint.metrics_log import truncate_metrics
from dsjax.checkpoint.safetensors_file import read_header
from dsjax.checkpoint.safetensors_folder import open_folder
from dsjax.data.config import FileTokenizer, JsonlSource
from dsjax.data.corpus.store import open_corpus_folder
from dsjax.data.text.read import read_documents
from dsjax.data.tokenizers.load import load_tokenizer
from dsjax.data.tokenizers.tokenizer import Tokenizer
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.formats.peft import read_adapter
from dsjax.observe.trackers import read_metrics
from dsjax.runs.folder import read_config

ROOT = Path(__file__).parents[2]
OWN_WORDS = {
    "plan/compile.py": "a child process of its own, through a pipe",
    "data/tokenizers/chat_process.py": "a child process of its own, through a pipe",
    "data/tokenizers/chat_child.py": "its parent, through a pipe",
    "data/tokenizers/pieces.py": "the tokenizers library's own state",
    "data/tokenizers/styles.py": "the tokenizers library's own state",
    "data/corpus/assemble.py": "arrays of a part that it wrote itself, which have checksums",
    "data/rows/labels.py": "arrays of a part that it wrote itself, which have checksums",
}


def test_nobody_else_reads_json():
    for path in sorted((ROOT / "dsjax").rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        named = {f"{node.value.id}.{node.attr}" for node in calls if isinstance(node.value, ast.Name)}
        name = path.relative_to(ROOT / "dsjax").as_posix()
        found = named & {"json.load", "json.loads", "json.JSONDecoder"} and name not in OWN_WORDS
        assert not found or name == "observe/untrusted.py", f"dsjax/{name}: use dsjax.observe.untrusted.parse_json"


def header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", path.stat().st_size) + path.read_bytes())
    read_header(path)


READERS = {
    "config.json": lambda path: open_folder(path.parent),
    "any.json": read_json,
    "a.safetensors": header,
    "adapter_config.json": lambda path: read_adapter(path.parent, LlamaConfig(vocab_size=8)),
    "corpus.json": lambda path: open_corpus_folder(path.parent),
    "byte_tokenizer.json": lambda path: Tokenizer.load(path.parent),
    "tokenizer.json": lambda path: load_tokenizer(FileTokenizer(path=str(path))),
    "rows.jsonl": lambda path: list(read_documents([JsonlSource(path=str(path))])),
    "metrics.jsonl": read_metrics,
    "torn.jsonl": lambda path: truncate_metrics(path, 1),
    "config.yaml": lambda path: read_config(path.parent),
}
HOSTILE = {
    "deep": b"[" * 20_000 + b"]" * 20_000,
    "deep objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "digits": b'{"a": ' + b"1" * 5000 + b"}",
    "cut off": b'{"a": 1, "b',
    "not UTF-8": b'{"a": "\xff\xfe\xfd"}',
    "another encoding": '{"a": "é"'.encode("utf-16"),
    "zeros": bytes(64),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("name", READERS)
def test_whatever_is_in_a_file_the_error_names_it(tmp_path, name, what):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    (tmp_path / "tokenizer").mkdir()
    path = tmp_path / name
    path.write_bytes(HOSTILE[what] + (b"\n{}\n" if name.endswith(".jsonl") else b""))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        READERS[name](path)
    assert not isinstance(caught.value, UnicodeError) and len(str(caught.value)) < 700
    if name.endswith(".jsonl") and what != "zeros":
        assert any(word in str(caught.value) for word in (f"{name}:1", "line 1", f"{name}: not UTF-16"))
