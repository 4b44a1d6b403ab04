"""SmolLM2's perplexity on a text and MiniLM's sentence vectors against transformers (recorded; see record/README.md).

`make models` installs the two models; else these tests are skipped. Both sides compute in float32.
"""

import functools
import json
import math
from pathlib import Path

import models_on_disk
import numpy as np
import pytest

from dsjax.data.config import FileTokenizer
from dsjax.data.tokenizers.load import load_tokenizer
from dsjax.models import load_pretrained
from tests.helpers import batch_loss

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "real"
WINDOW = 1024


@functools.cache
def recorded():
    return json.loads((FOLDER / "real.json").read_text(encoding="utf-8"))


@pytest.mark.needs_smollm2
def test_smollm2_perplexity():
    want = recorded()["smollm2"]
    tokenizer = load_tokenizer(FileTokenizer(path=str(models_on_disk.smollm2())))
    tokens = np.asarray(tokenizer.encode((FOLDER / "text.txt").read_text(encoding="utf-8")), np.int32)
    assert tokens.tolist() == want["tokens"]
    # The windows as the rows of one batch; the shorter is padded, and the first token of each is no target.
    rows = np.zeros((len(want["windows"]), WINDOW), np.int32)
    real = np.arange(WINDOW) < np.array(want["windows"])[:, None]
    rows[real] = tokens
    targets = np.roll(rows, -1, axis=1)
    mask = np.roll(real, -1, axis=1) & (np.arange(WINDOW) < WINDOW - 1)
    batch = {"tokens": rows, "targets": targets, "loss_mask": mask, "segments": real.astype(np.int32)}
    loss, count = batch_loss(load_pretrained(models_on_disk.smollm2(), segments=(30,)), batch)
    assert int(count) == len(tokens) - len(rows)
    # Asked for is 0.1%; the same sums in another order differ by far less.
    assert math.exp(float(loss) / int(count)) == pytest.approx(want["perplexity"], rel=1e-5)


@pytest.mark.needs_minilm
def test_minilm_vectors():
    want, path = recorded()["minilm"], models_on_disk.minilm()
    model, tokenizer = load_pretrained(path), load_tokenizer(FileTokenizer(path=str(path)))
    length = max(map(len, want["tokens"]))
    ids, mask = np.zeros((len(want["tokens"]), length), np.int32), np.zeros((len(want["tokens"]), length), np.int32)
    for row, (sentence, tokens) in enumerate(zip(want["sentences"], want["tokens"], strict=True)):
        assert tokenizer.encode(sentence) in (tokens, tokens[1:-1])  # with or without [CLS] and [SEP]
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    vectors = np.asarray(model(ids, mask))
    np.testing.assert_allclose(vectors, want["vectors"], atol=2e-6)
    assert (vectors[0] @ vectors[1:3].T).tolist() == pytest.approx([0.667, -0.054], abs=5e-4)
