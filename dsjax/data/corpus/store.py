"""A corpus folder: memory-mapped tokens, document offsets and names, a manifest, and the tokenizer that made them.

    corpus.json                the manifest: format, hash, and for every store its counts
    tokenizer/                 see `dsjax.data.tokenizers.tokenizer`
    train-0.tokens             uint16 or uint32, little-endian, documents one after another, each between the ids of
                               `Tokenizer.text_frame`: an end-of-text token, of some tokenizers also one before it
    train-0.offsets            int64 [documents + 1], where each document begins; the last is the number of tokens
    train-0.classes            int32 [documents, 3], of labelled documents only: see `TokenStore.classes`
    train-0.names              a JSON string a line: where each document came from

There is one store for each source and split.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from jaxtyping import Int32, Int64, Integer

from dsjax.checkpoint.manifest import read_json
from dsjax.data.tokenizers.tokenizer import Tokenizer
from dsjax.observe.untrusted import parse_json

FORMAT = 1
MANIFEST = "corpus.json"


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStore:
    """The documents of one source and split, memory-mapped and read-only.

    Example:
        >>> tokens = np.array([5, 6, 0, 7, 0], np.uint16)
        >>> store = TokenStore(tokens=tokens, offsets=np.array([0, 3, 5]), hash="x")
        >>> store.num_documents, store.document(1).tolist()
        (2, [7, 0])
    """

    tokens: Integer[np.ndarray, " tokens"]
    """All documents one after another, uint16 or uint32 in a file, each ending with the end-of-text token; of some
    tokenizers each begins with a special token, too."""
    offsets: Int64[np.ndarray, " D"]
    """Beginning of each document in `tokens`; the last entry is the number of tokens. D: documents, and one."""
    hash: str
    """Identifier of the content, for indices derived from it."""
    num_bytes: int = 0
    """UTF-8 bytes of the text."""
    names_path: Path | None = None
    """The file of document names."""
    classes: Int32[np.ndarray, "documents 3"] | None = None
    """Columns of labelled documents: number of the class, tokens of the second text, whether the text was longer."""

    @property
    def num_tokens(self) -> int:
        """Tokens, the end-of-text tokens among them."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents; none of them is empty."""
        return len(self.offsets) - 1

    @functools.cached_property
    def document_names(self) -> list[str]:
        """Origin of each document: a file, or a file and a line, row or number in it."""
        if self.names_path is None:
            return [str(index) for index in range(self.num_documents)]
        with self.names_path.open(encoding="utf-8") as lines:
            return [parse_json(line, f"{self.names_path}:{n}", lenient=True) for n, line in enumerate(lines, 1)]

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, its end-of-text token included; a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class StoreWriter:
    """Writes one store's files, document runs in order."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, *, labelled: bool = False) -> None:
        self._name = name
        self._dtype = dtype
        self._tokens: BinaryIO = (folder / f"{name}.tokens").open("wb")
        self._offsets: BinaryIO = (folder / f"{name}.offsets").open("wb")
        self._names: TextIO = (folder / f"{name}.names").open("w", encoding="utf-8")
        self._classes: BinaryIO | None = (folder / f"{name}.classes").open("wb") if labelled else None
        self._offsets.write(np.zeros(1, "<i8").tobytes())
        self.num_tokens = self.num_documents = self.num_bytes = 0

    def append(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        *,
        names: Iterable[str],
        num_bytes: int,
        classes: np.ndarray | None = None,
    ) -> None:
        """Add documents: their tokens one after another, the number of tokens of each, and their names."""
        self._tokens.write(np.ascontiguousarray(tokens, self._dtype.newbyteorder("<")).data)
        self._offsets.write((self.num_tokens + np.cumsum(lengths, dtype="<i8")).astype("<i8").tobytes())
        assert (classes is None) == (self._classes is None), "labels of all documents or of none"
        if classes is not None and self._classes is not None:
            self._classes.write(classes.astype("<i4").tobytes())
        self._names.writelines(json.dumps(name) + "\n" for name in names)
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)
        self.num_bytes += num_bytes

    def close(self) -> dict[str, Any]:
        """Bring everything to the disk and return the manifest's entry."""
        for file in (self._tokens, self._offsets, self._names, *([self._classes] if self._classes else [])):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return {
            "name": self._name,
            "dtype": self._dtype.name,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
        }


