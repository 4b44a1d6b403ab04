"""Records what dsjax made of a tokenizer that puts <s> before each text when it did not put it into a corpus yet.

Run at commit 4dad114 in an empty folder, whose content becomes tests/golden/made_before:

    python record_made_before.py

text/           two documents
model/          the tokenizer, of which nothing was used but tokenizer.json and tokenizer_config.json
cache/          the corpus that `dsjax train` made of text/
tokens/         what `dsjax data build --out tokens` wrote
run/            the folder of a run of two steps as if it had been killed before its first checkpoint, with their losses
"""

import json
import shutil
import string
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

import dsjax.train
from dsjax.checkpoint.config import CheckpointConfig
from dsjax.config.run import RunConfig
from dsjax.data.config import DataConfig, FileTokenizer, TextSource
from dsjax.data.corpus.build import build_corpus
from dsjax.evaluate.config import EvaluateConfig
from dsjax.inference.config import SampleConfig
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.setup.config import TrainConfig


def main() -> None:
    for name, text in (("a", "ab abc abc\n"), ("b", "cab cab ba\n")):
        Path("text").mkdir(exist_ok=True)
        Path("text", f"{name}.txt").write_text(text)
    tokens = ["<unk>", "<s>", "</s>", *string.ascii_lowercase[:4], "Ġ", "Ċ", "ab", "abc"]
    library = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[("a", "b"), ("ab", "c")])
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
    )
    Path("model").mkdir()
    library.save("model/tokenizer.json")
    Path("model/tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}) + "\n")
    data = DataConfig(
        sources=(TextSource(path="text"),),
        tokenizer=FileTokenizer(path="model"),
        sequence_length=8,
        validation_fraction=0,
        cache_dir="cache",
    )
    build_corpus(data, out="tokens")
    config = RunConfig(
        name="before",
        model=BloomConfig(vocab_size=11, num_layers=1, model_dim=8, num_heads=2, segments=(1,)),
        data=data,
        train=TrainConfig(steps=2, batch_size=8),
        evaluate=EvaluateConfig(every=0),
        sample=SampleConfig(prompt=""),
        checkpoint=CheckpointConfig(every=2),
    )
    dsjax.train.run(config, run_dir="run")
    shutil.rmtree("run/checkpoints")
    for name in ("loss.png", "summary.json", "versions.json"):
        Path("run", name).unlink()


if __name__ == "__main__":
    main()
