"""Pooled block scores and their distance from the truth in XLA against the formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseattn_jax.kernels.backends import UnsupportedError
from sparseattn_jax.kernels.pooled_scores import block_sums, pooled_distance, pooled_scores, xla
from sparseattn_jax.kernels.vertical_slash_scores import vertical_slash_scores
from tests.oracles import pooled as oracle
from tests.oracles import vertical_slash

ATOL = 3e-6


def draw(B=1, T=40, S=40, N=2, K=1, H=8, seed=0):
    """Queries and keys of block means that differ enough for a softmax far from flat."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(B, T, N, H)), rng.normal(size=(B, S, K, H))
    q += 1.5 * np.repeat(rng.normal(size=(B, -(-T // 8), N, H)), 8, axis=1)[:, :T]
    k += 1.5 * np.repeat(rng.normal(size=(B, -(-S // 8), K, H)), 8, axis=1)[:, :S]
    return jnp.array(q, jnp.float32), jnp.array(k, jnp.float32)


def as_lengths(kv_lengths):
    return None if kv_lengths is None else jnp.array(kv_lengths, jnp.int32)


score_in_jit = jax.jit(pooled_scores, static_argnames=("block_size", "q_blocks"))


def score(q, k, *, kv_lengths=None, **settings):
    return score_in_jit(q, k, kv_lengths=as_lengths(kv_lengths), **settings)


measure_in_jit = jax.jit(pooled_distance, static_argnames="block_size")


def measure(q, k, *, kv_lengths=None, block_size):
    settings = {"kv_lengths": kv_lengths, "num_queries": block_size}
    vertical, _ = vertical_slash.vertical_slash_scores(q, k, **settings)
    vertical = jnp.array(vertical, jnp.float32)
    return measure_in_jit(q, k, vertical, block_size=block_size, kv_lengths=as_lengths(kv_lengths))


CASES = {
    "square": ({}, {}),
    "odd-length": ({"T": 37, "S": 37}, {}),
    "shorter-than-a-block": ({"T": 5, "S": 5}, {}),
    "one-token": ({"T": 1, "S": 1}, {}),
    "T<S-aligned": ({"T": 24}, {}),
    "T<S-unaligned": ({"T": 21, "S": 46}, {}),
    "one-query": ({"T": 1}, {}),
    "gqa-3:1": ({"N": 6, "K": 2}, {}),
    "head-dim-5": ({"H": 5}, {}),
    "block-64": ({"T": 100, "S": 150}, {"block_size": 64}),
    "lengths": ({"B": 4}, {"kv_lengths": [40, 22, 3, 0]}),
    "lengths-T<S": ({"B": 4, "T": 21}, {"kv_lengths": [39, 25, 20, 10]}),
}


@pytest.mark.parametrize(("shape", "settings"), CASES.values(), ids=CASES)
def test_equals_the_formula(shape: dict, settings: dict):
    q, k = draw(**shape)
    settings = {"block_size": 8} | settings
    for function, formula in (
        (score, oracle.pooled_scores),
        (measure, oracle.pooled_distance),
    ):
        result = function(q, k, **settings)
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, formula(q, k, **settings), atol=ATOL)


# T, S, N, K, block size: few, so that cases share compiled programs.
SHAPES = [(3, 17, 4, 2, 4), (29, 41, 3, 1, 16), (37, 37, 4, 2, 8)]


@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 10**6), data=st.data())
def test_any_shape_equals_the_formula(shape, seed, data):
    T, S, N, K, block_size = shape
    lengths = data.draw(st.lists(st.integers(0, S), min_size=2, max_size=2))
    q, k = draw(B=2, T=T, S=S, N=N, K=K, H=4, seed=seed)
    settings = {"block_size": block_size, "kv_lengths": lengths}
    np.testing.assert_allclose(
        score(q, k, **settings), oracle.pooled_scores(q, k, **settings), atol=ATOL
    )
    np.testing.assert_allclose(
        measure(q, k, **settings), oracle.pooled_distance(q, k, **settings), atol=ATOL
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
def test_narrow_operands_are_pooled_in_float32(dtype):
    q, k = (x.astype(dtype) for x in draw(T=37, S=61))
    settings = {"block_size": 16}
    np.testing.assert_allclose(
        score(q, k, **settings), oracle.pooled_scores(q, k, **settings), atol=ATOL
    )
    np.testing.assert_allclose(
        measure(q, k, **settings), oracle.pooled_distance(q, k, **settings), atol=ATOL
    )


@pytest.mark.parametrize("q_blocks", [(0, 2), (1, 4), (4, 5)], ids=str)
def test_some_query_blocks(q_blocks: tuple[int, int]):
    q, k = draw(B=2, T=37, S=53)
    settings = {"block_size": 8, "kv_lengths": [53, 31]}
    expected = oracle.pooled_scores(q, k, **settings)[:, :, slice(*q_blocks)]
    np.testing.assert_allclose(score(q, k, q_blocks=q_blocks, **settings), expected, atol=ATOL)


def test_visible_blocks_are_these():
    # 3 query blocks of 8 that stand at 6..29 among 30 keys; the second sequence ends at 17.
    q, k = draw(B=2, T=24, S=30, N=1)
    scores = score(q, k, block_size=8, kv_lengths=[30, 17])
    rows = np.array(scores > 0).reshape(6, 4)
    pictures = ["".join("#" if listed else "." for listed in row) for row in rows]
    assert pictures == ["##..", "###.", "####", "##..", "###.", "...."]


def test_padding_may_hold_anything():
    q, k = draw(B=2, T=45, S=45, N=4, K=2)
    lengths = [30, 7]
    settings = {"block_size": 16, "kv_lengths": lengths}
    expected = oracle.pooled_scores(q, k, **settings), oracle.pooled_distance(q, k, **settings)
    vertical, _ = vertical_slash.vertical_slash_scores(q, k, num_queries=16, kv_lengths=lengths)
    for b, length in enumerate(lengths):
        q, k = q.at[b, length:].set(jnp.nan), k.at[b, length:].set(jnp.nan)
    np.testing.assert_allclose(score(q, k, **settings), expected[0], atol=ATOL)
    vertical = jnp.array(vertical, jnp.float32)
    distances = measure_in_jit(q, k, vertical, block_size=16, kv_lengths=as_lengths(lengths))
    np.testing.assert_allclose(distances, expected[1], atol=ATOL)


def test_block_sums_hold_a_partial_block():
    x = jnp.arange(1.0, 8.0)[None, None]
    np.testing.assert_array_equal(block_sums(x, block_size=3), [[[6, 15, 7]]])


def test_slash_sums_are_the_published_ones_from_the_end():
    # The paper's code indexes a diagonal by S - 1 - distance and pools from the left.
    q, k = draw(T=32, S=32)
    _, slash = vertical_slash.vertical_slash_scores(q, k, num_queries=8)
    published = slash[..., ::-1].reshape(1, 2, 4, 8).sum(axis=-1)
    ours = block_sums(jnp.array(slash, jnp.float32), block_size=8)
    np.testing.assert_allclose(ours[..., ::-1], published, rtol=1e-6)


DISTANCES = {
    "equal": ([0.2, 0.8, 0.0], [0.2, 0.8, 0.0], 0.0),
    "disjoint": ([1.0, 0.0, 0.0], [0.0, 0.3, 0.7], np.log(2) ** 0.5),
    "overlapping": ([0.5, 0.5, 0.0], [0.0, 0.5, 0.5], (np.log(2) / 2) ** 0.5),
    # The textbook sum of two divergences is 10 times this in float32.
    "close": ([0.5, 0.25, 0.25], [0.50001, 0.24999, 0.25], None),
    "no-mass": ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 0.0),
}


@pytest.mark.parametrize(("p", "q", "expected"), DISTANCES.values(), ids=DISTANCES)
def test_distance_of_two_distributions(p: list[float], q: list[float], expected: float | None):
    one, other = (jnp.array([[x]], jnp.float32) for x in (p, q))
    exact = oracle.jensen_shannon_distance(np.array(one, np.float64), np.array(other, np.float64))
    if expected is not None:
        assert exact == pytest.approx(expected, abs=1e-7)
    distance = xla._jensen_shannon_distance(one, other)
    np.testing.assert_allclose(distance, [[exact]], rtol=1e-2)
    np.testing.assert_array_equal(distance, xla._jensen_shannon_distance(other, one))


def test_constant_keys_of_a_block_are_estimated_exactly():
    # Equal tokens in each block: the block mean is every token, so only the last block's causal
    # mask sets the estimate apart. One query sees all of it.
    q, k = draw(T=32, S=32)
    k = jnp.repeat(k[:, ::8], 8, axis=1)
    vertical, _ = vertical_slash_scores(q, k, num_queries=1)
    one = pooled_distance(q[:, -1:], k, vertical, block_size=8)
    np.testing.assert_allclose(one, 0.0, atol=1e-6)
    assert (measure(q, k, block_size=8) > 0.01).all()


def test_vertical_of_another_input_is_far():
    q, k = draw(T=32, S=32)
    vertical, _ = vertical_slash_scores(-q, k, num_queries=8)
    wrong = pooled_distance(q, k, vertical, block_size=8)
    assert (wrong > oracle.pooled_distance(q, k, block_size=8) + 0.1).all()


FAULTS = {
    "none": ("_block_means", lambda right: right),
    "padding-in-the-mean": (
        "_block_means",
        lambda right: lambda x, lengths, size: right(x, lengths + size, size),
    ),
    "divided-by-the-block-size": (
        "_block_means",
        lambda right: (
            lambda x, lengths, size: right(
                jnp.where(
                    (jnp.arange(x.shape[1])[None, :] < lengths[:, None])[:, :, None, None], x, 0.0
                ),
                jnp.full_like(lengths, -(-x.shape[1] // size) * size),
                size,
            )
        ),
    ),
    "not-causal": (
        "_attention",
        lambda right: lambda q, k, sees: right(q, k, jnp.ones_like(sees)),
    ),
    "heads-interleaved": (
        "_attention",
        lambda right: lambda q, k, sees: right(q, jnp.flip(k, axis=2), sees),
    ),
}
DISTANCE_FAULTS = {
    "none": FAULTS["none"],
    "padding-in-the-mean": FAULTS["padding-in-the-mean"],
    "lengths-ignored": (
        "last_queries",
        lambda right: lambda q, _, **sizes: right(q, None, **sizes),
    ),
    "first-queries": ("last_queries", lambda right: lambda q, *x, **y: right(q[:, ::-1], *x, **y)),
    "mass-misplaced": (
        "block_sums",
        lambda right: lambda x, **size: jnp.roll(right(x, **size), 1, axis=-1),
    ),
    "mass-of-another-head": (
        "block_sums",
        lambda right: lambda x, **size: jnp.roll(right(x, **size), 1, axis=1),
    ),
    "no-square-root": (
        "_jensen_shannon_distance",
        lambda right: lambda p, q: right(p, q) ** 2,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch):
    name, replace = FAULTS[fault]
    monkeypatch.setattr(xla, name, replace(getattr(xla, name)))
    q, k = draw(B=2, T=21, S=39, N=6, K=2)
    settings = {"block_size": 8, "kv_lengths": [39, 27]}
    lengths = as_lengths(settings["kv_lengths"])
    # Untraced until now, so that the replacement is what runs.
    run = functools.partial(xla.run_scores.__wrapped__, block_size=8, q_blocks=(0, 3))
    scores = jax.jit(lambda *operands: run(*operands))(q, k, lengths)
    expected = oracle.pooled_scores(q, k, **settings)
    assert np.allclose(scores, expected, atol=ATOL) == (fault == "none")


@pytest.mark.parametrize("fault", DISTANCE_FAULTS)
def test_a_planted_fault_of_the_distance_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch):
    name, replace = DISTANCE_FAULTS[fault]
    monkeypatch.setattr(xla, name, replace(getattr(xla, name)))
    q, k = draw(B=2, T=21, S=39, N=6, K=2)
    settings = {"block_size": 8, "kv_lengths": [39, 27]}
    vertical, _ = vertical_slash.vertical_slash_scores(q, k, num_queries=8, kv_lengths=[39, 27])
    operands = q, k, jnp.array(vertical, jnp.float32), as_lengths(settings["kv_lengths"])
    run = functools.partial(xla.run_distance.__wrapped__, block_size=8)
    distances = jax.jit(lambda *operands: run(*operands))(*operands)
    expected = oracle.pooled_distance(q, k, **settings)
    assert np.allclose(distances, expected, atol=ATOL) == (fault == "none")


def test_works_under_vmap_and_has_no_gradient():
    q, k = draw(B=2)
    vertical, _ = vertical_slash_scores(q, k, num_queries=8)

    def both(q, k, vertical):
        distance = pooled_distance(q, k, vertical, block_size=8)
        return pooled_scores(q, k, block_size=8), distance

    mapped = jax.vmap(lambda *x: [y[0] for y in both(*(z[None] for z in x))])
    for x, y in zip(jax.jit(mapped)(q, k, vertical), jax.jit(both)(q, k, vertical), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda q: sum(x.sum() for x in both(q, k, vertical))))(q)
    np.testing.assert_array_equal(gradient, 0.0)


def test_an_unknown_backend_is_refused():
    q, k = draw()
    reason = "backend='mosaic_sm90': this op has xla"
    with pytest.raises(UnsupportedError, match=reason):
        pooled_scores(q, k, block_size=8, backend="mosaic_sm90")
    with pytest.raises(UnsupportedError, match=reason):
        pooled_distance(q, k, jnp.zeros((1, 2, 40)), block_size=8, backend="mosaic_sm90")
