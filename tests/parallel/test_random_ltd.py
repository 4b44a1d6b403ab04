"""Random-LTD in the gradient program: on meshes as on one device, in buckets, with frozen parameters and alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dsjax.mesh.config import MeshConfig
from dsjax.optimizers.kinds.zero_one_adam import ZeroOneAdamConfig
from tests.helpers import LTD, LTD_COUNTS, MESHES, ONE, TINY, assert_close, make_rows, make_training


@functools.cache
def one_device(num_kept: int = 8):
    """Loss and gradients on one device without accumulation; TINY's dropout is on."""
    training = make_training(ONE, TINY, random_ltd=LTD)
    gradients, metrics = training.gradient(training.state(), make_rows(), num_kept=num_kept, counts=LTD_COUNTS)
    return float(metrics["loss"]), training.named(gradients)


def test_gradients_are_those_of_one_device():
    """With accumulation, over data, fsdp and tensor: a row keeps the same tokens wherever it is computed."""
    training = make_training(MESHES["all"], TINY, random_ltd=LTD)
    gradients, metrics = training.gradient(training.state(), make_rows(), accumulation=2, num_kept=8, counts=LTD_COUNTS)
    loss, expected = one_device()
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-6)
    # float32 sums in another order.
    assert_close(training.named(gradients), expected, 1e-5, what="all")


def test_a_bucket_is_no_part_of_the_result():
    """6 tokens in 6 slots or in 8: the same loss and gradients, dropout of the hidden states included."""
    loss, expected = one_device()
    exact, gradients = one_device(num_kept=6)
    assert exact == pytest.approx(loss, rel=1e-6)
    assert_close(gradients, expected, 1e-5, what="6 slots")


LOCAL = ZeroOneAdamConfig(var_freeze_step=1, var_update_scaler=1, local_step_scaler=1, local_step_clipper=4)


def test_workers_that_are_alone_and_frozen_parameters_drop_the_same():
    """Two workers that start together, with little to train: their own means add up to the gradient of all."""
    training = make_training(MeshConfig(data=2), TINY, LOCAL, only=("up.kernel",), random_ltd=LTD, steps=40)
    programs, optimizer, state = training.programs.with_frozen(training.frozen), training.optimizer, training.state()
    stage, rows = sorted(optimizer.local)[0], make_rows()
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        for counts in ((16, 8), LTD_COUNTS):
            given, batch = np.array(counts, np.int32), training.place(rows)
            inputs = programs.gradient_inputs(optimizer, stage, state, batch, counts=given)
            gradients, metrics = programs.gradient_for(optimizer, stage, num_kept=8)(inputs)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert programs.gradient_for(optimizer, stage, num_kept=8)._cache_size() == 1
    tokens = np.asarray(metrics["tokens"])
    assert tokens.sum() == rows["loss_mask"].sum() and (tokens > 0).all()
    found = training.named(jax.tree.map(lambda g: np.tensordot(tokens / tokens.sum(), np.asarray(g), 1), gradients))
    _, expected = one_device()
    assert_close(found, {name: expected[name] for name in found}, 1e-5, what=stage)


def test_what_is_computed_again_draws_no_tokens_again():
    """One draw is two sorts, for all layers at once; with nothing dropped there is none."""
    training = make_training(ONE, dataclasses.replace(TINY, remat="full"), random_ltd=LTD)
    state, batch = training.state(), training.place(make_rows())
    sorts = {}
    for num_kept, counts in ((None, None), (8, np.array(LTD_COUNTS, np.int32))):
        program = training.programs.gradient_for(training.optimizer, "full", num_kept=num_kept)
        inputs = training.programs.gradient_inputs(training.optimizer, "full", state, batch, counts=counts)
        sorts[num_kept] = program.lower(inputs).as_text().count("stablehlo.sort")
    assert sorts == {None: 0, 8: 2}


def test_when_nothing_is_dropped_it_is_the_program_without_random_ltd():
    """To the letter, and so to the bit: nothing is gathered that a plain program does not gather."""
    texts, evaluations = [], []
    for dropping in (LTD, None):
        training = make_training(ONE, dataclasses.replace(TINY, remat="full"), random_ltd=dropping)
        program = training.programs.gradient_for(training.optimizer, "full", num_kept=None)
        batch = training.place(make_rows())
        inputs = training.programs.gradient_inputs(training.optimizer, "full", training.state(), batch)
        texts.append(program.lower(inputs).as_text())
        evaluations.append(training.programs.evaluate.lower(training.params(), make_rows()).as_text())
    assert texts[0] == texts[1]
    assert evaluations[0] == evaluations[1]  # never drops, whatever training does


def test_slots_without_random_ltd_are_refused():
    training = make_training(ONE)
    with pytest.raises(ValueError, match="num_kept = 8 drops tokens, but make_programs was given no random_ltd"):
        training.programs.gradient_for(training.optimizer, "full", num_kept=8)
