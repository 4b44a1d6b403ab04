"""Chat templates: messages to the text that a model was trained on, by the Jinja template that came with it.

A template is a program of somebody else. It is rendered in Jinja's sandbox, in another process (chat_process.py), which
has 2 s of CPU time for it and 512 MB of address space. It gets template and messages as JSON through a pipe and
can write nothing but its answer.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dsjax.data.tokenizers.chat_process import MAX_OUTPUT_CHARACTERS, MEMORY_BYTES, PROCESS, ChildError
from dsjax.data.tokenizers.settings import special_tokens

MAX_TEMPLATE_CHARACTERS = 256 * 1024

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>", "<|endoftext|>", "</s>")
"""Tokens with which templates end a turn."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
_MESSAGES = {
    "syntax": "is not a Jinja template",
    "security": "was stopped: it reaches for an attribute or a method that no template may use",
    "undefined": "uses something that it was not given",
    "raised": "refuses these messages",
    "memory": f"was stopped: it needs more than {MEMORY_BYTES // 2**20} MB of memory",
    "depth": "was stopped: it is nested too deeply",
    "output": f"was stopped: it writes more than {MAX_OUTPUT_CHARACTERS} characters",
    "failed": "failed",
}


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a model.

    Attributes:
        text: in Jinja.
        origin: its file or model, for messages to the user.
        tokens: its variables bos_token, eos_token and so on.

    Example:
        >>> template = ChatTemplate("{% for m in messages %}[{{ m.role }}] {{ m.content }}\\n{% endfor %}", "here")
        >>> template.render([{"role": "user", "content": "Hi"}])
        '[user] Hi\\n'
    """

    text: str
    origin: str
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Render a conversation as text.

        Args:
            messages: each with "role" ("system", "user", "assistant") and "content", in order.
            add_generation_prompt: end where the assistant is to go on.

        Raises:
            ValueError: the template is none, refuses the messages, or was stopped (time, memory, attributes, output).
        """
        if len(self.text) > MAX_TEMPLATE_CHARACTERS:
            raise self._error(
                f"was not tried: it has {len(self.text)} characters; at most {MAX_TEMPLATE_CHARACTERS} are allowed"
            )
        variables = {
            **self.tokens,
            "messages": _normal(messages),
            # As transformers passes them where there are none.
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            answer = PROCESS.render(self.text, variables)
        except ChildError as error:
            raise self._error(str(error)) from error
        if "text" in answer:
            return answer["text"]
        raise self._error(_MESSAGES[answer["error"]] + (f": {answer['message']}" if answer["message"] else ""))

    def turn_ends(self) -> list[str]:
        """List the usual tokens at the end of a turn that the template writes.

        Example:
            >>> ChatTemplate("{{ messages[0].content }}<|im_end|>", "here").turn_ends()
            ['<|im_end|>']
        """
        return [token for token in TURN_ENDS if token in self.text]

    def _error(self, text: str) -> ValueError:
        return ValueError(f"the chat template of {self.origin} {text}")


def chat_template(settings: Mapping[str, Any], origin: str) -> ChatTemplate | None:
    """Find the template in a tokenizer's settings (`Tokenizer.settings`); None if there is none.

    Of several named ones that called "default" is taken.

    Raises:
        ValueError: a chat_template that is none, or several without a default.

    Example:
        >>> chat_template({"chat_template": "{{ eos_token }}", "eos_token": "</s>"}, "here").render([])
        '</s>'
    """
    text = _chosen(settings.get("chat_template"), origin)
    if text is None:
        return None
    named = {name: token for name, token in special_tokens(settings).items() if not name.isdecimal()}
    return ChatTemplate(text, origin, named)


def _normal(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers gives them to a template: without keys that are None, reasoning under all its names."""
    result = []
    for message in messages:
        given = {key: value for key, value in message.items() if value is not None}
        reasoning = next((given[key] for key in _REASONING if key in given), None)
        result.append(given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning})
    return result


def _chosen(stored: Any, origin: str) -> str | None:
    """One template of those in tokenizer_config.json: a string, or a list of {"name": ..., "template": ...}."""
    if stored is None or isinstance(stored, str):
        return stored
    match stored:
        case [*named] if all(isinstance(item, dict) and isinstance(item.get("template"), str) for item in named):
            found = {str(item.get("name")): item["template"] for item in named}
        case _:
            raise ValueError(f"{origin}: chat_template must be a string or a list of objects with name and template")
    if "default" not in found:
        raise ValueError(f"{origin}: none of its chat templates is called 'default': {', '.join(sorted(found))}")
    return found["default"]
