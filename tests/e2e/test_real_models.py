"""Two pretrained models that people have, from file to answer. `make models` installs them; else these are skipped."""

import json
import tempfile
from pathlib import Path

import models_on_disk
import numpy as np
import pytest

from dsjax.checkpoint.safetensors_folder import open_folder
from dsjax.cli.main import main
from dsjax.data.config import FileTokenizer
from dsjax.data.tokenizers.load import load_tokenizer
from dsjax.models.formats.pretrained import load_pretrained, save_pretrained

pytestmark = pytest.mark.slow

QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
# Of QUESTION, with special tokens recognised.
QUESTION_IDS = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
IM_END = 2
LAYERS = (30,)  # as one loop: compiled in a tenth of the time


@pytest.fixture(scope="module")
def smollm2():
    return load_pretrained(models_on_disk.smollm2(), segments=LAYERS)


@pytest.fixture(scope="module")
def minilm():
    return load_pretrained(models_on_disk.minilm())


@pytest.fixture
def folder():
    """Unlike tmp_path's, gone afterwards: half a gigabyte would stay for three sessions."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.mark.needs_smollm2
def test_smollm2_knows_the_capital_of_france(smollm2):
    tokenizer = load_tokenizer(FileTokenizer(path=str(models_on_disk.smollm2())))
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.special_id("bos_token")) == (49152, IM_END, 1)
    made = smollm2.generate(np.array([QUESTION_IDS]), max_new_tokens=8)[0, len(QUESTION_IDS) :]
    assert tokenizer.decode(made[:-1]) == "The capital of France is Paris." and made[-1] == IM_END


# Text -> ids, recorded from transformers 5.23.0: AutoTokenizer.from_pretrained(FOLDER, gguf_file=...).
RECORDED = {
    "In 1789, don't  wait\n\n\tnaïve 漢字 🙂 x=3.14": [
        788, 216, 33, 39, 40, 41, 28, 1326, 982, 216, 5847, 1116, 197, 3546, 46494, 17097, 137, 112, 36518, 47526, 1792,
        45, 35, 30, 33, 36,
    ],
    " leading  spaces": [2899, 216, 5600],
    "def f(x):\n    return x ** 2\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 1903, 216, 34, 198],
}  # fmt: skip


@pytest.mark.needs_smollm2
def test_the_tokenizer_in_the_gguf():
    tokenizer = load_tokenizer(FileTokenizer(path=str(models_on_disk.smollm2())))
    for text, ids in RECORDED.items():
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    assert [tokenizer.decode([token]) for token in tokenizer.encode("a 1789")] == ["a", " ", "1", "7", "8", "9"]
    text = QUESTION.partition("\n")[0]
    assert IM_END not in tokenizer.encode(text) and 1 not in tokenizer.encode(text), "text is never a special token"


@pytest.mark.needs_smollm2
def test_gguf_to_hugging_face_gives_the_same_logits(smollm2, folder, capsys):
    assert main(["convert", str(models_on_disk.smollm2()), str(folder / "hf")]) == 0
    assert "134,515,008 parameters" in capsys.readouterr().out
    ids = np.array([QUESTION_IDS])
    np.testing.assert_array_equal(load_pretrained(folder / "hf", segments=LAYERS)(ids), smollm2(ids))
    config, generation, settings = (
        json.loads((folder / "hf" / name).read_text())
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"] is True
    assert generation == {"bos_token_id": 1, "eos_token_id": IM_END, "pad_token_id": IM_END}
    assert "<|im_start|>" in settings["chat_template"] and settings["eos_token"] == "<|im_end|>"
    there, here = (load_tokenizer(FileTokenizer(path=str(p))) for p in (folder / "hf", models_on_disk.smollm2()))
    assert there.hash == here.hash


@pytest.mark.needs_minilm
def test_minilm_from_folder_to_folder_bit_for_bit(minilm, folder):
    save_pretrained(minilm, folder / "out")
    before, after = open_folder(models_on_disk.minilm()), open_folder(folder / "out")
    names = [name for name in before.names() if name != "embeddings.position_ids"]
    assert len(names) == 103
    prefix = "" if names[0] in after.names() else "bert."
    assert sorted(prefix + name for name in names) == after.names()
    for name in names:
        assert before.read(name).tobytes() == after.read(prefix + name).tobytes(), name


@pytest.mark.needs_minilm
def test_minilm_cosines(capsys):
    """The figures of an independent numpy forward (0.6674 and -0.0543)."""
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell sharply today."]
    arguments = [part for text in texts for part in ("--text", text)]
    assert main(["embed", str(models_on_disk.minilm()), *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["dimensions"] == 384 and np.shape(result["vectors"]) == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(result["vectors"], axis=1), 1, atol=1e-5)
    cosines = np.array(result["cosines"])
    assert round(cosines[0, 1], 3) == 0.667 and round(cosines[0, 2], 3) == -0.054
