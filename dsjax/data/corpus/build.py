"""From sources to a tokenised corpus: `build_corpus` builds it once and afterwards only opens it.

The corpus lies in a folder named by a hash of the data and of every setting that decides its tokens. It is built
beside that folder, in `<folder>.partial`, part by part: a part is written under a temporary name and renamed when
complete, so a build that is killed goes on where it was. The finished corpus is renamed into place in one step. Of
several processes that want the same corpus one builds and the others wait for it.

A document goes to validation when a hash of its text falls below `validation_fraction`: equal documents always go the
same way, and adding documents moves none.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from dsjax.data.config import (
    DataConfig,
    FileTokenizer,
    SourceConfig,
    TokensSource,
)
from dsjax.data.corpus.assemble import build_folder
from dsjax.data.corpus.identity import identity, known_key
from dsjax.data.corpus.key import joined_hash, key_of
from dsjax.data.corpus.parts import BuildPlan, PlannedSource, Role
from dsjax.data.corpus.store import CorpusFolder, TokenStore, hash_of, open_corpus_folder
from dsjax.data.rows.formats import task_of
from dsjax.data.rows.labels import CUT
from dsjax.data.text.read import on_stderr
from dsjax.data.tokenizers.choice import choose_tokenizer, note_of
from dsjax.data.tokenizers.load import load_as_before
from dsjax.data.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised documents, split into train and validation, and what made them."""

    train: list[TokenStore]
    """One store per source that has training documents; a `tokens` source gives those in its folder."""
    train_weights: list[float]
    """Share of each train store's rows in the mixture, before normalisation."""
    validation: list[TokenStore]
    """Empty when validation_fraction is 0 and there are no validation sources."""
    tokenizer: Tokenizer
    hash: str
    """Identifies data, splits and tokenizer; not the weights, the row length or the order."""
    folder: Path
    """Folder of the corpus (the first of several)."""
    cache_dir: Path
    """Folder of indices derived from it."""
    labels: tuple[str, ...] = ()
    """Names of the classes, of the task classification."""
    note: str = ""
    """A remark on its ids, for the user; '' if there is none."""

    @property
    def train_tokens(self) -> int:
        """Training tokens, end-of-text tokens among them."""
        return sum(store.num_tokens for store in self.train)

    @property
    def num_cut(self) -> int:
        """Labelled texts that were longer than a row."""
        stores = self.train + self.validation
        return sum(int(store.classes[:, CUT].sum()) for store in stores if store.classes is not None)

    @functools.cached_property
    def document_names(self) -> dict[str, list[str]]:
        """Names of the documents of each split, in the order of the stores."""
        splits = {"train": self.train, "validation": self.validation}
        return {split: [name for store in stores for name in store.document_names] for split, stores in splits.items()}


def cache_folder(config: DataConfig) -> Path:
    """`config.cache_dir`, or $XDG_CACHE_HOME/dsjax, or ~/.cache/dsjax."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsjax"


def build_corpus(
    config: DataConfig,
    *,
    progress: bool = False,
    workers: int | None = None,
    out: str | os.PathLike | None = None,
    begun: str = "",
    report: Callable[[str], None] = on_stderr,
) -> Corpus:
    """Tokenise the sources of `config`, or open what an earlier call made of the same data.

    Args:
        config: sources, tokenizer, split.
        progress: show a bar or lines on stderr.
        workers: threads that tokenise; None takes the number of CPUs.
        out: put the corpus into this folder instead of the cache, to be read by a source of kind `tokens`.
        begun: the `hash` of the corpus of a run that goes on; one that was made when tokenizers were read otherwise is
            made, or opened, as it was then, and one of large files that were identified by their times keeps its hash.
        report: told of files that are skipped, and of documents that are left out when they are tokenised.

    Raises:
        ValueError: a path that does not exist or is empty, text that cannot be read (with its place), a split that
            leaves train or validation without documents, `tokens` folders that are damaged or whose tokenizer is not
            the configured one, an `out` folder that holds something else; of the task classification a source without
            labels; of the task masked a tokenizer without [MASK].

    Example:
        >>> import tempfile, pathlib
        >>> from dsjax.data.config import ByteTokenizer, TextSource
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "a.txt").write_text("hello")
        ...     corpus = build_corpus(DataConfig(sources=(TextSource(path=folder),), tokenizer=ByteTokenizer(),
        ...                                      validation_fraction=0, cache_dir=folder + "/cache"))
        ...     corpus.train[0].tokens.tolist()
        [104, 101, 108, 108, 111, 256]
    """
    cache_dir = cache_folder(config)
    _check_labels(config)
    folders = {path: open_corpus_folder(Path(path).expanduser()) for path in _token_paths(config)}
    if out is not None and folders:
        raise ValueError("a source of kind tokens is built already: leave it out of what is built into a folder")
    tokenizer, configured = choose_tokenizer(config.tokenizer, folders, task=task_of(config))
    sources = _plan_sources(config)
    built, former = None, ""
    for planned in sources:
        for line in planned.source.remarks():
            report(line)
    if sources:
        contents = [identity(s.source, cache_dir, progress=progress) for s in sources]
        times = contents if all(s.source.is_small for s in sources) else [s.source.fingerprint() for s in sources]
        place = cache_dir / "corpora" if out is None else Path(out).expanduser()

        def keys(tokenizer: Tokenizer | None) -> tuple[str, str]:
            """The corpus's key, and the one that it had when large files were identified by their times."""
            key = key_of(sources, config, tokenizer, contents)
            earlier = key_of(sources, config, tokenizer, times)
            return (key if key == earlier else known_key(place, key, earlier)), earlier

        if begun and isinstance(config.tokenizer, FileTokenizer) and tokenizer is not None:
            tokenizer = _as_begun(begun, tokenizer, config, folders, keys)
        key, former = keys(tokenizer)
        plan = BuildPlan(
            key=key,
            sources=sources,
            tokenizer=tokenizer or config.tokenizer,
            validation_fraction=config.validation_fraction,
            undecodable=config.undecodable,
            cache_dir=cache_dir,
            folder=Path(out).expanduser() if out is not None else cache_dir / "corpora" / key[:32],
            report=report,
            task=task_of(config),
            length=config.sequence_length,
        )
        built = build_folder(plan, progress=progress, workers=workers or os.cpu_count() or 1)
    corpus = _compose(config, built, folders, cache_dir)
    if former and built is not None:
        others = [folders[path].hash for path in _token_paths(config)]
        if joined_hash([hash_of(former, built.tokenizer), *others]) == begun:
            corpus = dataclasses.replace(corpus, hash=begun)
    corpus = dataclasses.replace(corpus, note=note_of(corpus.tokenizer, configured, task=task_of(config)))
    if task_of(config) == "masked" and corpus.tokenizer.mask_token is None:
        raise ValueError(
            f"the task masked needs a tokenizer with a token [MASK] or <mask>; the one of kind {config.tokenizer.kind} "
            "has none: take an encoder's own, data.tokenizer={kind: file, path: MODEL}"
        )
    return corpus


