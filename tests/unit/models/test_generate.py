"""Generation over the cache is repeated full forward passes, for unequal prompts padded on either side."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from dsjax.models.families.bert.config import BertConfig
from dsjax.models.families.build import abstract
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.generate import Generation, _prefill, _step, generate, stream
from dsjax.models.sampling import Sampling
from tests.unit.models.transformer_oracle import MODELS, SHAPE, build, make_tokens


def by_full_passes(model, prompt: list[int], count: int) -> list[int]:
    """Greedy, the whole row again for every token."""
    row = list(prompt)
    for _ in range(count):
        row.append(int(np.asarray(model(np.array([row + [0] * (32 - len(row))])))[0, len(row) - 1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize(
    ("name", "side"), [*itertools.product(("bloom-6", "gpt2"), ("left", "right")), ("gpt2-variant", "left")]
)
def test_greedy_is_repeated_full_passes(name, side):
    model = build(dataclasses.replace(MODELS[name], num_layers=4, segments=()))
    tokens, lengths, count = make_tokens((3, 17), seed=4), [17, 6, 1], 9
    places = np.arange(17)
    mask = np.array([places < n if side == "right" else places >= 17 - n for n in lengths]).astype(np.int32)
    got = model.generate(tokens, mask, max_new_tokens=count)
    assert got.shape == (3, 17 + count) and got.dtype == np.int32
    np.testing.assert_array_equal(got[:, :17], tokens)
    for row, real in enumerate(mask == 1):
        assert got[row, 17:].tolist() == by_full_passes(model, tokens[row, real].tolist(), count)
    assert len(set(got[:, 17:].ravel().tolist())) > 3  # not one token over and over


def test_a_row_does_not_depend_on_its_neighbours_when_greedy():
    model, tokens = build(MODELS["bloom-4"]), make_tokens((2, 5))
    together = model.generate(tokens, max_new_tokens=4)
    np.testing.assert_array_equal(model.generate(tokens[1:], max_new_tokens=4)[0], together[1])


def test_draws_of_a_row_do_not_depend_on_its_neighbours():
    """Neither on their number nor on their length, which decides the padding, nor on whether they have ended."""
    model, tokens = build(MODELS["bloom-4"]), make_tokens((3, 20))
    options = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.5, repetition_penalty=1.2), "seed": 3}
    alone = model.generate(tokens[:1, :5], **options)[0, 5:]
    mask = (np.arange(20) < np.array([5, 20, 17])[:, None]).astype(np.int32)
    together = model.generate(tokens, mask, **options)[:, 20:]
    np.testing.assert_array_equal(together[0], alone)
    end = int(together[1, 2])
    assert end not in together[[0, 2]], "another row ends with the same token: take another seed"
    ended = model.generate(tokens, mask, stop_tokens=frozenset({end}), **options)[:, 20:]
    np.testing.assert_array_equal(ended[[0, 2]], together[[0, 2]])
    first = together[1].tolist().index(end)
    assert ended[1].tolist() == [*together[1, :first].tolist(), *[end] * (12 - first)]


def test_it_ends_when_all_rows_have():
    model, tokens = build(MODELS["bloom-4"]), make_tokens((2, 5))
    made = model.generate(tokens, max_new_tokens=10)[:, 5:]
    ends = frozenset({int(made[0, 1]), int(made[1, 3])})
    last = max(next(i for i, token in enumerate(row) if token in ends) for row in made.tolist())
    assert model.generate(tokens, max_new_tokens=10, stop_tokens=ends).shape == (2, 5 + last + 1)


def test_the_repetition_penalty_counts_the_prompt_but_not_its_padding():
    """Against full passes with transformers' rule in numpy."""
    model, tokens = build(MODELS["gpt2"]), make_tokens((2, 6))
    mask = np.array([[1] * 6, [0, 0, 0, 1, 1, 1]])
    got = model.generate(tokens, mask, max_new_tokens=8, sampling=Sampling(repetition_penalty=1.7))[:, 6:]
    for row in range(2):
        ids = tokens[row, mask[row] == 1].tolist()
        for token in got[row]:
            logits = np.array(model(np.array([ids + [0] * (32 - len(ids))])))[0, len(ids) - 1]
            for old in set(ids):
                logits[old] = logits[old] / np.float32(1.7) if logits[old] > 0 else logits[old] * np.float32(1.7)
            assert int(token) == int(logits.argmax())
            ids.append(int(token))


@pytest.mark.parametrize("segments", [(1, 1, 1, 1), (1, 2, 1)], ids=["apart", "scanned"])
def test_decoding_keeps_the_cache_where_it_is(segments):
    model = build(LlamaConfig(num_heads=4, num_kv_heads=2, **SHAPE | {"num_layers": 4, "segments": segments}))
    graph, state = nnx.split(model, nnx.Param)
    params, sampling = nnx.to_pure_dict(state), Sampling(repetition_penalty=1.1)
    ids = make_tokens((2, 16))
    tokens, progress = _prefill(graph, params, ids, np.ones_like(ids), jax.random.key(0), sampling=sampling, room=16)
    where = lambda tree: [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]
    before = where((progress.cache, progress.valid, progress.seen))
    for _ in range(3):
        tokens, progress = _step(graph, params, tokens, progress, sampling=sampling)
        assert where((progress.cache, progress.valid, progress.seen)) == before


def test_draws_are_repeatable_and_differ_by_seed():
    model, tokens = build(MODELS["bloom-4"]), make_tokens((2, 5))
    draw = lambda seed: model.generate(tokens, max_new_tokens=12, sampling=Sampling(temperature=1.5), seed=seed)
    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()


def test_tokens_come_one_at_a_time():
    model, tokens = build(MODELS["bloom-4"]), make_tokens((2, 5))
    options = Generation(max_new_tokens=3)
    streamed = list(stream(model, tokens, options=options))
    assert [step.shape for step in streamed] == [(2,)] * 3
    np.testing.assert_array_equal(np.stack(streamed, 1), generate(model, tokens, options=options)[:, 5:])
    with pytest.raises(ValueError, match=r"max_new_tokens must be at least 1; got 0"):
        Generation(max_new_tokens=0)


def test_an_encoder_does_not_write():
    with pytest.raises(ValueError, match=r"a bert model for the task language_model does not write text"):
        abstract(BertConfig(num_heads=4, **SHAPE)).generate(make_tokens((1, 3)), max_new_tokens=1)


def test_prompts_that_cannot_be_continued():
    model = build(MODELS["gpt2"])
    with pytest.raises(
        ValueError, match=r"20 tokens and 13 new ones need 33 positions, but the model has 32; .* at most 12"
    ):
        model.generate(make_tokens((1, 20)), max_new_tokens=13)
    with pytest.raises(ValueError, match=r"the model has 32; shorten the prompt to 31 tokens or fewer"):
        model.generate(make_tokens((1, 32)), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"a prompt is empty"):
        model.generate(make_tokens((2, 3)), np.array([[1, 1, 1], [0, 0, 0]]), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of input_ids, \(1, 3\); got \(1, 2\)"):
        model.generate(make_tokens((1, 3)), np.ones((1, 2)), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"input_ids must be \[rows, tokens\]"):
        model.generate(make_tokens((3,)), max_new_tokens=1)
    assert model.generate(make_tokens((1, 20)), max_new_tokens=12).shape == (1, 32)
