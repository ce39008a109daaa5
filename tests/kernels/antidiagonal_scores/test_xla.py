"""Antidiagonal scores in XLA against the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseattn_jax.kernels.antidiagonal_scores import antidiagonal_scores, xla
from sparseattn_jax.kernels.backends import UnsupportedError
from tests.oracles import xattention as oracle


def draw(B=1, T=40, S=40, N=2, K=1, H=8, seed=0):
    """Queries and keys whose logits spread enough that the softmax is far from flat."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(B, T, N, H)), rng.normal(size=(B, S, K, H))
    return jnp.array(2.5 * q, jnp.float32), jnp.array(2.5 * k, jnp.float32)


score_in_jit = jax.jit(
    antidiagonal_scores,
    static_argnames=("stride", "block_size", "is_causal", "q_blocks", "workspace_bytes"),
)


def score(q, k, *, kv_lengths=None, **settings):
    lengths = None if kv_lengths is None else jnp.array(kv_lengths, jnp.int32)
    return score_in_jit(q, k, kv_lengths=lengths, **settings)


CASES = {
    "square": ({}, {}),
    "odd-length": ({"T": 37, "S": 37}, {}),
    "shorter-than-a-group": ({"T": 3, "S": 3}, {}),
    "shorter-than-a-block": ({"T": 11, "S": 11}, {}),
    "T<S-aligned": ({"T": 24}, {}),
    "T<S-unaligned": ({"T": 21, "S": 46}, {}),
    "one-query": ({"T": 1}, {}),
    "non-causal": ({"T": 37, "S": 61}, {"is_causal": False}),
    "non-causal-T>S": ({"T": 37, "S": 21}, {"is_causal": False}),
    "gqa-3:1": ({"N": 6, "K": 2}, {}),
    "stride-8": ({"T": 37, "S": 61}, {"stride": 8}),
    "stride-16": ({"T": 70, "S": 93}, {"stride": 16, "block_size": 32}),
    "block-64": ({"T": 100, "S": 150}, {"block_size": 64}),
    "block-128": ({"T": 100, "S": 150}, {"block_size": 128, "stride": 16}),
    "lengths": ({"B": 3}, {"kv_lengths": [40, 22, 0]}),
    "lengths-T<S": ({"B": 3, "T": 21}, {"kv_lengths": [39, 25, 10]}),
    "lengths-non-causal": ({"B": 3, "T": 21}, {"kv_lengths": [39, 6, 0], "is_causal": False}),
}


@pytest.mark.parametrize(("shape", "settings"), CASES.values(), ids=CASES)
def test_equals_the_formula(shape: dict, settings: dict):
    q, k = draw(**shape)
    settings = {"stride": 4, "block_size": 16, "is_causal": True} | settings
    scores = score(q, k, **settings)
    assert scores.dtype == jnp.float32
    expected = oracle.antidiagonal_scores(q, k, **settings)
    np.testing.assert_allclose(scores, expected, atol=3e-6)


# Segments of every phase against groups of 4: whole groups, parts of one, several in one.
SEGMENTS = np.array(
    [
        np.repeat([3, 1, 4, 7, 5, 9], [9, 1, 2, 17, 8, 9]),
        np.repeat([0, 1, 2], [16, 20, 10]),
    ]
)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("lengths", [None, [46, 31]], ids=["all", "lengths"])
@pytest.mark.parametrize("T", [46, 21], ids=["T=S", "T<S"])
def test_segments_are_scored_apart(T: int, lengths: list[int] | None, is_causal: bool):
    q, k = draw(B=2, T=T, S=46)
    settings = {"stride": 4, "block_size": 16, "is_causal": is_causal, "kv_lengths": lengths}
    scores = score(q, k, segment_ids=jnp.array(SEGMENTS, jnp.int32), **settings)
    expected = oracle.antidiagonal_scores(q, k, segment_ids=SEGMENTS, **settings)
    np.testing.assert_allclose(scores, expected, atol=3e-6)


