"""Generation over the cache is repeated full forward passes, for unequal prompts padded on either side."""

import dataclasses

import numpy as np
import pytest

from dsjax.models.generate import generate, stream
from dsjax.models.sampling import Sampling
from tests.unit.models.transformer_oracle import MODELS, build, make_tokens


def by_full_passes(model, prompt: list[int], count: int) -> list[int]:
    """Greedy, the whole row again for every token."""
    row = list(prompt)
    for _ in range(count):
        row.append(int(np.asarray(model(np.array([row + [0] * (32 - len(row))])))[0, len(row) - 1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("name", ["bloom-6", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_is_repeated_full_passes(name, side):
    model = build(dataclasses.replace(MODELS[name], num_layers=4, segments=()))
    tokens, lengths, count = make_tokens((3, 17), seed=4), [17, 6, 1], 9
    places = np.arange(17)
    mask = np.array([places < n if side == "right" else places >= 17 - n for n in lengths]).astype(np.int32)
    got = generate(model, tokens, mask, max_new_tokens=count)
    assert got.shape == (3, 17 + count) and got.dtype == np.int32
    np.testing.assert_array_equal(got[:, :17], tokens)
    for row, real in enumerate(mask == 1):
        assert got[row, 17:].tolist() == by_full_passes(model, tokens[row, real].tolist(), count)
    assert len(set(got[:, 17:].ravel().tolist())) > 3  # not one token over and over


def test_a_row_does_not_depend_on_its_neighbours_when_greedy():
    model, tokens = build(MODELS["bloom-4"]), make_tokens((2, 5))
    together = generate(model, tokens, max_new_tokens=4)
    np.testing.assert_array_equal(generate(model, tokens[1:], max_new_tokens=4)[0], together[1])


def test_draws_are_repeatable_and_differ_by_seed():
    model, tokens = build(MODELS["bloom-4"]), make_tokens((2, 5))
    draw = lambda seed: generate(model, tokens, max_new_tokens=12, sampling=Sampling(temperature=1.5), seed=seed)
    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()


def test_tokens_come_one_at_a_time():
    model, tokens = build(MODELS["bloom-4"]), make_tokens((2, 5))
    streamed = list(stream(model, tokens, max_new_tokens=3))
    assert [step.shape for step in streamed] == [(2,)] * 3
    np.testing.assert_array_equal(np.stack(streamed, 1), generate(model, tokens, max_new_tokens=3)[:, 5:])
    assert list(stream(model, tokens, max_new_tokens=0)) == []


def test_prompts_that_cannot_be_continued():
    model = build(MODELS["gpt2"])
    with pytest.raises(ValueError, match=r"20 tokens and 13 new ones need 33 positions, but the model has 32"):
        generate(model, make_tokens((1, 20)), max_new_tokens=13)
    with pytest.raises(ValueError, match=r"a prompt is empty"):
        generate(model, make_tokens((2, 3)), np.array([[1, 1, 1], [0, 0, 0]]), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of input_ids, \(1, 3\); got \(1, 2\)"):
        generate(model, make_tokens((1, 3)), np.ones((1, 2)), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"input_ids must be \[rows, tokens\]"):
        generate(model, make_tokens((3,)), max_new_tokens=1)
    assert generate(model, make_tokens((1, 20)), max_new_tokens=12).shape == (1, 32)
