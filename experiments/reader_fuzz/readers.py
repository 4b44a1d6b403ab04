"""The readers that run.py feeds: for each the sound files that are damaged, and what is done with them."""

import bz2
import functools
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pyarrow.parquet
import tokenizers
import zstandard
from gguf import GGMLQuantizationType as Type
from tokenizers import decoders, models, pre_tokenizers

from dsjax.checkpoint.gguf_file import open_gguf
from dsjax.checkpoint.manifest import read_json
from dsjax.checkpoint.metrics_log import truncate_metrics
from dsjax.checkpoint.safetensors_file import read_header, read_tensor
from dsjax.checkpoint.safetensors_folder import open_folder, write_folder
from dsjax.data.config import FileTokenizer, JsonlSource, ParquetSource, TextSource
from dsjax.data.text.read import read_documents
from dsjax.data.tokenizers.gguf import gguf_tokenizer
from dsjax.data.tokenizers.load import load_tokenizer
from dsjax.models.formats.config_json import config_from_hf
from dsjax.models.formats.gguf import open_gguf_weights
from dsjax.observe.trackers import read_metrics

Files = dict[str, bytes]
"""Name -> content."""


def read_gguf(folder: Path) -> None:
    file = open_gguf(folder / "model.gguf")
    for name in file.names():
        file.read(name)


def read_gguf_model(folder: Path) -> None:
    weights = open_gguf_weights(folder / "model.gguf")
    config_from_hf(weights.config)
    for name in weights.names():
        weights.shape(name)


def read_gguf_tokenizer(folder: Path) -> None:
    gguf_tokenizer(open_gguf(folder / "model.gguf"))
    load_tokenizer(FileTokenizer(path=str(folder / "model.gguf"))).encode("Hello, 123 <|end|>")


def read_safetensors(folder: Path) -> None:
    for info in read_header(folder / "model.safetensors").values():
        read_tensor(info)


def read_folder(folder: Path) -> None:
    opened = open_folder(folder)
    config_from_hf(opened.config)
    for name in opened.names():
        opened.read(name)


def read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(FileTokenizer(path=str(folder)))
    tokenizer.decode(tokenizer.encode("Hello, 123 <|end|>"))


