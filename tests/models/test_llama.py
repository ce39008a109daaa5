"""The whole model against a float64 NumPy forward, and its laws."""

import dataclasses
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseattn_jax import models
from tests.oracles import llama as oracle

SMALL = models.LlamaConfig(
    vocab_size=11,
    num_layers=2,
    embed_dim=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=20,
    rope_theta=100.0,
    rope_scaling=None,
    norm_epsilon=1e-3,
    tie_embeddings=True,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
)
# Its three frequencies 1, 0.215, 0.046 meet the three cases: 3.18, 0.69 and 0.15 turns.
SCALING = models.Llama3RopeScaling(
    factor=4.0, low_freq_factor=0.5, high_freq_factor=2.0, original_max_position=20
)
BATCH, LENGTH = 2, 5


def variant(**changes):
    return dataclasses.replace(SMALL, **changes)


def drawn_tokens(config, seed=0):
    shape = (BATCH, LENGTH)
    return np.random.default_rng(seed).integers(config.vocab_size, size=shape, dtype=np.int32)


def drawn_weights(config):
    """Weights larger than the initial ones, so that every part weighs in the output."""
    abstract = nnx.eval_shape(lambda: models.Llama(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if "scale" in jax.tree_util.keystr(path):
            return 1 + 0.3 * values
        return values * (1.0 if len(leaf.shape) == 2 else leaf.shape[-2] ** -0.5)

    weights = jax.tree.map_with_path(draw, params)
    on_device = jax.tree.map(lambda weight: jnp.asarray(weight, config.param_dtype), weights)
    return graphdef, on_device, nnx.to_pure_dict(weights)


@functools.cache
def built(config):
    """The jitted call of a model with drawn weights, its parameters, and its oracle."""
    graphdef, params, weights = drawn_weights(config)

    @functools.partial(jax.jit, static_argnames=("attend", "remat"))
    def call(params, tokens, **options):
        return nnx.merge(graphdef, params)(tokens, **options)

    reference = functools.partial(oracle.forward, weights, config=dataclasses.asdict(config))
    return call, params, reference


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def gated(q, k, v, gates):
    """Dense attention whose kv heads are scaled by this layer's gates [K]."""
    factors = jnp.repeat(gates, q.shape[2] // k.shape[2])
    return models.dense_causal_attention(q, k, v, None) * factors[None, None, :, None]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SMALL, id="4heads-2kv-tied"),
        pytest.param(variant(num_kv_heads=4, tie_embeddings=False), id="4heads-4kv-untied"),
        pytest.param(variant(num_heads=3, num_kv_heads=1, num_layers=1), id="3heads-1kv-1layer"),
        pytest.param(
            variant(num_heads=9, num_kv_heads=3, tie_embeddings=False, rope_scaling=SCALING),
            id="9heads-3kv-untied-llama3",
        ),
    ],
)
def test_equals_the_formulas(config):
    call, params, reference = built(config)
    tokens = drawn_tokens(config)
    assert_close(call(params, tokens), reference(tokens=tokens))


@pytest.mark.parametrize(
    "positions",
    [[[3, 0, 7, 7, 40], [0, 1, 2, 3, 4]], [[5, 6, 7, 8, 9]]],
    ids=["each-row", "all-rows"],
)
def test_positions_place_the_tokens(positions):
    call, params, reference = built(SMALL)
    tokens, positions = drawn_tokens(SMALL), np.asarray(positions, np.int32)
    expected = reference(tokens=tokens, positions=np.broadcast_to(positions, tokens.shape))
    assert_close(call(params, tokens, positions=positions), expected)


def test_layers_get_their_slice_of_per_layer():
    call, params, reference = built(SMALL)
    tokens = drawn_tokens(SMALL)
    gates = np.asarray([[0.1, 2.0], [-1.0, 0.0]], np.float32)
    expected = reference(tokens=tokens, gates=gates)
    assert_close(call(params, tokens, attend=gated, per_layer=jnp.asarray(gates)), expected)


def test_per_layer_may_be_any_tree():
    call, params, reference = built(SMALL)
    tokens = drawn_tokens(SMALL)
    tree = {"scale": jnp.asarray([2.0, 3.0]), "gates": jnp.asarray([[1.0, 0.5], [2.0, 1.0]])}

    def attend(q, k, v, layer_input):
        return gated(q, k, v, layer_input["scale"] * layer_input["gates"])

    gates = np.asarray([[2.0, 1.0], [6.0, 3.0]])
    out = call(params, tokens, attend=attend, per_layer=tree)
    assert_close(out, reference(tokens=tokens, gates=gates))


