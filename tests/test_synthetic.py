"""The structured generator: each part by its formula, and what a selection makes of the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import XAttention
from sparseattn_jax.measures import attention_recall
from sparseattn_jax.synthetic import structured_qkv

SIZES = {
    "q_len": 60,
    "kv_len": 96,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 128,
    "dtype": jnp.float32,
    "num_sinks": 3,
    "num_columns": 4,
    "num_slashes": 2,
    "num_needles": 1,
    "needle_size": 5,
}
STRENGTHS = {
    "sink": 11.0,
    "local": 12.0,
    "local_width": 16.0,
    "needle": 14.0,
    "noise": 1.0,
    "column": 0.0,
    "slash": 0.0,
}
NOTHING = {"sink": 0.0, "local": 0.0, "needle": 0.0, "noise": 0.0, "column": 0.0, "slash": 0.0}

# Sizes are static, strengths are traced.
draw_in_jit = jax.jit(structured_qkv, static_argnames=tuple(SIZES))


@functools.cache
def draw(seed: int = 0, **settings):
    settings = SIZES | STRENGTHS | settings
    # Arrays whatever was given, so that draws share a program; one width for all heads is spread.
    strengths = {name: jnp.asarray(settings[name], jnp.float32) for name in STRENGTHS}
    width = strengths.pop("local_width")
    strengths = {name: jnp.broadcast_to(strength, 2) for name, strength in strengths.items()}
    return draw_in_jit(jax.random.key(seed), **settings | strengths | {"local_width": width})


def logits(q, k):
    """[B, N, T, S]"""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return np.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_shapes_and_dtype(dtype):
    shapes = jax.eval_shape(
        functools.partial(structured_qkv, **SIZES | {"dtype": dtype, "batch": 2}),
        jax.random.key(0),
    )
    q, k, v = shapes
    assert (q.shape, k.shape, v.shape) == ((2, 60, 4, 128), (2, 96, 2, 128), (2, 96, 2, 128))
    assert q.dtype == k.dtype == v.dtype == dtype


def test_equal_seeds_give_equal_draws():
    again = draw.__wrapped__()
    for one, other, another in zip(draw(), again, draw(1), strict=True):
        np.testing.assert_array_equal(one, other)
        assert (one != another).any()


def test_sinks_draw_every_query():
    q, k, _ = draw(**NOTHING | {"sink": 9.0})
    expected = np.where(np.arange(96) < 3, 9.0, 0.0)
    np.testing.assert_allclose(logits(q, k), np.broadcast_to(expected, (1, 4, 60, 96)), atol=1e-5)


def test_the_band_is_the_sum_of_its_phases_and_decays():
    q, k, _ = draw(**NOTHING | {"local": 10.0})
    distance = np.arange(36, 96)[:, None] - np.arange(96)
    for head in range(4):
        width = 16.0 * (0.25, 4.0)[head // 2]
        band = band_of(width, distance)
        assert np.abs(band - 1 / (1 + (distance / width) ** 2)).max() < 0.1
        expected = 10.0 * (0.9, 1.1)[head % 2] * band
        np.testing.assert_allclose(logits(q, k)[0, head], expected, atol=1e-4)


def band_of(width: float, distance: np.ndarray) -> np.ndarray:
    frequencies = -np.log1p(-(np.arange(48) + 0.5) / 48) / width
    return np.cos(frequencies[:, None, None] * distance).mean(axis=0)


def test_slashes_are_the_band_around_other_distances():
    q, k, _ = draw(**NOTHING | {"slash": 10.0, "local_width": (1.0, 0.5)})
    found = logits(q, k)[0]
    distance = np.arange(36, 96)[:, None] - np.arange(96)
    for head in range(4):
        width = (1.0, 0.5)[head // 2]
        by_distance = [found[head][distance == d].mean() for d in range(1, 49)]
        slashes = 1 + np.argsort(by_distance)[-2:]
        expected = 10.0 * sum(band_of(width, distance - d) for d in slashes)
        np.testing.assert_allclose(found[head], expected, atol=1e-3)
    assert not np.allclose(found[0], found[2], atol=1.0)


def test_columns_draw_every_query_and_are_no_sinks():
    q, k, _ = draw(**NOTHING | {"column": 9.0, "sink": 4.0})
    found = logits(q, k)[0]
    np.testing.assert_allclose(found, np.broadcast_to(found[:, :1], found.shape), atol=1e-5)
    for head in range(4):
        is_column = found[head, 0] > 8.0
        assert 1 <= is_column.sum() <= 4
        expected = np.where(np.arange(96) < 3, 4.0, np.where(is_column, 9.0, 0.0))
        np.testing.assert_allclose(found[head, 0], expected, atol=1e-5)
    assert (found[0] != found[2]).any()


def test_strengths_per_kv_head_mix_kinds_of_heads():
    mixed = {"sink": (9.0, 0.0), "column": (0.0, 7.0), "needle": (0.0, 8.0), "noise": (0.0, 1.0)}
    q, k, _ = draw(**NOTHING | mixed)
    for kv_head in range(2):
        alone = {name: strengths[kv_head] for name, strengths in mixed.items()}
        expected = logits(*draw(**NOTHING | alone)[:2])
        heads = slice(2 * kv_head, 2 * kv_head + 2)
        np.testing.assert_allclose(logits(q, k)[:, heads], expected[:, heads], atol=1e-5)


def test_needles_join_late_queries_and_early_keys():
    q, k, _ = draw(**NOTHING | {"needle": 8.0})
    for head in range(4):
        seen = logits(q, k)[0, head] > 4.0
        queries, keys = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        assert len(queries) == len(keys) == 5
        assert seen.sum() == 25
        # The late half of the keys starts at position 48, which is query 12.
        assert keys.max() < 48
        assert queries.min() >= 12
    np.testing.assert_allclose(np.unique(logits(q, k).round(3)), [0.0, 8.0])


def test_noise_has_the_given_deviation():
    q, k, _ = draw(**NOTHING | {"noise": 1.5})
    np.testing.assert_allclose(logits(q, k).std(), 1.5, rtol=0.1)


# A small stand-in for a long context: bands and needles in proportion.
LONG = {
    "kv_len": None,
    "head_dim": 64,
    "local_width": 256.0,
    "needle_size": 32,
    "num_sinks": 16,
    "num_needles": 2,
}
recall_of = jax.jit(attention_recall)


@jax.jit
def blocks_for(q, k):
    return XAttention(threshold=0.9, stride=8, block_size=32).select(q, k).blocks


@functools.cache
def select(length: int):
    q, k, _ = draw(q_len=length, **LONG)
    return q, k, blocks_for(q, k)


def test_selection_is_sparse_keeps_the_mass_and_thins_out_with_length():
    densities = [float(select(length)[2].density().mean()) for length in (512, 2048)]
    assert densities[1] < 0.5 * densities[0] < 0.25
    for length in (512, 2048):
        assert (recall_of(*select(length)) > 0.9).all()


def test_a_needle_is_found():
    # A mask made without the needles keeps less of their mass.
    q, k, blocks = select(512)
    plain_q, plain_k, _ = draw(q_len=512, needle=0.0, **LONG)
    assert (recall_of(q, k, blocks) > recall_of(q, k, blocks_for(plain_q, plain_k))).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_len": 50}, "kv_len=50 must be at least q_len=60"),
        ({"num_heads": 3}, "num_heads=3 must be a multiple of num_kv_heads=2"),
        ({"head_dim": 8}, "head_dim=8 must be at least 16"),
        ({"q_len": 0}, "q_len=0 must be at least 1"),
        ({"needle_size": 0}, "needle_size=0 must be at least 1"),
        ({"num_columns": -1}, "num_columns=-1 must not be negative"),
        ({"slash": -1.0}, "slash=-1.0 must not be negative"),
        ({"local_width": 0.0}, "local_width=0.0 must not be negative, and local_width not 0"),
        ({"needle": jnp.ones(4)}, r"needle has shape \(4,\); pass a scalar, or one per kv head"),
    ],
)
def test_bad_arguments_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        structured_qkv(jax.random.key(0), **SIZES | settings)