def test_segments_are_scored_apart_in_tiles_and_ranges():
    q, k = draw(B=2, T=46, S=46, N=4, K=2)
    settings = {"stride": 4, "block_size": 16, "is_causal": True}
    segment_ids = jnp.array(SEGMENTS, jnp.int32)
    whole = score(q, k, segment_ids=segment_ids, **settings)
    tiles = score(q, k, segment_ids=segment_ids, workspace_bytes=1, **settings)
    rows = score(q, k, segment_ids=segment_ids, q_blocks=(1, 3), **settings)
    np.testing.assert_allclose(tiles, whole, atol=1e-6)
    np.testing.assert_allclose(rows, whole[:, :, 1:3], atol=1e-6)


def test_one_segment_is_no_segment():
    q, k = draw()
    settings = {"stride": 4, "block_size": 16, "is_causal": True}
    one = score(q, k, segment_ids=jnp.full((1, 40), 7, jnp.int32), **settings)
    np.testing.assert_allclose(one, score(q, k, **settings), atol=1e-6)


# T, S, N, K: few, so that cases share compiled programs. T and S - T have all remainders by 8.
SHAPES = [
    (1, 1, 1, 1),
    (1, 38, 4, 2),
    (3, 3, 3, 1),
    (6, 31, 1, 1),
    (8, 24, 4, 2),
    (13, 13, 3, 1),
    (16, 16, 1, 1),
    (18, 45, 4, 2),
    (20, 50, 3, 1),
    (24, 63, 1, 1),
    (29, 41, 4, 2),
    (31, 33, 3, 1),
    (37, 37, 1, 1),
    (40, 70, 4, 2),
]