@hypothesis.given(changed=st.integers(0, LENGTH - 1), token=st.integers(0, 10), seed=st.integers(0))
def test_a_token_is_seen_from_its_place_on(changed, token, seed):
    call, params, _ = built(SMALL)
    tokens = drawn_tokens(SMALL, seed % 100)
    other = tokens.copy()
    other[0, changed] = token
    before, after = call(params, tokens), call(params, other)
    np.testing.assert_array_equal(before[1], after[1])
    np.testing.assert_array_equal(before[0, :changed], after[0, :changed])
    same = np.array_equal(before[0, changed], after[0, changed])
    assert same == (token == tokens[0, changed])


@hypothesis.given(shift=st.integers(0, 1000))
def test_only_distances_between_positions_matter(shift):
    call, params, _ = built(SMALL)
    tokens = drawn_tokens(SMALL)
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    moved = call(params, tokens, positions=positions + np.int32(shift))
    np.testing.assert_allclose(moved, call(params, tokens, positions=positions), atol=2e-3)


def test_hidden_states_give_the_logits_in_chunks():
    call, params, _ = built(SMALL)
    graphdef, _, _ = drawn_weights(SMALL)

    @jax.jit
    def in_chunks(params, tokens):
        model = nnx.merge(graphdef, params)
        hidden = model.hidden_states(tokens)
        return jnp.concatenate([model.logits(hidden[:, :2]), model.logits(hidden[:, 2:])], axis=1)

    tokens = drawn_tokens(SMALL)
    assert_close(in_chunks(params, tokens), np.asarray(call(params, tokens)))


@functools.cache
def gradients(remat):
    """Of a loss that reads every logit, by the parameters and by the gates."""
    call, params, _ = built(SMALL)
    tokens = drawn_tokens(SMALL)

    def loss(params, gates):
        logits = call(params, tokens, attend=gated, per_layer=gates, remat=remat)
        return jnp.sum(jnp.sin(logits))

    gates = jnp.asarray([[0.1, 2.0], [-1.0, 0.5]])
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, gates)


def test_gates_and_parameters_have_gradients():
    value, (by_params, by_gates) = gradients(remat=False)
    _, _, reference = built(SMALL)
    tokens, gates, step = drawn_tokens(SMALL), np.asarray([[0.1, 2.0], [-1.0, 0.5]]), 1e-5

    def loss(gates):
        return np.sin(reference(tokens=tokens, gates=gates)).sum()

    expected = np.zeros_like(gates)
    for index in np.ndindex(*gates.shape):
        nudge = np.zeros_like(gates)
        nudge[index] = step
        expected[index] = (loss(gates + nudge) - loss(gates - nudge)) / (2 * step)
    np.testing.assert_allclose(value, loss(gates), rtol=1e-4)
    np.testing.assert_allclose(by_gates, expected, rtol=1e-3, atol=1e-3)
    for path, leaf in jax.tree.leaves_with_path(by_params):
        assert np.isfinite(leaf).all(), path
        assert (leaf != 0).any(), path


def test_remat_has_the_same_gradients():
    kept, recomputed = gradients(remat=False), gradients(remat=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), kept, recomputed
    )


def test_remat_keeps_less_for_the_backward_pass():
    call, params, _ = built(SMALL)

    def kept_elements(remat):
        def backward(params):
            return jax.vjp(lambda p: call(p, drawn_tokens(SMALL), remat=remat), params)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, params)))

    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert kept_elements(remat=True) - weights < 0.5 * (kept_elements(remat=False) - weights)


