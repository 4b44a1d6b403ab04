"""Chat templates: outputs worked out by hand, and templates that mean harm."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.tokenizers import chat, chat_process
from dsjax.data.tokenizers.chat import ChatTemplate, chat_template

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hé?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]
RENDERED = {
    "chatml": (
        CHATML,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\nYes."
        "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama-2": (LLAMA2, "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHé? [/INST] Yes. </s><s>[INST] Why? [/INST]"),
    "zephyr": (
        ZEPHYR,
        "<|system|>\nBe brief.</s>\n<|user|>\nHé?</s>\n<|assistant|>\nYes.</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n",
    ),
    "what transformers offers": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%%') }}",
        '"Hé?""Yes.""Why?"%',
    ),
}


@pytest.mark.parametrize("name", RENDERED)
def test_what_was_worked_out_by_hand(name):
    template, text = RENDERED[name]
    assert ChatTemplate(template, "a model", TOKENS).render(TALK) == text


def test_without_a_prompt_for_the_answer():
    assert ChatTemplate(CHATML, "x").render(TALK[1:2], add_generation_prompt=False) == (
        "<|im_start|>user\nHé?<|im_end|>\n"
    )


HARM = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "2 s of CPU time"),
    "takes memory": ("{{ 'a' * 10 ** 10 }}", "more than 512 MB of memory"),
    "reaches for a class": ("{{ ''.__class__.__mro__ }}", r"no template may use: '__class__' of 'str'"),
    "reaches for it by a filter": ("{{ ''|attr('__class__') }}", r"'__class__' of 'str'"),
    "reaches for it by a format": ("{{ '{0.__class__}'.format('') }}", r"'__class__' of 'str'"),
    "changes the messages": ("{{ messages.append(1) }}", "'append' of 'list'"),
    "raises": ("{{ raise_exception('System role not supported') }}", "refuses these messages: System role not supp"),
    "is no template": ("\n{% if", "is not a Jinja template: line 2"),
    "lacks a variable": ("{{ a.b }}", "was not given: 'a' is undefined"),
    "divides by zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "writes without end": ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", "more than 4194304 characters"),
    "hides a name": ("{% set n = namespace(__class__=1) %}", "no template may use: '__class__' of a namespace"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
    "is huge": ("a" * (chat.MAX_TEMPLATE_CHARACTERS + 1), "262145 characters; at most 262144 are allowed"),
}


@pytest.mark.parametrize("name", HARM)
def test_a_template_that_does_harm(name):
    template, said = HARM[name]
    start = time.monotonic()
    with pytest.raises(ValueError, match=said) as caught:
        ChatTemplate(template, "that model").render(TALK)
    assert str(caught.value).startswith("the chat template of that model ")
    assert time.monotonic() - start < chat_process.WALL_SECONDS + 5


def test_a_child_that_is_kept_waiting(monkeypatch):
    monkeypatch.setattr(chat_process, "WALL_SECONDS", 0.05)
    with pytest.raises(ValueError, match=r"the chat template of x was stopped: it took more than 0.05 s"):
        ChatTemplate(HARM["loops"][0], "x").render(TALK)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=40)), min_size=1, max_size=5))
def test_no_message_is_read_as_a_template(talk):
    messages = [{"role": role, "content": "{{ 1 }}" + content} for role, content in talk]
    want = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert ChatTemplate(CHATML, "x").render(messages, add_generation_prompt=False) == want


def test_templates_in_settings():
    assert chat_template({"eos_token": "</s>"}, "x") is None
    settings = {"eos_token": {"content": "</s>"}, "bos_token": None, "unk_token": "?", "add_bos_token": True}
    template = chat_template({**settings, "chat_template": "one{{ eos_token }}{{ unk_token }}"}, "x")
    assert template is not None and template.tokens == {"eos_token": "</s>", "unk_token": "?"}
    assert template.render([]) == "one</s>?" and template.turn_ends() == []
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d<|im_end|>"}]
    template = chat_template({"chat_template": named}, "x")
    assert template is not None and template.text == "d<|im_end|>" and template.turn_ends() == ["<|im_end|>"]


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ([{"name": "a", "template": "b"}], "that model: none of its chat templates is called 'default': a"),
        (3, "that model: chat_template must be a string or a list"),
        ([{"name": "a"}], "must be a string or a list"),
    ],
)
def test_settings_that_are_wrong(stored, said):
    with pytest.raises(ValueError, match=said):
        chat_template({"chat_template": stored}, "that model")