def _check_labels(config: DataConfig) -> None:
    """Refuse sources that do not fit the task.

    Raises:
        ValueError: names the first of them.
    """
    task = task_of(config)
    for source in config.sources + config.validation_sources:
        keys = None if isinstance(source, TokensSource) else source.keys
        if task != "classification" and keys is not None and (keys.label or keys.pair):
            raise ValueError(
                f"a source of kind {source.kind} names a label or a second text, which the task {task} does not use; "
                "leave them out, or set model.task=classification"
            )
        if task == "classification" and (keys is None or not keys.label):
            raise ValueError(
                f"the task classification needs labels, which a source of kind {source.kind} "
                + ("gives with `label: KEY`" if keys is not None else _LABELLED_KINDS)
            )


_LABELLED_KINDS = "does not have; use one of kind jsonl or parquet with `label: KEY`"


def _token_paths(config: DataConfig) -> list[str]:
    return [source.path for source in config.sources + config.validation_sources if isinstance(source, TokensSource)]


def _as_begun(
    begun: str,
    tokenizer: Tokenizer,
    config: DataConfig,
    folders: dict[str, CorpusFolder],
    keys: Callable[[Tokenizer], tuple[str, str]],
) -> Tokenizer:
    """The tokenizer with which a corpus has the hash `begun`; the one given if there is none."""
    assert isinstance(config.tokenizer, FileTokenizer), "the others have always been read alike"
    others = [folders[path].hash for path in _token_paths(config)]
    for one in (tokenizer, load_as_before(config.tokenizer)):
        if one is not None and begun in [joined_hash([hash_of(key, one), *others]) for key in keys(one)]:
            return one
    return tokenizer


def _plan_sources(config: DataConfig) -> list[PlannedSource]:
    def planned(sources: Sequence[SourceConfig], role: Role) -> list[PlannedSource]:
        return [PlannedSource(s.open(), role) for s in sources if not isinstance(s, TokensSource)]

    if config.validation_sources:
        return planned(config.sources, "train") + planned(config.validation_sources, "validation")
    return planned(config.sources, "split" if config.validation_fraction else "train")


def _compose(
    config: DataConfig, built: CorpusFolder | None, folders: dict[str, CorpusFolder], cache_dir: Path
) -> Corpus:
    """Put stores in the order of the sources; a folder's weight is shared among its stores by their size."""
    train: list[TokenStore] = []
    weights: list[float] = []
    validation: list[TokenStore] = []
    texts = iter(built.train if built else ())
    for source in config.sources:
        stores = list(folders[source.path].train) if isinstance(source, TokensSource) else [next(texts)]
        stores = [store for store in stores if store.num_documents]
        total = sum(store.num_tokens for store in stores)
        train += stores
        weights += [source.weight * (store.num_tokens / total) for store in stores]
        if isinstance(source, TokensSource) and not config.validation_sources:
            validation += folders[source.path].validation
    validation += built.validation if built else ()
    for source in config.validation_sources:
        if isinstance(source, TokensSource):
            validation += [*folders[source.path].train, *folders[source.path].validation]
    if not train:
        raise ValueError("the sources hold no training documents")
    opened = ([built] if built else []) + [folders[path] for path in _token_paths(config)]
    return Corpus(
        train=train,
        train_weights=weights,
        validation=[store for store in validation if store.num_documents],
        tokenizer=opened[0].tokenizer,
        hash=joined_hash([folder.hash for folder in opened]),
        folder=opened[0].path,
        cache_dir=cache_dir,
        labels=built.labels if built else (),
    )
