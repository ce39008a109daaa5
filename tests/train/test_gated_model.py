"""Gates between full and streaming attention, against attention written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import Streaming
from sparseattn_jax.train import gated_model

STREAMING = Streaming(sink_size=2, recent_size=4, block_size=2)

# Sinks: the first block of two. Window: the query's block and the one before it.
STREAMING_MASK = """
    1.......
    11......
    111.....
    1111....
    11111...
    111111..
    11..111.
    11..1111
"""


def drawn_mask(picture: str) -> np.ndarray:
    return np.array([[mark == "1" for mark in line.strip()] for line in picture.split()])


def attention(q, k, v, mask: np.ndarray) -> np.ndarray:
    """Softmax attention in float64 over the marked keys, each kv head serving two query heads."""
    out = np.zeros(q.shape)
    for head in range(q.shape[2]):
        scores = q[0, :, head] @ k[0, :, head // 2].T / np.sqrt(q.shape[3])
        weights = np.where(mask, np.exp(scores), 0)
        out[0, :, head] = weights / weights.sum(axis=1, keepdims=True) @ v[0, :, head // 2]
    return out


@pytest.mark.parametrize("gates", [(1.0, 1.0), (0.0, 0.0), (0.25, 1.0)], ids=str)
def test_each_kv_head_mixes_both_kinds_by_its_gate(gates: tuple[float, float]) -> None:
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(1, 8, heads, 4)) for heads in (4, 2, 2))
    mixed = gated_model.mixed_attention(
        STREAMING, jnp.float32(q), jnp.float32(k), jnp.float32(v), jnp.float32(gates)
    )
    full = attention(q, k, v, np.tri(8, dtype=bool))
    recent = attention(q, k, v, drawn_mask(STREAMING_MASK))
    gate = np.repeat(gates, 2)[None, None, :, None]
    np.testing.assert_allclose(mixed, gate * full + (1 - gate) * recent, atol=1e-5)


def test_open_gates_are_the_dense_model(tiny_model, tiny_weights) -> None:
    config = tiny_model.llama()
    tokens = jnp.arange(16, dtype=jnp.int32)[None]
    dense = gated_model.logits(config, tiny_weights, tokens, gates=None, streaming=STREAMING)
    gated = gated_model.logits(
        config, tiny_weights, tokens, gates=jnp.ones((2, 2)), streaming=STREAMING
    )
    closed = gated_model.logits(
        config, tiny_weights, tokens, gates=jnp.zeros((2, 2)), streaming=STREAMING
    )
    np.testing.assert_allclose(gated, dense, atol=1e-6)
    assert jnp.abs(closed - dense).max() > 1e-6


def test_weights_are_a_function_of_the_key(tiny_model, tiny_weights) -> None:
    config = tiny_model.llama()
    first = jax.tree.leaves(tiny_weights)
    again, other = (
        jax.tree.leaves(gated_model.draw_weights(config, jax.random.key(seed))) for seed in (0, 1)
    )
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))
    shapes = jax.tree.leaves(gated_model.weight_shapes(config))
    assert [leaf.shape for leaf in first] == [leaf.shape for leaf in shapes]
