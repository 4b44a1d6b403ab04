"""Tiny models of each family against what transformers computed with the same weights in float64.

The recordings, three texts each without padding, padded left and padded right, are described in record/README.md.

Tolerances. float32 outputs: 2e-5 of the largest value, or 2e-5 if that is below 1. Gradients: 2e-5 of the tensor's own
largest value (seen: 7e-6), whatever it is; but BERT's biases of keys have no gradient (they shift all scores of a query
alike), and what rounding leaves of it must be below 1e-6 of the largest gradient. bfloat16: a root mean square error of
at most 1.5 times that of transformers' own bfloat16 run, or 3 times for class logits, of which there are only nine.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.checkpoint.safetensors_folder import open_folder, write_tree
from dsjax.layers.context import Context
from dsjax.models import load_pretrained
from dsjax.models.families.build import segments_of
from dsjax.models.families.family import folders_of
from dsjax.models.formats.config_json import config_from_hf
from dsjax.models.formats.pretrained import save_pretrained
from dsjax.models.naming import to_named
from dsjax.models.transformer import Transformer
from tests.helpers import FAST, assert_close, batch_loss

ROOT = Path(__file__).parent / "families"
NAMES = sorted(path.parent.name for path in ROOT.glob("*/golden.npz"))
CAUSAL = [name for name in NAMES if name.startswith(("llama_", "gpt2_")) and name != "llama_classes"]
CASES = ("full", "left", "right")
TOLERANCE = 2e-5


@functools.cache
def recording(name: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / name / "golden.npz") as file:
        return dict(file)


@functools.cache
def model_of(name: str, dtype: str = "float32") -> Transformer:
    return load_pretrained(ROOT / name, dtype=dtype)


def case_of(name: str, case: str) -> dict[str, np.ndarray]:
    """The recorded inputs and outputs of a case."""
    return {key.removeprefix(f"{case}/"): value for key, value in recording(name).items() if key.startswith(f"{case}/")}


def batch_of(model: Transformer, record: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The case as rows of a training step."""
    batch = {"tokens": record["input_ids"], "segments": record["attention_mask"], "positions": record["position_ids"]}
    if "token_type_ids" in record:
        batch["token_types"] = record["token_type_ids"]
    if model.config.task == "language_model":
        labels = record["labels"]
        if model.architecture.causal:  # position t predicts t + 1
            labels = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
        batch |= {"targets": np.where(labels == -100, 0, labels), "loss_mask": labels != -100}
    return batch


def outputs(model: Transformer, batch) -> dict[str, jax.Array]:
    """What transformers' class of this name gives, from our parts."""
    features, _ = model.features(
        batch["tokens"],
        segments=batch["segments"],
        positions=batch["positions"],
        token_types=batch.get("token_types"),
    )
    mask = batch["segments"] == 1
    if model.config.task == "language_model":
        return {"logits": model.logits(features)}
    if model.config.task == "classification":
        return {"logits": model.classify(features, mask)}
    first = jnp.take_along_axis(features, jnp.argmax(mask, axis=1)[:, None, None], axis=1)[:, 0]
    return {"hidden": features, "pooled": model.pooler(first, Context())}


@functools.cache
def program(name: str, dtype: str = "float32"):
    """batch -> outputs, compiled once for all cases."""
    return jax.jit(lambda batch: outputs(model_of(name, dtype), batch), compiler_options=FAST)


def loss_of(model: Transformer, batch, labels, weigh):
    """The recorded loss: of language models by the training step's own function."""
    if model.config.task == "language_model":
        loss, tokens = batch_loss(model, batch)
        return loss / tokens
    found = outputs(model, batch)
    if model.config.task == "classification":
        chances = jax.nn.log_softmax(found["logits"])
        return -jnp.take_along_axis(chances, labels[:, None], axis=1).mean()
    hidden = found["hidden"] * (batch["segments"] == 1)[..., None] * weigh["weigh/hidden"]
    return hidden.sum() + (found["pooled"] * weigh["weigh/pooled"]).sum()


@functools.cache
def loss_and_gradients(name: str):
    """(params, batch, labels) -> the loss and its gradient: one program for all cases."""
    graph = nnx.graphdef(model_of(name))
    weigh = {key: value for key, value in recording(name).items() if key.startswith("weigh/")}
    loss = lambda params, batch, labels: loss_of(nnx.merge(graph, params), batch, labels, weigh)
    return jax.jit(jax.value_and_grad(loss), compiler_options=FAST)


def hf_names(config, named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors (or their gradients) under the names and in the layouts of the folder."""
    folders = folders_of(config)
    flat = {tuple(name.split(".")): value for name, value in named.items()}
    prefix = "" if config.task == "embedding" else folders.prefix
    return dict(write_tree(flat, folders.entries(config), num_layers=config.num_layers, prefix=prefix))


def test_something_is_recorded():
    assert len(NAMES) >= 9


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_outputs(name, case):
    model, record = model_of(name), case_of(name, case)
    for key, got in program(name)(batch_of(model, record)).items():
        want, got = record[key], np.asarray(got)
        assert got.dtype == np.float32 and got.shape == want.shape
        errors = np.abs(got - want)
        if key == "hidden" or model.config.task == "language_model":
            errors = errors[record["attention_mask"] == 1]
        assert errors.max() <= TOLERANCE * max(1, np.abs(want).max()), key


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(name, case):
    model, record = model_of(name), case_of(name, case)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    value, gradients = loss_and_gradients(name)(params, batch_of(model, record), record.get("labels"))
    assert float(value) == pytest.approx(float(record["loss"]), rel=TOLERANCE)
    got = hf_names(model.config, to_named(jax.device_get(gradients), segments_of(model.config)))
    want = {key.removeprefix("grad/"): value for key, value in record.items() if key.startswith("grad/")}
    assert got.keys() == want.keys()
    nothing = [key for key in want if key.endswith("key.bias")]
    largest = max(np.abs(value).max() for value in want.values())
    assert all(np.abs(x[key]).max() <= 1e-6 * largest for x in (got, want) for key in nothing)
    kept = lambda tensors: {key: value for key, value in tensors.items() if key not in nothing}
    assert_close(kept(got), kept(want), TOLERANCE, what=case)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name):
    model, record = model_of(name, "bfloat16"), case_of(name, "full")
    root_mean_square = lambda x: np.sqrt(np.mean(np.square(x)))
    for key, got in program(name, "bfloat16")(batch_of(model, record)).items():
        theirs = root_mean_square(record[f"bf16_{key}"] - record[key])
        ours = root_mean_square(np.asarray(got, np.float32) - record[key])
        assert ours <= (1.5 if got.size > 9 else 3) * theirs, key


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_tokens(name, case):
    record = case_of(name, case)
    new = record["greedy"].shape[1]
    got = model_of(name).generate(record["input_ids"], record["attention_mask"], max_new_tokens=new)
    assert (got[:, -new:] == record["greedy"]).all(), f"margins {record['margin'].min()}"


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_it_is_the_same_to_the_bit(name, tmp_path):
    save_pretrained(model_of(name), tmp_path / "out")
    old, new = open_folder(ROOT / name), open_folder(tmp_path / "out")
    assert new.names() == old.names()
    for tensor in old.names():
        assert new.dtype(tensor) == old.dtype(tensor)
        assert new.read(tensor).tobytes() == old.read(tensor).tobytes(), tensor
    assert config_from_hf(new.config) == config_from_hf(old.config)