@given(
    shape=st.sampled_from(SHAPES),
    stride=st.sampled_from([2, 4, 8]),
    is_causal=st.booleans(),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_any_shape_equals_the_formula(shape, stride, is_causal, seed, data):
    T, S, N, K = shape
    lengths = data.draw(st.none() | st.lists(st.integers(0, S), min_size=2, max_size=2))
    q, k = draw(B=2, T=T, S=S, N=N, K=K, H=4, seed=seed)
    settings = {"stride": stride, "block_size": 8, "is_causal": is_causal, "kv_lengths": lengths}
    expected = oracle.antidiagonal_scores(q, k, **settings)
    np.testing.assert_allclose(score(q, k, **settings), expected, atol=3e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
def test_narrow_operands_are_summed_in_float32(dtype):
    q, k = (x.astype(dtype) for x in draw(T=37, S=61))
    scores = score(q, k, stride=4, block_size=16, is_causal=True)
    assert scores.dtype == jnp.float32
    expected = oracle.antidiagonal_scores(q, k, stride=4, block_size=16, is_causal=True)
    np.testing.assert_allclose(scores, expected, atol=3e-6)


@pytest.mark.parametrize("workspace_bytes", [1, 30_000, 60_000, 120_000])
def test_the_workspace_does_not_change_the_result(workspace_bytes: int):
    # From one query block of one head at a time to all at once; 5 whole blocks and a partial one.
    q, k = draw(B=2, T=85, S=100, N=6, K=2)
    settings = {"stride": 4, "block_size": 16, "is_causal": True, "kv_lengths": [100, 61]}
    expected = oracle.antidiagonal_scores(q, k, **settings)
    scores = score(q, k, workspace_bytes=workspace_bytes, **settings)
    np.testing.assert_allclose(scores, expected, atol=3e-6)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("q_blocks", [(0, 2), (1, 4), (5, 6)], ids=str)
def test_some_query_blocks(is_causal: bool, q_blocks: tuple[int, int]):
    q, k = draw(B=2, T=85, S=103, N=4, K=2)
    settings = {"stride": 4, "block_size": 16, "is_causal": is_causal, "kv_lengths": [103, 61]}
    expected = oracle.antidiagonal_scores(q, k, **settings)[:, :, slice(*q_blocks)]
    np.testing.assert_allclose(score(q, k, q_blocks=q_blocks, **settings), expected, atol=3e-6)


def test_causal_ranges_score_no_key_behind_their_end(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def score_all(q, k, kv_lengths, segment_ids, **settings):
        seen.append((q.shape[1], k.shape[1]))
        return jnp.ones((1, 1, -(-q.shape[1] // 4), -(-k.shape[1] // 4)))

    monkeypatch.setattr(xla, "_score_all", score_all)
    settings = {"stride": 4, "block_size": 4, "is_causal": True, "workspace_bytes": 2**20}
    function = functools.partial(xla.run.__wrapped__, q_blocks=(0, 128), **settings)
    q, k = (jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32) for length in (510, 512))
    scores = jax.eval_shape(lambda q, k: function(q, k, None), q, k)
    # Two keys before the first query: two more queries end each range's keys with a block.
    assert seen == [(130, 132), (130, 260), (130, 388), (126, 512)]
    assert scores.shape == (1, 1, 128, 128)


def test_the_workspace_bounds_the_memory():
    T, N, stride, workspace_bytes = 2048, 8, 4, 2**20
    q, k = (jax.ShapeDtypeStruct((1, T, heads, 16), jnp.float32) for heads in (N, 2))
    function = functools.partial(
        antidiagonal_scores,
        stride=stride,
        block_size=64,
        is_causal=True,
        workspace_bytes=workspace_bytes,
    )
    memory = jax.jit(function).lower(q, k).compile().memory_analysis()
    all_logits = 4 * N * (T // stride) ** 2
    assert all_logits == 8 * workspace_bytes
    assert memory.temp_size_in_bytes < 3 * workspace_bytes


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_a_padded_batch_equals_each_sequence_alone(is_causal: bool):
    q, k = draw(B=3, T=45, S=45, N=4, K=2)
    lengths = [45, 30, 7]
    settings = {"stride": 4, "block_size": 16, "is_causal": is_causal}
    # What padding holds must not matter.
    for b, length in enumerate(lengths):
        k = k.at[b, length:].set(jnp.nan)
        q = q.at[b, length:].set(jnp.nan) if is_causal else q
    scores = np.array(score(q, k, kv_lengths=lengths, **settings))
    for b, length in enumerate(lengths):
        end = length if is_causal else 45
        alone = score(q[b : b + 1, :end], k[b : b + 1, :length], **settings)[0]
        rows, columns = alone.shape[1:]
        np.testing.assert_allclose(scores[b, :, :rows, :columns], alone, atol=1e-6)
        scores[b, :, :rows, :columns] = 0.0
    np.testing.assert_array_equal(scores, 0.0)


def test_rows_sum_to_the_groups_of_the_block():
    q, k = draw(T=37, S=61)
    scores = score(q, k, stride=4, block_size=16, is_causal=True)
    np.testing.assert_allclose(scores.sum(axis=-1), [[[4, 4, 2]] * 2], rtol=1e-6)


def test_works_under_vmap_and_has_no_gradient():
    q, k = draw(B=2)
    function = functools.partial(antidiagonal_scores, stride=4, block_size=16, is_causal=True)
    mapped = jax.jit(jax.vmap(lambda q, k: function(q[None], k[None])[0]))(q, k)
    np.testing.assert_allclose(mapped, jax.jit(function)(q, k), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda q: function(q, k)[0, 0, 2, 0]))(q)
    np.testing.assert_array_equal(gradient, 0.0)


def test_an_unknown_backend_is_refused():
    q, k = draw()
    with pytest.raises(UnsupportedError, match="backend='cudnn': this op has mosaic_sm90, xla"):
        antidiagonal_scores(q, k, stride=4, block_size=16, is_causal=True, backend="cudnn")