def test_bfloat16_is_close_to_float32():
    tokens = drawn_tokens(SMALL)
    exact = built(SMALL)[2](tokens=tokens)
    call, params, _ = built(variant(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    logits = call(params, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=0.05 * np.abs(exact).max())


def test_computes_in_its_dtype():
    config = variant(dtype=jnp.float16)
    seen = []

    def attend(q, k, v, layer_input):
        seen.extend(array.dtype for array in (q, k, v))
        return q

    def hidden(tokens):
        return models.Llama(config, rngs=nnx.Rngs(0)).hidden_states(tokens, attend=attend)

    assert jax.eval_shape(hidden, drawn_tokens(config)).dtype == jnp.float16
    assert set(seen) == {jnp.dtype("float16")}


SAME_SHAPES = {
    "rope_theta": 10000.0,
    "rope_scaling": SCALING,
    "norm_epsilon": 1e-5,
    "dtype": jnp.bfloat16,
    "param_dtype": jnp.bfloat16,
}
OTHER_SHAPES = {
    "vocab_size": ("embedding", (13, 12), 13),
    "num_layers": ("layers.mlp_norm.scale", (3, 12), 3),
    "embed_dim": ("embedding", (11, 16), 16),
    "num_heads": ("layers.attention.query.kernel", (2, 12, 48), 8),
    "num_kv_heads": ("layers.attention.key.kernel", (2, 12, 24), 4),
    "head_dim": ("layers.attention.value.kernel", (2, 12, 16), 8),
    "mlp_dim": ("layers.mlp.down.kernel", (2, 24, 12), 24),
    "tie_embeddings": ("head", (11, 12), False),
}


def test_every_field_is_tested():
    fields = {field.name for field in dataclasses.fields(models.LlamaConfig)}
    assert fields == SAME_SHAPES.keys() | OTHER_SHAPES.keys()


@pytest.mark.parametrize("field", SAME_SHAPES)
def test_field_changes_the_output(field):
    tokens = drawn_tokens(SMALL)
    call, params, _ = built(SMALL)
    other_call, other_params, _ = built(variant(**{field: SAME_SHAPES[field]}))
    difference = np.abs(call(params, tokens) - other_call(other_params, tokens)).max()
    assert difference > 1e-3


@pytest.mark.parametrize("field", OTHER_SHAPES)
def test_field_changes_the_parameters(field):
    path, shape, value = OTHER_SHAPES[field]
    for config, has_shape in ((SMALL, False), (variant(**{field: value}), True)):
        shapes = parameter_shapes(config)
        assert (shapes.get(path) == shape) is has_shape


def parameter_shapes(config):
    state = nnx.state(nnx.eval_shape(lambda: models.Llama(config, rngs=nnx.Rngs(0))))
    return {".".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(state)}


def test_llama3_8b_has_the_published_number_of_parameters():
    shapes = parameter_shapes(models.llama3_8b()).values()
    assert sum(math.prod(shape) for shape in shapes) == 8_030_261_248


def test_initial_weights_follow_the_documented_distribution():
    config = models.tiny()
    model = nnx.jit(lambda: models.Llama(config, rngs=nnx.Rngs(0)))()
    layers = model.layers
    np.testing.assert_array_equal(layers.mlp_norm.scale[...], 1)
    residual = math.sqrt(1 / (2 * config.num_layers))
    for kernel, stddev in (
        (model.embedding, 128**-0.5),
        (layers.attention.query.kernel, 128**-0.5),
        (layers.mlp.gate.kernel, 128**-0.5),
        (layers.attention.output.kernel, 256**-0.5 * residual),
        (layers.mlp.down.kernel, 384**-0.5 * residual),
    ):
        np.testing.assert_allclose(kernel[...].std(), stddev, rtol=0.02)
    first, second = layers.mlp.up.kernel[...][:2]
    assert np.abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02


def test_depth_does_not_grow_the_program():
    def lines(num_layers):
        abstract = nnx.eval_shape(
            lambda: models.Llama(variant(num_layers=num_layers), rngs=nnx.Rngs(0))
        )
        graphdef, params = nnx.split(abstract)
        tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
        return len(run.lower(params, tokens).as_text().splitlines())

    assert lines(2) == lines(40)


@pytest.mark.parametrize("token", [-1, SMALL.vocab_size, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_loud(token):
    call, params, _ = built(SMALL)
    tokens = drawn_tokens(SMALL)
    tokens[0, 2] = token
    wrong, right = call(params, tokens)
    assert np.isnan(wrong[2:]).all()
    assert np.isfinite(right).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(
            {"tokens": jnp.zeros(4, jnp.int32)},
            r"tokens has shape \(4,\) and dtype int32; it must be int32 of shape \[batch, length\]",
            id="tokens-1d",
        ),
        pytest.param({"tokens": jnp.zeros((1, 4))}, "tokens .* dtype float32", id="tokens-float"),
        pytest.param(
            {"positions": jnp.zeros((3, 4), jnp.int32)},
            r"positions has shape \(3, 4\) .* of shape \(2, 4\) like tokens, or \(1, 4\)",
            id="positions-shape",
        ),
        pytest.param(
            {"positions": jnp.zeros((2, 4))}, "positions .* dtype float32", id="positions-float"
        ),
        pytest.param(
            {"per_layer": {"gates": jnp.ones((3, 2))}},
            r"per_layer\['gates'\] has shape \(3, 2\); its first axis must be num_layers=2",
            id="per_layer-axis",
        ),
        pytest.param(
            {"per_layer": 1.0}, r"per_layer has shape \(\); its first axis", id="per_layer-scalar"
        ),
    ],
)
@pytest.mark.parametrize("method", ["__call__", "hidden_states"])
def test_refuses(method, arguments, sentence):
    model = nnx.eval_shape(lambda: models.Llama(SMALL, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=sentence):
        getattr(model, method)(**({"tokens": jnp.zeros((2, 4), jnp.int32)} | arguments))
