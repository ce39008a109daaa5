"""Dense causal attention, and the layer around an attention function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseattn_jax import models
from sparseattn_jax.models.attention import Attention
from tests.oracles import llama as oracle


def draw(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1), (9, 3)])
def test_dense_causal_attention_is_its_formula(heads, kv_heads):
    q, k, v = draw(2, 5, heads, 4), draw(2, 5, kv_heads, 4), draw(2, 5, kv_heads, 4) + 1
    q32, k32, v32 = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    out = models.dense_causal_attention(q32, k32, v32, None)
    expected = [oracle.attention(*sequence) for sequence in zip(q, k, v, strict=True)]
    np.testing.assert_allclose(out, np.stack(expected), rtol=1e-5, atol=1e-5)


def test_dense_causal_attention_refuses_a_layer_input():
    x = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match="reads no layer input; pass per_layer=None"):
        models.dense_causal_attention(x, x, x, jnp.ones(1))


def small_layer():
    config = dataclasses.replace(
        models.tiny(), embed_dim=6, num_heads=4, num_kv_heads=2, head_dim=2
    )
    return Attention(config, rngs=nnx.Rngs(0))


def test_heads_reach_attend_in_order():
    """Head n holds the channels [n H, (n + 1) H) of its projection."""
    layer = small_layer()
    x, angles = jnp.asarray(draw(1, 3, 6), jnp.float32), jnp.zeros((1, 3, 1))
    seen = {}

    def attend(q, k, v, layer_input):
        seen.update(q=q, k=k, v=v, layer_input=layer_input)
        return q

    out = np.asarray(layer(x, angles, attend=attend, layer_input="mine"))
    x, kernels = np.asarray(x), jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    assert seen["layer_input"] == "mine"
    for name, projection in (("q", "query"), ("k", "key"), ("v", "value")):
        projected = x @ kernels[projection]["kernel"]
        for head, actual in enumerate(np.moveaxis(np.asarray(seen[name]), 2, 0)):
            channels = projected[..., 2 * head : 2 * head + 2]
            np.testing.assert_allclose(actual, channels, rtol=1e-5, atol=1e-6)
    expected = x @ kernels["query"]["kernel"] @ kernels["output"]["kernel"]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_refuses_an_output_of_another_shape():
    with pytest.raises(ValueError, match=r"returned shape \(1, 3, 2, 2\); .* \(1, 3, 4, 2\)"):
        small_layer()(
            jnp.ones((1, 3, 6)),
            jnp.zeros((1, 3, 1)),
            attend=lambda q, k, v, layer_input: k,
            layer_input=None,
        )
