"""The numpy oracle of the 1-bit optimizers by what must hold whatever it is given; recordings are in tests/golden."""

import dataclasses

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_bit_oracle import OURS, PEER, AllReduce, OneBitAdam, OneBitLamb, ZeroOneAdam, pack, unpack
from one_bit_oracle.rules import clip

PEER64 = dataclasses.replace(PEER, dtype=np.float64)
RULES = st.one_of(
    st.just(PEER64),
    st.builds(
        lambda scale, server: dataclasses.replace(OURS, scale=scale, server_scale=server),
        st.sampled_from(["l2", "l1"]),
        st.sampled_from(["tensor", "chunk"]),
    ),
)
FAST = settings(max_examples=25, deadline=None, derandomize=True)
SHAPES = [(7, 5), (13,), (3,)]


def draws(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def params() -> list[np.ndarray]:
    return [draws(k, *shape) for k, shape in enumerate(SHAPES)]


def gradients(t: int, workers: int, shapes=SHAPES) -> list[np.ndarray]:
    return [draws(100 * t + k, workers, *shape) for k, shape in enumerate(shapes)]


@FAST
@given(st.binary(min_size=1, max_size=9))
def test_unpacking_undoes_packing(data):
    bits = np.frombuffer(data, np.uint8)
    signs = unpack(bits, np.float64)
    assert set(signs) <= {-1.0, 1.0}
    np.testing.assert_array_equal(pack(signs), bits)
    assert pack(np.array([0.0, -0.0, -1, 1, -1, -1, -1, -1])).item() == 0b11010000


@FAST
@given(RULES, st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_what_is_not_sent_is_kept(rules, workers, n, seed):
    """result_j + d_j' + mean_i e_i'[j] = mean_i (x_i + e_i)[j] + d_j, for every element and several rounds."""
    average = AllReduce(n, workers, rules)
    live = np.ones(n, bool) if rules.deepspeed_parity else draws(seed + 1, n) < 1
    for r in range(3):
        x = draws(seed + 100 * r, workers, n) * live
        before = average.worker_error.mean(axis=0) + average.server_error.reshape(-1)
        result = average(x, live)
        after = average.worker_error.mean(axis=0) + average.server_error.reshape(-1)
        np.testing.assert_allclose(result + after[:n], x.mean(axis=0) + before[:n], atol=1e-12)
        assert not result[~live].any()
        if not rules.deepspeed_parity:
            assert not average.worker_error[:, n:].any() and not after[:n][~live].any()


@FAST
@given(RULES, st.integers(1, 5), st.integers(1, 40), st.floats(0.25, 4), st.integers(0, 99))
def test_a_positive_factor_passes_through_and_zero_stays_zero(rules, workers, n, factor, seed):
    x = draws(seed, workers, n)
    plain, scaled = AllReduce(n, workers, rules), AllReduce(n, workers, rules)
    np.testing.assert_allclose(scaled(factor * x), factor * plain(x), rtol=1e-12)
    np.testing.assert_allclose(scaled.worker_error, factor * plain.worker_error, rtol=1e-12, atol=1e-12)
    assert not AllReduce(n, workers, rules)(0 * x).any()


def test_one_scale_for_all_chunks_does_not_depend_on_the_layout():
    """Values in another order give the same average in that order: the padding and the chunks have no influence."""
    x, order = draws(0, 4, 50), np.random.default_rng(1).permutation(50)
    one, other = AllReduce(50, 4, OURS), AllReduce(50, 4, OURS)
    for r in range(4):
        np.testing.assert_allclose(one(x + r)[order], other((x + r)[:, order]), rtol=1e-12)


def test_workers_that_agree_on_equal_magnitudes_lose_nothing():
    x = np.where(draws(3, 24) < 0, -2.0, 2.0)
    np.testing.assert_allclose(AllReduce(24, 3, OURS)(np.tile(x, (3, 1))), x, rtol=1e-12)


@pytest.mark.usefixtures("standard_promotion")  # of optax's own step counts
@pytest.mark.parametrize("workers", [1, 3])
def test_warm_up_is_adamw(workers):
    """All steps full: optax's adamw on the mean gradient, to float32's precision."""
    own = OneBitAdam(params(), num_workers=workers, freeze_step=99, weight_decay=0.1)
    alike = ZeroOneAdam(params(), num_workers=workers, var_freeze_step=99, var_update_scaler=99, weight_decay=0.1)
    adamw = optax.adamw(0.01, weight_decay=0.1)
    theirs = [p.astype(np.float32) for p in params()]
    state = adamw.init(theirs)
    for t in range(5):
        g = gradients(t, workers)
        updates, state = adamw.update([x.mean(axis=0).astype(np.float32) for x in g], state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        assert own.step(g, lr=0.01) == alike.step(g, lr=0.01) == "full"
    for a, b, c in zip(own.params, alike.params, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
        np.testing.assert_allclose(a, c, rtol=2e-5, atol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_warm_up_is_lamb():
    own = OneBitLamb(params(), num_workers=2, freeze_step=99, weight_decay=0.1, max_coeff=1e9, min_coeff=0, eps=1e-6)
    lamb = optax.lamb(0.01, weight_decay=0.1)
    theirs = [p.astype(np.float32) for p in params()]
    state = lamb.init(theirs)
    for t in range(5):
        g = gradients(t, 2)
        updates, state = lamb.update([x.mean(axis=0).astype(np.float32) for x in g], state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        own.step(g, lr=0.01)
    for a, b in zip(own.params, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


class Mean:
    """In the place of the compressed all-reduce: nothing is compressed."""

    def __call__(self, tensors, live=None):
        return [x.mean(axis=0) for x in tensors]

    def reset(self):
        pass


@pytest.mark.parametrize("bias_correction", [True, False])
def test_without_compression_zero_one_adam_with_an_interval_of_one_is_onebit_adam(bias_correction):
    rules = dataclasses.replace(OURS, bias_correction=bias_correction)
    one = OneBitAdam(params(), num_workers=3, freeze_step=4, rules=rules)
    other = ZeroOneAdam(params(), num_workers=3, var_freeze_step=4, rules=rules)
    one.average = other.average = Mean()
    for t in range(9):
        g = gradients(t, 3)
        assert (one.step(g, lr=0.01 + 0.01 * t), other.step(g, lr=0.01 + 0.01 * t)) in (
            ("full", "full"),
            ("onebit", "sync"),
        )
    for k, p in enumerate(one.params):
        np.testing.assert_allclose(other.params[k], p, rtol=1e-12)
        np.testing.assert_allclose(other.m[k][2], one.m[k], rtol=1e-9)


def test_the_displacement_form_is_the_peers_form():
    """p and u_i, against p_i and u_i: the same numbers where both dialects take the same steps."""
    options = {"num_workers": 3, "local_step_scaler": 4, "local_step_clipper": 4, "weight_decay": 0.05}
    rules = dataclasses.replace(OURS, bias_correction=False)
    ours = ZeroOneAdam(params(), var_freeze_step=5, rules=rules, **options)
    deepspeed_parity = ZeroOneAdam(params(), var_freeze_step=4, rules=PEER64, **options)
    ours.average = deepspeed_parity.average = Mean()
    for t in range(24):
        g = gradients(t, 3)
        if t == 0:
            ours.schedule.step()  # so that both have taken no step at t = 1
            assert deepspeed_parity.step(g, lr=0.01) == "noop"
        else:
            assert ours.step(g, lr=0.01) == deepspeed_parity.step(g, lr=0.01)
    for a, b in zip(ours.worker_params, deepspeed_parity.worker_params, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [OneBitAdam, OneBitLamb, ZeroOneAdam])
def test_what_never_had_a_gradient_never_moves(make):
    freeze = {"var_freeze_step": 6} if make is ZeroOneAdam else {"freeze_step": 6}
    own = make(params(), num_workers=2, **freeze)
    dead = [np.zeros(shape, bool) for shape in SHAPES]
    dead[0][4:] = True
    for t in range(14):
        own.step([np.where(d, 0, g) for g, d in zip(gradients(t, 2), dead, strict=True)], lr=0.01)
    np.testing.assert_array_equal(own.params[0][4:], params()[0][4:])
    assert all(np.isfinite(p).all() and np.abs(p).max() < 10 for p in own.params)


@pytest.mark.parametrize("make", [OneBitAdam, OneBitLamb])
def test_a_gradient_that_is_not_finite_changes_only_the_clock(make):
    own, other = make(params(), num_workers=2, freeze_step=3), make(params(), num_workers=2, freeze_step=3)
    for t in range(8):
        g = gradients(t, 2)
        if t in (1, 5):
            bad = [x.copy() for x in g]
            bad[1][1, 2] = np.inf
            assert own.step(bad, lr=0.1) == "skipped"
            other.t += 1
        else:
            assert own.step(g, lr=0.1) == other.step(g, lr=0.1) != "skipped"
    for a, b in zip(own.params, other.params, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_worker_alone_skips_alone():
    own = ZeroOneAdam(params(), num_workers=2, var_freeze_step=2, local_step_scaler=1, local_step_clipper=4)
    for t in range(4):
        own.step(gradients(t, 2), lr=0.1)
    bad = gradients(4, 2)
    bad[2][0] = np.nan
    m, u = own.m[0].copy(), own.u[0].copy()
    assert own.step(bad, lr=0.1) == "local"
    np.testing.assert_array_equal(own.m[0][0], m[0])
    np.testing.assert_array_equal(own.u[0][0], u[0])
    assert np.abs(own.u[0][1] - u[1]).min() > 0
    np.testing.assert_allclose(own.lrs, [0.0, 0.1], atol=1e-15)


def test_a_rate_of_zero_moves_nothing():
    own = ZeroOneAdam(params(), num_workers=2, var_freeze_step=2)
    for t in range(6):
        own.step(gradients(t, 2), lr=0.0 if t > 2 else 0.1)
    assert all(np.isfinite(x).all() for x in own.params + own.m)


@pytest.mark.parametrize("kind", ["full", "onebit", "local"])
def test_clipping(kind):
    """By hand: gradients (3, 4) and (0, 0): norms 5 and 0, of the mean 2.5, root mean square 12.5^0.5."""
    rules = dataclasses.replace(OURS, clip=1.0)
    g = [np.array([[3.0], [0.0]]), np.array([[4.0], [0.0]])]
    norm = {"full": 2.5, "onebit": np.sqrt(12.5), "local": 5.0}[kind]
    np.testing.assert_allclose(clip(g, kind, rules)[1][0, 0], 4 / norm)
    assert clip(g, kind, dataclasses.replace(rules, clip=9.0))[1][0, 0] == 4
    local = dataclasses.replace(rules, clip_by="local")
    np.testing.assert_allclose(clip(g, kind, local)[1][0, 0], 4 / (2.5 if kind == "full" else 5))
