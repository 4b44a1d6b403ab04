"""Choice of a corpus's tokenizer: the configured one, or that of tokens that exist already."""

from collections.abc import Mapping
from typing import NamedTuple

from dsjax.data.config import ByteTokenizer, DataTask, FileTokenizer, TokenizerConfig
from dsjax.data.corpus.store import CorpusFolder
from dsjax.data.tokenizers.load import load_as_before, load_tokenizer
from dsjax.data.tokenizers.tokenizer import Tokenizer, byte_tokenizer


class Choice(NamedTuple):
    """The tokenizer of a corpus, and the configured one."""

    made: Tokenizer | None
    """The tokenizer that makes the corpus; None when it has to be trained."""
    configured: Tokenizer | None
    """The tokenizer that the config names; None when it is to be trained."""


def choose_tokenizer(config: TokenizerConfig, folders: Mapping[str, CorpusFolder], *, task: DataTask) -> Choice:
    """Choose the tokenizer of a corpus, as far as it is known before the text is read.

    Tokens that were made before what a tokenizer puts around a text counted are gone on with: all texts beside them
    get the ids that they would have got then.

    Args:
        config: what is configured.
        folders: of `dsjax data build`, by their paths.
        task: what the rows are for.

    Raises:
        ValueError: tokens that two different tokenizers made, or another one than is configured.
    """
    wanted = None
    if isinstance(config, ByteTokenizer):
        wanted = byte_tokenizer()
    elif isinstance(config, FileTokenizer):
        wanted = load_tokenizer(config)
    if not folders:
        return Choice(wanted, wanted)
    (first, made), *others = ((path, folder.tokenizer) for path, folder in folders.items())
    for path, other in others:
        if not _same(made, other, task):
            raise ValueError(
                f"the tokens in {path} {_otherwise(made, other)} that of {first}: build them again with it"
            )
    if wanted is None or _same(wanted, made, task):
        return Choice(made, wanted)
    before = load_as_before(config) if isinstance(config, FileTokenizer) else None
    if before is not None and _same(before, made, task):
        return Choice(made, wanted)
    name = f"the configured tokenizer (kind {config.kind})"
    raise ValueError(f"the tokens in {first} {_otherwise(made, wanted)} {name}: build them again with it")


def _same(one: Tokenizer, other: Tokenizer, task: DataTask) -> bool:
    """Whether two tokenizers give a text the same ids."""
    return one.hash == other.hash and (task != "language_model" or one.text_frame == other.text_frame)


def _otherwise(one: Tokenizer, other: Tokenizer) -> str:
    return "were made by another tokenizer than" if one.hash != other.hash else "have others around each text than by"


def note_of(tokenizer: Tokenizer, configured: Tokenizer | None, *, task: DataTask) -> str:
    """Write a remark on the ids of a corpus, for the user; '' if they are those of today."""
    if task == "language_model" and tokenizer.missing_tokens:
        how = f"without the {tokenizer.missing_tokens} that their tokenizer puts around a text"
    elif configured is not None and tokenizer.hash != configured.hash:
        how = "when tokenizer.json and tokenizer_config.json were all that counted of a tokenizer"
    else:
        return ""
    return f"these data were begun {how}; they go on with the ids of then. New runs and folders of tokens have others"
