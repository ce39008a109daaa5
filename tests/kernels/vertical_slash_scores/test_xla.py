"""Vertical and slash scores in XLA against the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseattn_jax.kernels.backends import UnsupportedError
from sparseattn_jax.kernels.vertical_slash_scores import vertical_slash_scores, xla
from tests.oracles import vertical_slash as oracle

TOLERANCE = {"rtol": 3e-6, "atol": 3e-6}


def draw(B=1, T=40, S=40, N=2, K=1, H=8, seed=0):
    """Queries and keys whose logits spread enough that the softmax is far from flat."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(B, T, N, H)), rng.normal(size=(B, S, K, H))
    return jnp.array(1.5 * q, jnp.float32), jnp.array(1.5 * k, jnp.float32)


score_in_jit = jax.jit(vertical_slash_scores, static_argnames=("num_queries", "workspace_bytes"))


def score(q, k, *, kv_lengths=None, **settings):
    lengths = None if kv_lengths is None else jnp.array(kv_lengths, jnp.int32)
    return score_in_jit(q, k, kv_lengths=lengths, **settings)


def assert_right(scores, q, k, **settings) -> None:
    expected = oracle.vertical_slash_scores(q, k, **settings)
    for name, x, y in zip(("vertical", "slash"), scores, expected, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, err_msg=name, **TOLERANCE)


CASES = {
    "square": ({}, {}),
    "odd-length": ({"T": 37, "S": 37}, {}),
    "T<S": ({"T": 21, "S": 46}, {}),
    "fewer-queries-than-asked": ({"T": 5, "S": 46}, {}),
    "one-query": ({"T": 1}, {}),
    "one-token": ({"T": 1, "S": 1}, {}),
    "num-queries-1": ({}, {"num_queries": 1}),
    "num-queries-64": ({"T": 100, "S": 150}, {"num_queries": 64}),
    "gqa-3:1": ({"N": 6, "K": 2}, {}),
    "head-dim-5": ({"H": 5}, {}),
    "lengths": ({"B": 4}, {"kv_lengths": [40, 22, 3, 0]}),
    "lengths-T<S": ({"B": 4, "T": 21}, {"kv_lengths": [39, 25, 20, 10]}),
}


@pytest.mark.parametrize(("shape", "settings"), CASES.values(), ids=CASES)
def test_equals_the_formula(shape: dict, settings: dict):
    q, k = draw(**shape)
    settings = {"num_queries": 8} | settings
    assert_right(score(q, k, **settings), q, k, **settings)


def test_two_queries_by_hand():
    # Equal logits: the query at 2 spreads over keys 0..2, the one at 3 over keys 0..3.
    q, k = jnp.zeros((1, 3, 1, 4)), jnp.zeros((1, 4, 1, 4))
    vertical, slash = score(q, k, num_queries=2)
    third, quarter = 1 / 3, 1 / 4
    both = third + quarter
    np.testing.assert_allclose(vertical, [[[both, both, both, quarter]]], rtol=1e-6)
    np.testing.assert_allclose(slash, [[[both, both, both, quarter]]], rtol=1e-6)
    # All mass on key 1: distances 1 and 2.
    vertical, slash = score(q + 9, k.at[:, 1].set(9.0), num_queries=2)
    np.testing.assert_allclose(vertical, [[[0, 2, 0, 0]]], atol=1e-6)
    np.testing.assert_allclose(slash, [[[0, 1, 1, 0]]], atol=1e-6)


# T, S, N, K, queries, workspace: few, so that cases share compiled programs.
SHAPES = [(3, 17, 4, 2, 6, 1000), (29, 41, 3, 1, 16, 2**20), (37, 37, 4, 2, 16, 9000)]


@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 10**6), data=st.data())
def test_any_shape_equals_the_formula(shape, seed, data):
    T, S, N, K, num_queries, workspace_bytes = shape
    lengths = data.draw(st.lists(st.integers(0, S), min_size=2, max_size=2))
    q, k = draw(B=2, T=T, S=S, N=N, K=K, H=4, seed=seed)
    settings = {"num_queries": num_queries, "kv_lengths": lengths}
    assert_right(score(q, k, workspace_bytes=workspace_bytes, **settings), q, k, **settings)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
def test_narrow_operands_are_summed_in_float32(dtype):
    q, k = (x.astype(dtype) for x in draw(T=37, S=61))
    assert_right(score(q, k, num_queries=8), q, k, num_queries=8)


# One key at a time, chunks that do not divide the keys, all keys at once.
@pytest.mark.parametrize("workspace_bytes", [1, 7 * 1024, 2**20])
def test_the_workspace_does_not_change_the_result(workspace_bytes: int):
    q, k = draw(B=2, T=33, S=59, N=8, K=2)
    settings = {"num_queries": 8, "kv_lengths": [59, 31]}
    assert_right(score(q, k, workspace_bytes=workspace_bytes, **settings), q, k, **settings)


