"""The tokenizer of a folder or file: one place decides what it is, for training, scoring and writing alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dsjax.checkpoint.gguf_file import is_gguf, open_gguf
from dsjax.checkpoint.manifest import read_json
from dsjax.data.config import FileTokenizer
from dsjax.data.tokenizers.files import WORDPIECE_FILE, read_files, read_library, vocabulary_file, wordpiece
from dsjax.data.tokenizers.gguf import gguf_tokenizer
from dsjax.data.tokenizers.settings import SETTINGS_FILE, content_of
from dsjax.data.tokenizers.tokenizer import END_OF_TEXT, Tokenizer

_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|im_end|>", "[SEP]")
_BERT_NAMES = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def load_tokenizer(config: FileTokenizer) -> Tokenizer:
    """Load an existing tokenizer, as all files of its folder say: see settings.py and styles.py.

    Padding and truncation that it asks for are not applied. The end-of-text token is `config.end_of_text`, else the
    eos_token that the files or a GGUF file name, else the first of <|endoftext|>, </s>, <|im_end|>, [SEP] that it has,
    else the eos_token_id of generation_config.json or config.json.

    Raises:
        ValueError: no such file, not a tokenizer, no end-of-text token, or a decoder that is not supported.
    """
    path = _file_of(config)
    if is_gguf(path):
        library, values = gguf_tokenizer(open_gguf(path))
        return _made(library, path, values, end=config.end_of_text)
    library, values, settings = read_files(path)
    return _made(library, path, values, end=config.end_of_text, end_ids=settings.end_ids)


def load_as_before(config: FileTokenizer) -> Tokenizer | None:
    """Load it as dsjax did when tokenizer.json and tokenizer_config.json were all that counted, and texts had only
    an end: to go on with what was made then. None if it could not be read, so that nothing was made with it."""
    path = _file_of(config)
    try:
        if is_gguf(path):
            library, values = gguf_tokenizer(open_gguf(path), add_end=False)
        else:
            file = path.with_name(SETTINGS_FILE)
            values = read_json(file) if file.is_file() else {}
            library = wordpiece(path, {**values, **_BERT_NAMES}) if path.name == WORDPIECE_FILE else read_library(path)
        return _made(library, path, values, end=config.end_of_text, only_ended=True)
    except ValueError:
        return None


def _file_of(config: FileTokenizer) -> Path:
    path = Path(config.path).expanduser()
    file = vocabulary_file(path) if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"no tokenizer at {file}: give a tokenizer.json of the `tokenizers` library, a vocab.txt of WordPiece, a "
            "vocab.json of GPT-2 with its merges.txt, a folder with one of these, or a GGUF file"
        )
    return file


def _made(
    library: tokenizers.Tokenizer,
    path: Path,
    settings: Mapping[str, Any],
    *,
    end: str = "",
    end_ids: Sequence[int] = (),
    only_ended: bool = False,
) -> Tokenizer:
    """A tokenizer with the end-of-text token that is asked for, else that of its files."""
    vocabulary = library.get_vocab(with_added_tokens=True)
    name = end or content_of(settings.get("eos_token"))
    if not name:
        by_id = (library.id_to_token(number) for number in end_ids)
        name = next((known for known in _KNOWN_ENDS if known in vocabulary), "") or next(filter(None, by_id), "")
    if not name:
        raise ValueError(f"{path} has none of {', '.join(_KNOWN_ENDS)}: name its last token with tokenizer.end_of_text")
    try:
        return Tokenizer(library, end_of_text=name, settings=settings, only_ended=only_ended)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
