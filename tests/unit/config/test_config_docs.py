"""The reference is fresh and names every key."""

from pathlib import Path

from dsjax.config.docs import attribute_docs, reference
from dsjax.config.load import flatten, load_run
from dsjax.models.families.gpt2.config import GPT2Config

ROOT = Path(__file__).parents[3]


def test_the_committed_reference_is_fresh():
    committed = (ROOT / "configs/REFERENCE.md").read_text()
    assert committed == reference(), "run: dsjax config docs --write configs/REFERENCE.md"


def test_every_key_is_there():
    rows = {line.split("`")[1] for line in reference().splitlines() if line.startswith("| `")}
    assert {path.split(".")[-1] for path in flatten(load_run(ROOT / "configs/run/bloom-176b.yaml"))} <= rows


def test_inherited_docs():
    docs = attribute_docs(GPT2Config)
    assert docs["model_dim"] == "Width of the residual stream (D)."
    assert docs["max_positions"] == "Rows of the position embedding: the longest sequence."