def test_the_workspace_bounds_the_memory():
    T, N, num_queries, workspace_bytes = 8192, 8, 64, 2**20
    q, k = (jax.ShapeDtypeStruct((1, T, heads, 16), jnp.float32) for heads in (N, 2))
    function = functools.partial(
        vertical_slash_scores, num_queries=num_queries, workspace_bytes=workspace_bytes
    )
    memory = jax.jit(function).lower(q, k).compile().memory_analysis()
    assert 4 * N * num_queries * T == 16 * workspace_bytes
    results = 4 * N * T * 3
    assert memory.temp_size_in_bytes < 2 * workspace_bytes + results


def test_padding_may_hold_anything():
    q, k = draw(B=3, T=45, S=45, N=4, K=2)
    settings = {"num_queries": 8, "kv_lengths": [45, 30, 7]}
    expected = oracle.vertical_slash_scores(q, k, **settings)
    for b, length in enumerate(settings["kv_lengths"]):
        q, k = q.at[b, length:].set(jnp.nan), k.at[b, length:].set(jnp.nan)
    scores = score(q, k, **settings)
    for x, y in zip(scores, expected, strict=True):
        np.testing.assert_allclose(x, y, **TOLERANCE)
        np.testing.assert_array_equal(x[2, :, 7:], 0.0)


def test_large_logits_do_not_overflow():
    q, k = draw(T=20, S=20)
    q = 1000.0 * q
    scores = score(q, k, num_queries=8, workspace_bytes=1)
    expected = oracle.vertical_slash_scores(q, k, num_queries=8)
    for x, y in zip(scores, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-3)


def test_both_sum_to_the_number_of_queries():
    q, k = draw(B=4, T=30, S=50)
    lengths = [50, 26, 21, 20]  # the first query stands at position 20
    for scores in score(q, k, kv_lengths=lengths, num_queries=8):
        totals = scores.sum(axis=-1)
        np.testing.assert_allclose(totals, [[8] * 2, [6] * 2, [1] * 2, [0] * 2], rtol=1e-6)


FAULTS = {
    "none": ("_finite", lambda right: right),
    "slash-mirrored": ("_diagonal_sums", lambda right: lambda x: jnp.flip(right(x), axis=-1)),
    "slash-shifted": ("_diagonal_sums", lambda right: lambda x: jnp.roll(right(x), 1, axis=-1)),
    "chunk-misplaced": ("_add_at", lambda right: lambda x, new, at: right(x, new, at + 1)),
    "chunk-overwrites": ("_add_at", lambda right: lambda x, new, at: right(0.0 * x, new, at)),
    "not-causal": ("_logits", lambda right: lambda q, k, sees: right(q, k, jnp.ones_like(sees))),
    "lengths-ignored": (
        "last_queries",
        lambda right: lambda q, _, **sizes: right(q, None, **sizes),
    ),
    "heads-interleaved": (
        "_logits",
        lambda right: lambda q, k, sees: right(q.swapaxes(2, 3).reshape(q.shape), k, sees),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch):
    name, replace = FAULTS[fault]
    monkeypatch.setattr(xla, name, replace(getattr(xla, name)))
    q, k = draw(B=2, T=21, S=39, N=6, K=2)
    settings = {"num_queries": 8, "kv_lengths": [39, 24]}
    lengths = jnp.array(settings["kv_lengths"], jnp.int32)
    # Untraced until now, so that the replacement is what runs; four chunks of keys.
    run = functools.partial(xla.run.__wrapped__, num_queries=8, workspace_bytes=8 * 1024)
    scores = jax.jit(lambda *operands: run(*operands))(q, k, lengths)
    expected = oracle.vertical_slash_scores(q, k, **settings)
    close = [np.allclose(x, y, **TOLERANCE) for x, y in zip(scores, expected, strict=True)]
    assert all(close) == (fault == "none")


def test_works_under_vmap_and_has_no_gradient():
    q, k = draw(B=2)
    function = functools.partial(vertical_slash_scores, num_queries=8)
    mapped = jax.jit(jax.vmap(lambda q, k: [x[0] for x in function(q[None], k[None])]))(q, k)
    for x, y in zip(mapped, jax.jit(function)(q, k), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda q: sum(x[0, 0, 2] for x in function(q, k))))(q)
    np.testing.assert_array_equal(gradient, 0.0)


def test_no_queries_are_refused():
    q, k = draw()
    with pytest.raises(ValueError, match="num_queries=0 must be at least 1"):
        vertical_slash_scores(q, k, num_queries=0)


def test_an_unknown_backend_is_refused():
    q, k = draw()
    with pytest.raises(UnsupportedError, match="backend='cudnn': this op has mosaic_sm90, xla"):
        vertical_slash_scores(q, k, num_queries=8, backend="cudnn")
