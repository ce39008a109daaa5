"""Dense causal attention, and the layer around an attention function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseattn_jax import models
from sparseattn_jax.models.attention import Attention, sliding_causal_attention
from tests.drawing import block_matrix
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


SEEN_WITH_A_WINDOW_OF_3 = """
    #.....
    ##....
    ###...
    .###..
    ..###.
    ...###
"""


def test_a_window_counts_the_query_s_own_token():
    q, k = (jnp.asarray(draw(1, 6, 1, 6), jnp.float32) for _ in range(2))
    weights = sliding_causal_attention(3, q, k, jnp.eye(6)[None, :, None], None)[0, :, 0]
    np.testing.assert_array_equal(weights > 0, block_matrix(SEEN_WITH_A_WINDOW_OF_3))


@pytest.mark.parametrize("window", [1, 3, 5, 9])
def test_sliding_causal_attention_is_its_formula(window):
    q, k, v = draw(2, 5, 6, 4), draw(2, 5, 2, 4), draw(2, 5, 2, 4) + 1
    q32, k32, v32 = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    out = sliding_causal_attention(window, q32, k32, v32, None)
    expected = [oracle.attention(*row, window=window) for row in zip(q, k, v, strict=True)]
    np.testing.assert_allclose(out, np.stack(expected), rtol=1e-5, atol=1e-5)


def test_sliding_causal_attention_refuses_a_layer_input():
    x = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match="reads no layer input; pass per_layer=None"):
        sliding_causal_attention(2, x, x, x, jnp.ones(1))


@pytest.mark.parametrize(
    ("sliding_layers", "lengths"),
    [((), [4]), ((0, 1, 2, 3), [4]), ((2, 3), [2, 2]), ((0, 2), [1, 1, 1, 1])],
    ids=str,
)
def test_dense_runs_are_as_long_as_can_be(sliding_layers, lengths):
    window = 2 if sliding_layers else None
    config = dataclasses.replace(
        models.tiny(), sliding_window=window, sliding_layers=sliding_layers
    )
    runs = models.dense_runs(config)
    assert [run.num_layers for run in runs] == lengths
    x = jnp.asarray(draw(1, 4, 1, 4), jnp.float32)
    layer = 0
    for run in runs:
        expected = models.dense_causal_attention(x, x, x, None)
        if layer in sliding_layers:
            expected = sliding_causal_attention(2, x, x, x, None)
        out, state = run.attend(x, x, x, None, "kept", jnp.int32(layer))
        np.testing.assert_array_equal(out, expected)
        assert state == "kept"
        layer += run.num_layers


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_layers": 0}, "num_layers=0 must be a positive integer"),
        (
            {"num_layers": 2, "per_layer": {"gates": jnp.ones((3, 2))}},
            r"per_layer\['gates'\] has shape \(3, 2\); its first axis must be num_layers=2",
        ),
        ({"num_layers": 2, "per_layer": 1.0}, r"per_layer has shape \(\); its first axis"),
    ],
    ids=["num_layers", "axis", "scalar"],
)
def test_a_run_of_layers_refuses(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.LayerRun(attend=models.stateless(models.dense_causal_attention), **arguments)


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
