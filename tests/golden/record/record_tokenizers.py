"""What transformers 5 makes of a tokenizer's files, and what its chat templates write. See README.md beside this.

    python record_tokenizers.py ../tokenizers.json

The file has three parts:

    libraries   name -> content of a tokenizer.json
    folders     each with the name of its tokenizer.json (or null), its other files, and what transformers makes of it:
                class, the ids of `texts` with what stands around them, the ids of `rendered` as a chat template
                writes it, and the special tokens by their roles
    chats       templates with the files beside them, and what apply_chat_template writes for the same messages
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TALK = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "Hé?", "tool_calls": None},
    {"role": "assistant", "content": "Yes.", "reasoning": "why not"},
    {"role": "user", "content": "Why?"},
]


def wordpiece(*, lowercase=True, marks=True) -> tokenizers.Tokenizer:
    tokens = [*SPECIAL, "hello", "HELLO", "h", "##e", "é", "e", "中", "中文", "##文", "文"]
    library = tokenizers.Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens(SPECIAL)
    if marks:
        library.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return library


def byte_level(*, prefix=False, begin=False, end=False, added=("<s>", "</s>")) -> tokenizers.Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *"abcdehilo123", "Ġ", "ab"]
    library = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges=[("a", "b")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([*added])
    if begin or end:
        single = ["<s>"] * begin + ["$A"] + ["</s>"] * end
        second = ["<s>:1"] * begin + ["$B:1"] + ["</s>:1"] * end
        library.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, *second], special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return library


def sentencepiece() -> tokenizers.Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdehilo", "▁a", "▁▁", "<tool>"]
    library = tokenizers.Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(tokens)},
            merges=[("▁", "a"), ("▁", "▁")],
            fuse_unk=True,
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.add_tokens([AddedToken("<tool>", normalized=False)])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return library


LIBRARIES = {
    "wordpiece": wordpiece(),
    "wordpiece cased": wordpiece(lowercase=False),
    "wordpiece bare": wordpiece(marks=False),
    "bytes": byte_level(),
    "bytes bos": byte_level(begin=True),
    "bytes bos eos": byte_level(begin=True, end=True),
    "bytes prefix": byte_level(prefix=True),
    "bytes no special": byte_level(added=()),
    "sentencepiece": sentencepiece(),
}
WORDS = ["HELLO", "hello é e", "中文"]
LETTERS = ["hi", " hi", "ab ab", "a12"]
PIECES = ["a", " a", "  a", "a<tool>a", "a<tool> a", "a b"]
ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
VOCAB = {t: i for i, t in enumerate(["<|endoftext|>", "a", "b", "Ġ", "ab", "h", "i", "1", "2"])}
WORDS_FILE = "\n".join([*SPECIAL, "hello", "HELLO", "é", "e", "中", "文"]) + "\n"


def folder(name, library, model_type, texts, *, rendered=(), config=None, **files):
    """`files`: stem -> content of STEM.json, or of a file of another ending in STEM__ENDING."""
    content = {} if config is None else {"tokenizer_config.json": config}
    content |= {f"{stem.replace('__', '.')}" if "__" in stem else f"{stem}.json": data for stem, data in files.items()}
    if model_type is not None:
        content["config.json"] = {"model_type": model_type}
    return {"name": name, "library": library, "files": content, "texts": [*texts], "rendered": [*rendered]}


FOLDERS = [
    folder("bert", "wordpiece", "bert", WORDS),
    folder("bert, do_lower_case false", "wordpiece", "bert", WORDS, config={"do_lower_case": False}),
    folder("bert, cased file alone", "wordpiece cased", "bert", WORDS),
    folder("bert, cased both", "wordpiece cased", "bert", WORDS, config={"do_lower_case": False}),
    folder(
        "bert, class in the file",
        "wordpiece",
        "llama",
        WORDS,
        config={"tokenizer_class": "BertTokenizer", "do_lower_case": False},
    ),
    folder("bert, strip_accents false", "wordpiece", "bert", WORDS, config={"strip_accents": False}),
    folder(
        "bert, accents of capitals",
        "wordpiece cased",
        "bert",
        WORDS,
        config={"do_lower_case": False, "strip_accents": True},
    ),
    folder("bert, chinese", "wordpiece", "bert", WORDS, config={"tokenize_chinese_chars": False}),
    folder("bert, file without marks", "wordpiece bare", "bert", WORDS),
    folder(
        "bert, plain class", "wordpiece cased", "bert", WORDS, config={"tokenizer_class": "PreTrainedTokenizerFast"}
    ),
    folder("vocab.txt", None, "bert", WORDS, vocab__txt=WORDS_FILE),
    folder("vocab.txt cased", None, "bert", WORDS, config={"do_lower_case": False}, vocab__txt=WORDS_FILE),
    folder(
        "vocab.txt, other marks",
        None,
        "bert",
        WORDS,
        config={"tokenizer_class": "BertTokenizer"},
        special_tokens_map={"cls_token": "[MASK]"},
        vocab__txt=WORDS_FILE,
    ),
    folder("map alone", "bytes bos", "gpt2", LETTERS, special_tokens_map=ENDS),
    folder(
        "map alone, objects",
        "bytes bos",
        "bloom",
        LETTERS,
        special_tokens_map={"bos_token": {"content": "<s>", **FLAGS}, "eos_token": "</s>"},
    ),
    folder(
        "map over config",
        "bytes",
        "llama",
        LETTERS,
        config={"eos_token": "<s>"},
        special_tokens_map={"eos_token": "</s>"},
    ),
    folder(
        "map with null",
        "bytes",
        "llama",
        LETTERS,
        config={"bos_token": "<s>", "eos_token": "</s>"},
        special_tokens_map={"bos_token": None},
    ),
    folder(
        "map not read",
        "bytes",
        "llama",
        LETTERS,
        config={"eos_token": "</s>", "added_tokens_decoder": {"1": {"content": "<s>", **FLAGS}}},
        special_tokens_map={"eos_token": "<s>"},
    ),
    folder("bos and eos", "bytes bos eos", "bloom", LETTERS, config={"bos_token": "<s>", "eos_token": "</s>"}),
    folder(
        "special tokens that the file has as ordinary ones",
        "bytes no special",
        "llama",
        LETTERS,
        rendered=["<s>ab</s>"],
        config={"bos_token": "<s>", "eos_token": "</s>"},
    ),
    folder(
        "split_special_tokens",
        "bytes",
        "llama",
        LETTERS,
        rendered=["a</s>", "</s>"],
        config={"eos_token": "</s>", "split_special_tokens": True},
    ),
    folder("add_prefix_space of GPT-2", "bytes", "gpt2", LETTERS, config={**ENDS, "add_prefix_space": True}),
    folder("prefix in GPT-2's file alone", "bytes prefix", "gpt2", LETTERS, config=ENDS),
    folder("prefix in another's file", "bytes prefix", "bloom", LETTERS, config={"eos_token": "</s>"}),
    folder(
        "added_tokens.json",
        "bytes",
        "llama",
        LETTERS,
        rendered=["hi<x>"],
        special_tokens_map=ENDS,
        added_tokens={"<x>": 17},
    ),
    folder(
        "added_tokens_decoder",
        "bytes",
        "llama",
        LETTERS,
        rendered=["hi<x><y> a"],
        config={
            **ENDS,
            "added_tokens_decoder": {
                "17": {"content": "<x>", **FLAGS},
                "18": {"content": "<y>", **FLAGS, "rstrip": True},
            },
        },
    ),
    folder(
        "additional_special_tokens",
        "bytes",
        "llama",
        ["hi"],
        rendered=["hi<x>ab"],
        config={**ENDS, "additional_special_tokens": ["ab"]},
    ),
    folder(
        "extra_special_tokens",
        "bytes",
        "llama",
        LETTERS,
        rendered=["hi<x>"],
        config={**ENDS, "extra_special_tokens": ["<x>"]},
    ),
    folder("a role of its own", "bytes", "llama", LETTERS, rendered=["hi<x>"], config={**ENDS, "image_token": "<x>"}),
    folder("vocab.json", None, "gpt2", ["ab a", " ab", "a12"], vocab=VOCAB, merges__txt="#version: 0.2\na b\n"),
    folder(
        "vocab.json, add_bos_token",
        None,
        "gpt2",
        ["ab a", " ab"],
        config={"add_bos_token": True},
        vocab=VOCAB,
        merges__txt="a b\n",
    ),
    folder(
        "vocab.json, add_eos_token",
        None,
        "gpt2",
        ["ab a"],
        config={"add_eos_token": True},
        vocab=VOCAB,
        merges__txt="a b\n",
    ),
    folder(
        "vocab.json, a prefix",
        None,
        "gpt2",
        ["ab a", " ab"],
        config={"add_prefix_space": True},
        vocab=VOCAB,
        merges__txt="a b\n",
    ),
    folder("llama, as the file", "sentencepiece", "llama", PIECES, config={}),
    folder("llama", "sentencepiece", "llama", PIECES, config={"tokenizer_class": "LlamaTokenizer"}),
    folder(
        "llama, legacy",
        "sentencepiece",
        "llama",
        PIECES,
        config={"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
    ),
    folder(
        "llama, no prefix",
        "sentencepiece",
        "llama",
        PIECES,
        config={"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
    ),
    folder(
        "llama, a class that is not its own",
        "bytes bos",
        "llama",
        LETTERS,
        config={**ENDS, "tokenizer_class": "LlamaTokenizer"},
    ),
]

CHATS = {
    "tools": "{% if tools is not none %}T{% endif %}{% if tools is defined %}D{% endif %}{% if tools %}L{% endif %}",
    "documents": "{{ documents is none }}{{ tools | tojson }}{{ documents | default('x') }}"
    "{{ tools | default('x', true) }}",
    "what is not passed": "{{ date_string is defined }}{{ custom_tools is defined }}"
    "{{ enable_thinking is defined }}{{ x }}",
    "filters": "{{ (tools or []) | length }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages[0].content | trim | upper | replace('BE', 'X') }}{{ messages | map(attribute='role') | join(',') }}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
    "{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}",
    "keys that are null": "{% for m in messages %}{{ 'tool_calls' in m }}{{ m.tool_calls is defined }};{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }};{% endfor %}",
    "controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
    "{% if loop.last %}{% break %}{% endif %}{{ loop.index }}{% endfor %}",
    "namespace": "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}",
    "dict": "{{ dict(a=1, b=2) | tojson }}{{ dict.fromkeys(['x'], 3) | tojson }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "blocks": "{% for m in messages %}\n  {% if true %}\n  {{ m.role }}\n  {% endif %}\n{% endfor %}\n",
    "tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ image_token }}{{ sep_token is defined }}",
    "prompt": "{% if add_generation_prompt %}P{% endif %}{{ add_generation_prompt is sameas true }}",
    "macro": "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[1].content) }}"
    "{{ messages[0]['content'][:2] }}{{ 3 // 2 }}",
}


def record_folder(case: dict) -> dict:
    with tempfile.TemporaryDirectory() as place:
        write(Path(place), case)
        tokenizer = AutoTokenizer.from_pretrained(place)
        made = {
            "class": type(tokenizer).__name__,
            "ids": [tokenizer(text)["input_ids"] for text in case["texts"]],
            "rendered_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in case["rendered"]],
            "special": tokenizer.special_tokens_map,
        }
    return {**case, **made}


def write(place: Path, case: dict) -> None:
    if case["library"] is not None:
        LIBRARIES[case["library"]].save(str(place / "tokenizer.json"))
    for name, content in case["files"].items():
        (place / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def record_chat(template: str) -> dict:
    with tempfile.TemporaryDirectory() as place:
        settings = {"bos_token": "<s>", "eos_token": {"content": "</s>", **FLAGS, "__type": "AddedToken"}}
        settings |= {"image_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
        write(Path(place), {"library": "bytes", "files": {"tokenizer_config.json": settings}})
        tokenizer = AutoTokenizer.from_pretrained(place)
        written = tokenizer.apply_chat_template(
            TALK, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    return {"template": template, "settings": settings, "written": written}


def main() -> None:
    content = {
        "libraries": {name: json.loads(library.to_str()) for name, library in LIBRARIES.items()},
        "folders": [record_folder(case) for case in FOLDERS],
        "talk": TALK,
        "chats": {name: record_chat(template) for name, template in CHATS.items()},
    }
    parts = [f"{json.dumps(key)}: {json.dumps(content[key], ensure_ascii=False)}" for key in ("libraries", "talk")]
    folders = ",\n".join(json.dumps(case, ensure_ascii=False) for case in content["folders"])
    chats = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in content["chats"].items())
    text = "{" + ",\n".join([*parts, f'"folders": [\n{folders}\n]', f'"chats": {{\n{chats}\n}}']) + "}\n"
    assert json.loads(text) == content, "written as it is"
    Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
