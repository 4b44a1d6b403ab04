"""A tiny BERT as a Hugging Face folder, with the WordPiece tokenizer that BERT has."""

import jax
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from dsjax.data.tokenizers.tokenizer import Tokenizer
from dsjax.models.families.bert.config import BertConfig
from dsjax.models.families.build import create
from dsjax.models.formats.pretrained import save_pretrained

WORDS = ["good", "fine", "great", "bad", "awful", "poor", "film", "story", "plot", "was", "the", "a", "of", "number"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLS, SEP, MASK = 2, 3, 4
BERT = BertConfig(
    vocab_size=40, num_layers=2, model_dim=32, num_heads=8, mlp_dim=64, max_positions=32, init_std=0.2, segments=(2,)
)


def library() -> tokenizers.Tokenizer:
    """WordPiece over a few words, single letters and digits."""
    tokens = [*SPECIAL, *WORDS, *[f"##{digit}" for digit in range(10)], *map(str, range(10))]
    made = tokenizers.Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    made.add_special_tokens(SPECIAL)
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    made.decoder = decoders.WordPiece()
    return made


def tokenizer() -> Tokenizer:
    """The same, wrapped."""
    return Tokenizer(library(), end_of_text="[SEP]")


def write_folder(path, config=BERT, *, seed=0):
    """A Hugging Face folder of a fresh model with the tokenizer."""
    save_pretrained(create(config, key=jax.random.key(seed)), path)
    tokenizer().save(path)
    return path
