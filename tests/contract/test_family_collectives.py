"""What a layer of Llama or BERT sends under tensor parallelism, counted from the compiled programs.

X is one activation [b, T, D] on one device, S a figure [b, T] of the loss. A layer sums X twice in the forward pass:
after attention and after the MLP. In the backward pass it sums the gradient of what goes into the projections; XLA:CPU
does so for each of q, k, v (and gate and up) apart, where a fused one (GPT-2's, BLOOM's) needs one sum. Keys and values
of fewer heads than devices are on all of them: only their own gradients, G heads instead of D, are summed.
"""

import pytest

from dsjax.collectives.hlo import count_collectives
from dsjax.mesh.config import MeshConfig
from dsjax.models.families.bert.config import BertConfig
from dsjax.models.families.llama.config import LlamaConfig
from tests.helpers import FAST, Training, make_rows, make_training

SMALL = {"vocab_size": 64, "num_layers": 2, "segments": (2,), "model_dim": 32, "num_heads": 8, "mlp_dim": 64}
CONFIGS = {"llama": LlamaConfig(**SMALL, num_kv_heads=2, max_positions=16), "bert": BertConfig(**SMALL)}
LAYERS, X, S = 2, 16 * 16 * 32 * 4, 16 * 16 * 4
BACKWARD = {("llama", 2): 3 + 2, ("llama", 4): 1 + 2 * 2 * 4 / 32 + 2, ("bert", 2): 3 + 1, ("bert", 4): 3 + 1}


def sent(training: Training, text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in count_collectives(text, dict(training.layout.mesh.shape)):
        name = f"{one.kind} {'+'.join(one.axes)}"
        found[name] = found.get(name, 0) + one.total_bytes
    return found


@pytest.mark.parametrize(("name", "tensor"), BACKWARD)
def test_a_training_step_sums_activations_and_nothing_else(name, tensor):
    training = make_training(MeshConfig(data=1, tensor=tensor), CONFIGS[name])
    expected = (2 + LAYERS * (2 + BACKWARD[name, tensor])) * X + 3 * S
    assert sent(training, training.gradient_text()) == {"all-reduce tensor": expected}


@pytest.mark.parametrize("name", CONFIGS)
def test_two_sums_a_layer_in_the_forward_pass(name):
    training = make_training(MeshConfig(data=1, tensor=4), CONFIGS[name])
    lowered = training.programs.evaluate.lower(training.params(), make_rows())
    text = lowered.compile(compiler_options=FAST).as_text()
    # The look-up's sum, two a layer, and the loss: the largest logit, the sum of exponentials, the target's logit.
    assert sent(training, text) == {"all-reduce tensor": (1 + 2 * LAYERS) * X + 3 * S}


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_weights_are_not_gathered_below_zero_3(zero_stage):
    training = make_training(MeshConfig(data=1, fsdp=2, tensor=4, zero_stage=zero_stage), CONFIGS["llama"])
    assert {name.split()[0] for name in sent(training, training.gradient_text())} <= {
        "all-reduce",
        "collective-permute",
    }