@dataclasses.dataclass(frozen=True)
class CorpusFolder:
    """An opened corpus folder."""

    path: Path
    key: str
    """Hash of the data and settings it was built from."""
    hash: str
    """The key and the tokenizer's hash in one."""
    tokenizer: Tokenizer
    train: tuple[TokenStore, ...]
    """One per source."""
    validation: tuple[TokenStore, ...]
    """One per source that has validation documents."""
    labels: tuple[str, ...] = ()
    """Names of the classes, if documents have labels."""


def write_manifest(
    folder: Path,
    *,
    key: str,
    tokenizer: Tokenizer,
    stores: dict[str, list[dict[str, Any]]],
    labels: list[str] | None = None,
) -> None:
    """Write corpus.json and the tokenizer; `stores` maps 'train' and 'validation' to `StoreWriter.close` entries."""
    tokenizer.save(folder / "tokenizer")
    content = {
        "format": FORMAT,
        "key": key,
        "hash": hash_of(key, tokenizer),
        "tokenizer_hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        **({"labels": labels} if labels is not None else {}),
        **stores,
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def hash_of(key: str, tokenizer: Tokenizer) -> str:
    """The hash of a corpus of this key and tokenizer."""
    return hashlib.sha256(f"{key} {tokenizer.hash}".encode()).hexdigest()


def open_corpus_folder(path: Path) -> CorpusFolder:
    """Open what `dsjax data build` wrote, and check every file's size against the manifest.

    Raises:
        ValueError: not such a folder, another format, a missing or truncated file, a changed tokenizer.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise ValueError(
            f"{path} is not a corpus folder (it has no {MANIFEST}): write one with: dsjax data build CONFIG --out DIR"
        )
    try:
        manifest = _read_manifest(manifest_path)
        if manifest["format"] != FORMAT:
            raise ValueError(
                f"{manifest_path} has format {manifest['format']}; this version reads {FORMAT}: build again"
            )
        key, corpus_hash, tokenizer_hash = manifest["key"], manifest["hash"], manifest["tokenizer_hash"]
        labels = manifest.get("labels")
        labelled = labels is not None
        train = [_open_store(path, entry, corpus_hash, labelled) for entry in manifest["train"]]
        validation = [_open_store(path, entry, corpus_hash, labelled) for entry in manifest["validation"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{manifest_path} is damaged ({error!r}): remove {path} and build again") from error
    tokenizer = Tokenizer.load(path / "tokenizer")
    if tokenizer.hash != tokenizer_hash:
        raise ValueError(f"{path / 'tokenizer'} is not the tokenizer that made the tokens beside it: build again")
    return CorpusFolder(
        path=path,
        key=key,
        hash=corpus_hash,
        tokenizer=tokenizer,
        train=tuple(train),
        validation=tuple(validation),
        labels=tuple(labels or ()),
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove {path.parent} and build again") from error


def _open_store(folder: Path, entry: dict[str, Any], corpus_hash: str, labelled: bool) -> TokenStore:
    name, documents = entry["name"], entry["num_documents"]
    tokens = _map(folder / f"{name}.tokens", np.dtype(entry["dtype"]).newbyteorder("<"), entry["num_tokens"])
    offsets = _map(folder / f"{name}.offsets", np.dtype("<i8"), documents + 1)
    if offsets[0] != 0 or offsets[-1] != len(tokens):
        raise ValueError(f"{folder / name}.offsets does not fit {name}.tokens: remove {folder} and build again")
    names = folder / f"{name}.names"
    if not names.is_file():
        raise ValueError(f"{names} is missing: remove {folder} and build again")
    return TokenStore(
        tokens=tokens,
        offsets=offsets,
        hash=hashlib.sha256(f"{corpus_hash} {name}".encode()).hexdigest(),
        num_bytes=entry["num_bytes"],
        names_path=names,
        classes=_map(folder / f"{name}.classes", np.dtype("<i4"), 3 * documents).reshape(-1, 3) if labelled else None,
    )


def _map(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    expected = length * dtype.itemsize
    if not path.is_file():
        raise ValueError(f"{path} is missing: remove {path.parent} and build again")
    if path.stat().st_size != expected:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, {expected} expected: remove {path.parent} and build again"
        )
    if length == 0:
        return np.zeros(0, dtype)
    # A plain view: slicing an np.memmap costs several times as much as slicing an ndarray.
    return np.asarray(np.memmap(path, dtype, "r"))
