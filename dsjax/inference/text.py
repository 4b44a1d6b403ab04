"""Text from a trained model: prompts, plain or as a conversation, and what the model writes after them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from flax import nnx

from dsjax.data.rows.single_rows import padded
from dsjax.data.tokenizers.tokenizer import Tokenizer
from dsjax.inference.open import TrainedModel
from dsjax.models.families.build import abstract
from dsjax.models.generate import Generation, stream
from dsjax.models.transformer import Transformer

StoppedBy = Literal["end of text", "stop string", "max_new_tokens"]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as token ids.

    Attributes:
        text: as the user gave it.
        ids: its tokens.
        shown: what of it belongs before the model's text when that is shown.
        stop_tokens: ids that end the model's text, beside its own.
    """

    text: str
    ids: list[int]
    shown: str
    stop_tokens: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class GeneratedText:
    """Text that a model generated after a prompt.

    Attributes:
        text: without the prompt, and without what ended it.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens that were written, an end-of-text token left out.
        stopped_by: why it ends there.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    stopped_by: StoppedBy


def plain_prompt(trained: TrainedModel, text: str) -> Prompt:
    """A text to go on with.

    Raises:
        ValueError: it has no tokens.
    """
    return Prompt(text, plain_ids(trained.tokenizer, text), shown=text)


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text to go on with, after what the tokenizer wants before every text.

    Raises:
        ValueError: it has none.
    """
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError(
            f"the tokenizer has no token for the prompt {text!r}: give another one"
            if text
            else "the prompt is empty; give at least one character"
        )
    return [*tokenizer.begin, *ids]


def chat_prompt(trained: TrainedModel, text: str, *, system: str | None = None) -> Prompt:
    """A user's message, after a system message if one is given, as the model's chat template puts it.

    Raises:
        ValueError: the model has no template, it does not accept these messages, or it gives no tokens.
    """
    if trained.chat is None:
        raise ValueError(
            f"{trained.path} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
            "leave --chat out, or put the model's own template there"
        )
    messages = [] if system is None else [{"role": "system", "content": system}]
    ids = trained.tokenizer.encode_rendered(trained.chat.render([*messages, {"role": "user", "content": text}]))
    if not ids:
        raise ValueError(f"the chat template of {trained.path} gives an empty prompt")
    ends = (trained.tokenizer.token_id(name) for name in trained.chat.turn_ends())
    return Prompt(text, ids, shown="", stop_tokens=frozenset(end for end in ends if end is not None))


def without_unused_tokens(trained: TrainedModel) -> Transformer:
    """The model without the rows of its tables that the tokenizer has no token for, so that it never writes them.

    An embedding is often rounded up to a size that divides a mesh.
    """
    model, size = trained.model, trained.tokenizer.vocab_size
    if size == model.config.vocab_size:
        return model
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for name in {"embed", "unembed"} & params.keys():
        params[name] = {**params[name], "table": params[name]["table"][:size]}
    graph, _ = nnx.split(abstract(dataclasses.replace(model.config, vocab_size=size)), nnx.Param)
    return nnx.merge(graph, params)


def generate_text(
    trained: TrainedModel,
    prompts: Sequence[Prompt],
    *,
    options: Generation,
    stop: Sequence[str] = (),
    show: Callable[[str], None],
) -> list[GeneratedText]:
    """Let a model go on with prompts, all of them as one batch, until each text ends or is long enough.

    Args:
        trained: the model.
        prompts: from `plain_prompt` or `chat_prompt`; their lengths may differ.
        options: how much, and how.
        stop: a text ends before the first of these strings, wherever tokens begin and end.
        show: told of each prompt and then of each piece of its text; the first as it is made, each other one as soon
            as those before it have ended, after an empty line.

    Raises:
        ValueError: a prompt that leaves too few positions, an empty stop string, a model that writes no text.
    """
    if not prompts or "" in stop:
        raise ValueError("a stop string is empty" if prompts else "there is no prompt; give at least one")
    rows = [_Row(prompt, trained, stop) for prompt in prompts]
    tokens = [prompt.ids for prompt in prompts]
    ids, mask = padded(tokens, max(map(len, tokens)))
    front = 0
    for tokens in stream(without_unused_tokens(trained), ids, options=options, attention_mask=mask):
        for row, token in zip(rows, tokens, strict=True):
            row.feed(int(token))
        front = _show(rows, front, show)
        if all(row.stopped_by for row in rows):
            break
    for row in rows:
        row.finish()
    _show(rows, front, show)
    return [row.result() for row in rows]


def _show(rows: list["_Row"], front: int, show: Callable[[str], None]) -> int:
    """Show what is new of the row in front, and of those behind it that it has held up; the row that is now there."""
    while front < len(rows):
        for piece in rows[front].new:
            show(piece)
        rows[front].new.clear()
        if not rows[front].finished:
            return front
        front += 1
        if front < len(rows):
            show("\n\n")
    return front


class _Row:
    """One prompt's text as it grows."""

    def __init__(self, prompt: Prompt, trained: TrainedModel, stop: Sequence[str]) -> None:
        self.prompt = prompt
        self.new = [prompt.shown]
        """Pieces that nobody was shown yet."""
        self.stopped_by: StoppedBy | None = None
        self.finished = False
        self._decoder, self._cutter = trained.tokenizer.stream_decoder(), StopStrings(stop)
        self._stop_tokens = trained.stop_tokens | prompt.stop_tokens
        self._pieces: list[str] = []
        self._count = 0

    def feed(self, token: int) -> None:
        if self.stopped_by is not None:
            return
        if token in self._stop_tokens:
            self.stopped_by = "end of text"
            self.finish()
            return
        self._count += 1
        self._add(self._cutter.feed(self._decoder.feed(token)))
        if self._cutter.found:
            self.stopped_by = "stop string"
            self.finish()

    def finish(self) -> None:
        """Nothing more comes: what was held back is text."""
        if self.finished:
            return
        self.finished = True
        self._add(self._cutter.feed(self._decoder.finish()) + self._cutter.finish())
        if self.stopped_by is None and self._cutter.found:
            self.stopped_by = "stop string"

    def result(self) -> GeneratedText:
        why = self.stopped_by or "max_new_tokens"
        return GeneratedText("".join(self._pieces), len(self.prompt.ids), self._count, why)

    def _add(self, piece: str) -> None:
        self._pieces.append(piece)
        self.new.append(piece)


class StopStrings:
    """Lets text through up to the first of some strings, however the text is cut into pieces.

    What may be the beginning of such a string is held back until it is known. Of several strings the one that is
    complete first counts; of those, the longest.

    Example:
        >>> cutter = StopStrings(["END"])
        >>> [cutter.feed(piece) for piece in ("a E", "NE", "N", "Db")], cutter.found
        (['a ', 'EN', '', ''], True)
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found = False
        self._strings = tuple(strings)
        self._held = ""

    def feed(self, piece: str) -> str:
        """The text that is certain by now; '' from the stop string on."""
        if self.found:
            return ""
        text = self._held + piece
        places = [(at + len(string), at) for string in self._strings if (at := text.find(string)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)[1]]
        longest = max(map(len, self._strings), default=0) - 1
        keep = next((n for n in range(min(longest, len(text)), 0, -1) if self._begins(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text that was held back and turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held

    def _begins(self, end: str) -> bool:
        return any(string.startswith(end) for string in self._strings)