def read_source(folder: Path) -> None:
    """Every file as a source of text, of JSON lines or of Parquet; its labels too."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".parquet":
            config = ParquetSource(path=str(path), label="label")
        elif ".jsonl" in path.name:
            config = JsonlSource(path=str(path), text_pair="pair", label="label")
        else:
            config = TextSource(path=str(path), separator="\n\n")
        for undecodable in ("skip", "replace", "error"):
            for document in read_documents([config], undecodable=undecodable, report=len):
                document.text.encode(), document.name.encode(), str(document.label).encode()


def read_whole_json(folder: Path) -> None:
    """A small file of settings, and a line of metrics, which is read with more leniency."""
    for path in sorted(folder.iterdir()):
        json.dumps(read_json(path), ensure_ascii=False, allow_nan=False).encode()
    read_metrics(path)
    truncate_metrics(path, 1)


READERS: dict[str, Callable[[Path], None]] = {
    "gguf": read_gguf,
    "gguf_model": read_gguf_model,
    "gguf_tokenizer": read_gguf_tokenizer,
    "safetensors": read_safetensors,
    "folder": read_folder,
    "tokenizer": read_tokenizer,
    "wordpiece": read_tokenizer,
    "text": read_source,
    "jsonl": read_source,
    "compressed": read_source,
    "parquet": read_source,
    "json": read_whole_json,
}


def sound_files(reader: str, folder: Path) -> list[Files]:
    """Small files of every shape that the reader takes, as name -> content."""
    folder.mkdir(parents=True)
    if reader.startswith("gguf"):
        paths = _gguf_files(folder) if reader == "gguf" else [_gguf_model(folder)]
        return [{"model.gguf": path.read_bytes()} for path in paths]
    if reader == "safetensors":
        rng = np.random.default_rng(0)
        tensors = {"a.weight": rng.standard_normal((3, 4)).astype(np.float32), "b": np.ones(5, np.float16)}
        tensors |= {"c": np.array([True, False]), "d": np.zeros((0, 2), np.int64), "e": np.array(7, np.int8)}
        write_folder(folder / "one", tensors, config={})
        return [{"model.safetensors": (folder / "one" / "model.safetensors").read_bytes()}]
    if reader == "folder":
        tensors = {f"layers.{i}.weight": np.full((4, 4), i, np.float32) for i in range(4)}
        write_folder(folder / "shards", tensors, config=_LLAMA_JSON, max_shard_bytes=200)
        return [{path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}]
    if reader in ("text", "jsonl", "compressed", "parquet", "json"):
        return _sources(reader, folder)
    settings = json.dumps({"eos_token": {"content": "<|end|>"}, "do_lower_case": True, "chat_template": "{{ x }}"})
    if reader == "wordpiece":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##o", "##l", "h", "1", "2", "3", ","]
        return [{"vocab.txt": "\n".join(words).encode(), "tokenizer_config.json": b'{"do_lower_case": true}'}]
    vocabulary = {token: number for number, token in enumerate(_TOKENS)}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("H", "e"), ("l", "l")]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens(["<|end|>"])
    return [{"tokenizer.json": library.to_str().encode(), "tokenizer_config.json": settings.encode()}]


def _sources(reader: str, folder: Path) -> list[Files]:
    rows = [{"text": f"Grüße {n}\u2028", "pair": "x", "label": "ja", "more": [{"n": 1.5}, n]} for n in range(20)]
    lines = "".join(json.dumps(row) + "\r\n" for row in rows)
    if reader == "text":
        return [
            {"a.txt": ("Grüße\n\n" * 40).encode(encoding)} for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32")
        ]
    if reader == "jsonl":
        return [{"a.jsonl": lines.encode(encoding)} for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32")]
    if reader == "compressed":
        compress = (gzip.compress, bz2.compress, functools.partial(lzma.compress, preset=0), zstandard.compress)
        return [{name: pack(lines.encode())} for pack in compress for name in ("a.txt", "a.jsonl")]
    if reader == "json":
        value = {"a": rows[0], "b": [1e5, True, None, "\U0001f600"], "step": 1}
        return [{"a.json": json.dumps(value).encode() + b"\n"}]
    folder.mkdir(exist_ok=True)
    table = pyarrow.Table.from_pylist([{key: row[key] for key in ("text", "pair", "label")} for row in rows])
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=8)
    return [{"a.parquet": (folder / "a.parquet").read_bytes()}]


def damaged(files: Files, mutate: Callable[[bytes, random.Random], bytes], rng: random.Random) -> Files:
    """The files with one of them damaged."""
    name = rng.choice(sorted(files))
    return {**files, name: mutate(files[name], rng)}


_TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "He", "ll"]
_LLAMA_JSON = {
    "model_type": "llama", "vocab_size": 32, "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": True,
}  # fmt: skip


def _gguf_model(folder: Path) -> Path:
    """A model with its tokenizer."""
    rng = np.random.default_rng(0)
    model = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for key, value in (
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
    ):
        model.add_uint32(f"llama.{key}", value)
    model.add_uint32("llama.attention.head_count", 2)
    model.add_uint32("llama.attention.head_count_kv", 1)
    model.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    model.add_string("llama.rope.scaling.type", "linear")
    model.add_float32("llama.rope.scaling.factor", 2.0)
    model.add_string("tokenizer.ggml.model", "gpt2")
    model.add_string("tokenizer.ggml.pre", "smollm")
    model.add_array("tokenizer.ggml.tokens", [*_TOKENS, "<|end|>"])
    model.add_array("tokenizer.ggml.token_type", [*[1] * len(_TOKENS), 3])
    model.add_array("tokenizer.ggml.merges", ["H e", "l l"])
    model.add_uint32("tokenizer.ggml.eos_token_id", len(_TOKENS))
    for name in ("token_embd", "output_norm", "blk.0.attn_q", "blk.0.ffn_up"):
        model.add_tensor(f"{name}.weight", rng.standard_normal((2, 32)).astype(np.float32))
    return _written(model)


def _gguf_files(folder: Path) -> list[Path]:
    """A model with its tokenizer; many types of tensors; many types of metadata."""
    rng = np.random.default_rng(0)
    types = gguf.GGUFWriter(folder / "types.gguf", "llama")
    for kind in (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.Q6_K, Type.BF16, Type.F16):
        block, size = gguf.constants.GGML_QUANT_SIZES[kind]
        types.add_tensor(kind.name, rng.integers(0, 256, (2, size * max(1, 32 // block)), np.uint8), raw_dtype=kind)
    pairs = gguf.GGUFWriter(folder / "pairs.gguf", "llama")
    for number, kind in enumerate(("add_uint8", "add_int8", "add_uint16", "add_int16", "add_int32", "add_uint64")):
        getattr(pairs, kind)(f"a.{kind}", number)
    pairs.add_bool("a.flag", True)
    pairs.add_float64("a.real", 0.1)
    pairs.add_array("a.numbers", [1, 2, 3])
    pairs.add_array("a.flags", [True, False])
    pairs.add_custom_alignment(64)
    pairs.add_tensor("w", np.arange(6, dtype=np.float32))
    return [_gguf_model(folder), _written(types), _written(pairs)]


def _written(writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert writer.path is not None
    return Path(writer.path)
