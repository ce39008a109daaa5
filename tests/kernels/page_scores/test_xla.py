"""Page bounds and scores in XLA against the formulas, and bounds that they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseattn_jax.kernels.backends import UnsupportedError
from sparseattn_jax.kernels.page_scores import extend_bounds, page_bounds, page_scores, xla
from tests.oracles import pages as oracle

bound_in_jit = jax.jit(page_bounds, static_argnames="page_size")
score_in_jit = jax.jit(page_scores)


def as_lengths(*lengths: int) -> jax.Array:
    return jnp.array(lengths, jnp.int32)


def draw(dtype="float32", B=3, T=2, S=21, N=6, K=2, H=8, *, seed=0, whole=False):
    """Queries and keys; whole numbers multiply and add exactly, and are often equal."""
    rng = np.random.default_rng(seed)

    def numbers(*shape: int) -> jax.Array:
        x = rng.integers(-8, 9, shape) if whole else rng.normal(size=shape)
        return jnp.asarray(x, dtype)

    return numbers(B, T, N, H), numbers(B, S, K, H)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("page_size", [1, 4, 30])
def test_bounds_equal_the_formula(page_size: int, dtype: str):
    _, k = draw(dtype)
    lengths = as_lengths(21, 3, 0)
    stale = jnp.arange(21)[None, :, None, None] >= lengths[:, None, None, None]
    results = bound_in_jit(jnp.where(stale, jnp.nan, k), page_size=page_size, kv_lengths=lengths)
    expected = oracle.page_bounds(k, lengths, page_size)
    for result, formula in zip(results, expected, strict=True):
        assert result.dtype == k.dtype
        np.testing.assert_array_equal(np.asarray(result, np.float64), formula)


def test_without_lengths_every_slot_counts():
    _, k = draw()
    for result, same in zip(
        bound_in_jit(k, page_size=8),
        bound_in_jit(k, page_size=8, kv_lengths=as_lengths(21, 21, 21)),
        strict=True,
    ):
        np.testing.assert_array_equal(result, same)


def extended(k: jax.Array, before: jax.Array, num_new: int, page_size: int, extend=extend_bounds):
    """Bounds of the first tokens, then of `num_new` more of each sequence."""
    old = bound_in_jit(k, page_size=page_size, kv_lengths=before)
    new_slots = before[:, None] + jnp.arange(num_new)[None]
    new_keys = k[jnp.arange(len(k))[:, None], new_slots]
    return extend(*old, new_keys, before, page_size=page_size)


@given(
    before=st.tuples(*3 * [st.integers(0, 17)]),
    kind=st.sampled_from([(1, 8), (4, 3), (4, 1)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_extended_bounds_equal_those_of_the_longer_cache(before, kind, seed):
    num_new, page_size = kind
    _, k = draw("bfloat16", seed=seed)
    lengths = as_lengths(*before)
    expected = bound_in_jit(k, page_size=page_size, kv_lengths=lengths + num_new)
    for result, whole in zip(extended(k, lengths, num_new, page_size), expected, strict=True):
        assert result.dtype == k.dtype
        np.testing.assert_array_equal(result, whole)


EXTENSION_FAULTS = {
    "lengths-after": lambda least, greatest, keys, lengths, page_size: extend_bounds(
        least, greatest, keys, lengths + keys.shape[1], page_size=page_size
    ),
    "last-token-only": lambda least, greatest, keys, lengths, page_size: extend_bounds(
        least, greatest, keys[:, -1:], lengths + keys.shape[1] - 1, page_size=page_size
    ),
    "swapped": lambda least, greatest, *rest, page_size: extend_bounds(
        greatest, least, *rest, page_size=page_size
    )[::-1],
}


@pytest.mark.parametrize("fault", EXTENSION_FAULTS.values(), ids=EXTENSION_FAULTS)
def test_planted_faults_of_extension_are_seen(fault):
    _, k = draw()
    before = as_lengths(10, 3, 0)
    expected = bound_in_jit(k, page_size=8, kv_lengths=before + 4)
    results = extended(k, before, 4, 8, fault)
    assert any(np.any(x != y) for x, y in zip(results, expected, strict=True))


def test_tokens_past_the_last_page_are_left_out():
    _, k = draw(S=9)
    old = bound_in_jit(k, page_size=4)
    for result, before in zip(
        extend_bounds(*old, 9 * k[:, :2], as_lengths(12, 12, 40), page_size=4), old, strict=True
    ):
        np.testing.assert_array_equal(result, before)


def test_extension_touches_no_other_page():
    """In place where the old bounds are donated, so that its cost is that of the new tokens."""
    bounds = jax.ShapeDtypeStruct((2, 4096, 2, 64), jnp.bfloat16)
    new_keys = jax.ShapeDtypeStruct((2, 1, 2, 64), jnp.bfloat16)
    extend = jax.jit(functools.partial(extend_bounds, page_size=16), donate_argnums=(0, 1))
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    compiled = extend.lower(bounds, bounds, new_keys, lengths).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 2 * bounds.size * 2
    assert memory.temp_size_in_bytes < bounds.size * 2 / 100


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scores_equal_the_formula(dtype: str):
    q, k = draw(dtype)
    bounds = bound_in_jit(k, page_size=4, kv_lengths=as_lengths(21, 3, 0))
    scores = score_in_jit(q, *bounds)
    assert (scores.shape, scores.dtype) == ((3, 2, 6, 6), jnp.float32)
    formula = oracle.page_scores(q, *(np.asarray(x, np.float64) for x in bounds))
    np.testing.assert_allclose(scores, formula, atol=1e-5)


def assert_bounds(q, k, page_size: int, score) -> None:
    """Every score reaches each true logit of its page; whole numbers, so nothing is rounded."""
    lengths = as_lengths(21, 13, 0)
    bounds = bound_in_jit(k, page_size=page_size, kv_lengths=lengths)
    scores = np.asarray(score(q, *bounds))
    keys = np.repeat(np.asarray(k, np.float64), q.shape[2] // k.shape[2], axis=2)
    logits = np.einsum("btnh,bsnh->btns", np.asarray(q, np.float64), keys)
    for j in range(k.shape[1]):
        exists = j < np.asarray(lengths)
        assert np.all(scores[exists, ..., j // page_size] >= logits[exists, ..., j])
        if page_size == 1:
            np.testing.assert_array_equal(scores[exists, ..., j], logits[exists, ..., j])
        assert np.all(np.isneginf(scores[~exists, ..., -(-j // page_size) :]))


@given(
    kind=st.sampled_from([("float32", 1), ("bfloat16", 4), ("float16", 4)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_logit_exceeds_the_score_of_its_page(kind, seed):
    dtype, page_size = kind
    assert_bounds(*draw(dtype, seed=seed, whole=True), page_size, score_in_jit)


FAULTS = {
    "least-only": lambda q, least, greatest: xla.run_scores(q, least, least),
    "greatest-only": lambda q, least, greatest: xla.run_scores(q, greatest, greatest),
    "middle": lambda q, least, greatest: xla.run_scores(q, *2 * [(least + greatest) / 2]),
    "next-page": lambda q, *bounds: jnp.roll(xla.run_scores(q, *bounds), 1, axis=-1),
    "other-head": lambda q, *bounds: jnp.roll(xla.run_scores(q, *bounds), 1, axis=2),
    "interleaved-heads": lambda q, *bounds: xla.run_scores(q[:, :, [0, 2, 4, 1, 3, 5]], *bounds),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_seen(fault):
    with pytest.raises(AssertionError):
        assert_bounds(*draw(whole=True), 4, fault)


def test_batching_by_vmap_equals_a_loop():
    q, k = draw()
    bounds = bound_in_jit(k, page_size=4)
    whole = score_in_jit(q, *bounds)
    one = jax.vmap(lambda *x: page_scores(*(y[None] for y in x))[0])(q, *bounds)
    np.testing.assert_allclose(one, whole, rtol=1e-6)


def test_an_unknown_backend_is_refused():
    q, k = draw()
    bounds = bound_in_jit(k, page_size=4)
    with pytest.raises(UnsupportedError, match="backend='cudnn': this op has xla"):
        page_scores(q, *bounds, backend="cudnn")
    with pytest.raises(UnsupportedError, match="backend='mosaic_sm90': this op has xla"):
        page_bounds(k, page_size=4, backend="mosaic_sm90")
