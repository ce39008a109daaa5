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

    reference = functools.partial(oracle.forward, weights, config=oracle.described(config))
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
        pytest.param(
            variant(
                attention_bias=True,
                output_bias=True,
                mlp_bias=True,
                qk_norm=True,
                rope_scaling=models.LinearRopeScaling(factor=3.0),
            ),
            id="biases-qk_norm-linear",
        ),
        pytest.param(
            variant(attention_bias=True, num_layers=3, sliding_window=2, sliding_layers=(1, 2)),
            id="qkv_biases-windows-above-a-layer",
        ),
        pytest.param(
            variant(
                sliding_window=3,
                sliding_layers=(0, 1),
                rope_scaling=models.YarnRopeScaling(
                    factor=4.0, original_max_position=20, beta_fast=2.0, beta_slow=0.25
                ),
            ),
            id="windows-yarn",
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


def test_dynamic_scaling_reads_the_greatest_position_of_all_rows():
    config = variant(rope_scaling=models.DynamicRopeScaling(factor=2.0, original_max_position=4))
    call, params, reference = built(config)
    tokens = drawn_tokens(config)
    positions = np.asarray([[0, 1, 2, 3, 4], [0, 1, 2, 3, 9]], np.int32)
    expected = reference(tokens=tokens, positions=positions)
    assert_close(call(params, tokens, positions=positions), expected)


def gated_and_counted(q, k, v, gates, state, layer):
    """`gated`, which writes to the layer's place how many layers came before it, plus 1."""
    return gated(q, k, v, gates), state.at[layer].set(state.max() + 1)


def cached_call(lengths, params, tokens, gates):
    """Logits and state of a model whose layers attend in runs."""
    graphdef, _, _ = drawn_weights(SMALL)
    model, runs = nnx.merge(graphdef, params), []
    for length in lengths:
        first = sum(run.num_layers for run in runs)
        per_layer = gates[first : first + length]
        runs.append(
            models.LayerRun(num_layers=length, attend=gated_and_counted, per_layer=per_layer)
        )
    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    hidden, state = model.cached_hidden_states(
        tokens, jnp.zeros(SMALL.num_layers, jnp.int32), runs=runs, positions=positions
    )
    return model.logits(hidden), state


@pytest.mark.parametrize("lengths", [(2,), (1, 1)], ids=str)
def test_runs_carry_the_state_through_the_layers_in_order(lengths):
    _, params, reference = built(SMALL)
    tokens, gates = drawn_tokens(SMALL), np.asarray([[0.1, 2.0], [-1.0, 0.5]], np.float32)
    logits, state = jax.jit(cached_call, static_argnums=0)(lengths, params, tokens, gates)
    assert_close(logits, reference(tokens=tokens, gates=gates))
    np.testing.assert_array_equal(state, [1, 2])


@pytest.mark.full
def test_runs_have_the_gradients_of_one():
    _, params, _ = built(SMALL)
    tokens, gates = jnp.asarray(drawn_tokens(SMALL)), jnp.asarray([[0.1, 2.0], [-1.0, 0.5]])

    def gradients(lengths):
        def loss(params, gates):
            return jnp.sum(jnp.sin(cached_call(lengths, params, tokens, gates)[0]))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, gates)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradients((2,)),
        gradients((1, 1)),
    )


@pytest.mark.parametrize("num_runs", [1, 2])
def test_the_state_is_changed_in_place(num_runs):
    """A donated state needs no second of its size."""
    config = variant(num_layers=4)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: models.Llama(config, rngs=nnx.Rngs(0))))

    def attend(q, k, v, layer_input, state, layer):
        return q, jax.lax.dynamic_update_index_in_dim(state, k[0, 0, 0, 0], layer, axis=0)

    def call(params, tokens, state):
        run = models.LayerRun(num_layers=config.num_layers // num_runs, attend=attend)
        model = nnx.merge(graphdef, params)
        positions = jnp.zeros((1, 1), jnp.int32)
        return model.cached_hidden_states(tokens, state, runs=[run] * num_runs, positions=positions)

    state = jax.ShapeDtypeStruct((10**6,), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    compiled = jax.jit(call, donate_argnums=2).lower(params, tokens, state).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * state.size
    assert memory.temp_size_in_bytes < state.size


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


@pytest.mark.full
def test_remat_has_the_same_gradients_with_windows():
    """Two runs of layers, each recomputed."""
    config = variant(sliding_window=2, sliding_layers=(1,))
    call, params, _ = built(config)
    tokens = jnp.asarray(drawn_tokens(config))

    def gradients(remat):
        return jax.grad(lambda params: jnp.sin(call(params, tokens, remat=remat)).sum())(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradients(False),
        gradients(True),
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
# Of a model whose second layer has a window of 2.
WINDOWS = {"sliding_window": 3, "sliding_layers": (0,)}
OTHER_SHAPES = {
    "vocab_size": ("embedding", (13, 12), 13),
    "num_layers": ("layers.mlp_norm.scale", (3, 12), 3),
    "embed_dim": ("embedding", (11, 16), 16),
    "num_heads": ("layers.attention.query.kernel", (2, 12, 48), 8),
    "num_kv_heads": ("layers.attention.key.kernel", (2, 12, 24), 4),
    "head_dim": ("layers.attention.value.kernel", (2, 12, 16), 8),
    "mlp_dim": ("layers.mlp.down.kernel", (2, 24, 12), 24),
    "tie_embeddings": ("head", (11, 12), False),
    "attention_bias": ("layers.attention.value.bias", (2, 12), True),
    "output_bias": ("layers.attention.output.bias", (2, 12), True),
    "mlp_bias": ("layers.mlp.down.bias", (2, 12), True),
    "qk_norm": ("layers.attention.key_norm.scale", (2, 6), True),
}
WITHOUT_EFFECT = {"max_position"}


def test_every_field_is_tested():
    fields = {field.name for field in dataclasses.fields(models.LlamaConfig)}
    assert fields == SAME_SHAPES.keys() | WINDOWS.keys() | OTHER_SHAPES.keys() | WITHOUT_EFFECT


@pytest.mark.parametrize("field", SAME_SHAPES | WINDOWS)
def test_field_changes_the_output(field):
    config = variant(sliding_window=2, sliding_layers=(1,)) if field in WINDOWS else SMALL
    other = dataclasses.replace(config, **{field: (SAME_SHAPES | WINDOWS)[field]})
    tokens = drawn_tokens(SMALL)
    call, params, _ = built(config)
    other_call, other_params, _ = built(other)
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


@pytest.mark.parametrize("is_cached", [False, True], ids=["call", "cached"])
def test_depth_does_not_grow_the_program(is_cached):
    """80 layers are lowered to as many lines as one, with inputs and a state of each layer too."""

    def lines(num_layers):
        abstract = nnx.eval_shape(
            lambda: models.Llama(variant(num_layers=num_layers), rngs=nnx.Rngs(0))
        )
        graphdef, params = nnx.split(abstract)
        tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        gates = jax.ShapeDtypeStruct((num_layers, 2), jnp.float32)

        @jax.jit
        def call(params, tokens, gates):
            model = nnx.merge(graphdef, params)
            if not is_cached:
                return model(tokens, attend=gated, per_layer=gates)
            run = models.LayerRun(num_layers=num_layers, attend=gated_and_counted, per_layer=gates)
            state, positions = jnp.zeros(num_layers), jnp.zeros((1, 4), jnp.int32)
            return model.cached_hidden_states(tokens, state, runs=[run], positions=positions)

        return len(call.lower(params, tokens, gates).as_text().splitlines())

    assert lines(1) == lines(80)


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
        pytest.param(
            {"per_layer": jnp.ones(2)},
            "per_layer has no reader: dense attention, the default, takes no layer input",
            id="per_layer-alone",
        ),
    ],
)
@pytest.mark.parametrize("method", ["__call__", "hidden_states"])
def test_refuses(method, arguments, sentence):
    model = nnx.eval_shape(lambda: models.Llama(SMALL, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=sentence):
        getattr(model, method)(**({"tokens": jnp.zeros((2, 4), jnp.int32)} | arguments))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"lengths": [2, 1]}, r"runs have \[2, 1\] layers, 3 together; they must cover .*layers=2"),
        ({"lengths": []}, r"runs have \[\] layers, 0 together"),
        ({"tokens": jnp.zeros(4, jnp.int32)}, r"tokens has shape \(4,\)"),
        ({"positions": jnp.zeros((3, 4), jnp.int32)}, r"positions has shape \(3, 4\)"),
    ],
    ids=["too-many-layers", "no-layers", "tokens", "positions"],
)
def test_cached_hidden_states_refuse(arguments, sentence):
    model = nnx.eval_shape(lambda: models.Llama(SMALL, rngs=nnx.Rngs(0)))
    values = {
        "tokens": jnp.zeros((2, 4), jnp.int32),
        "positions": jnp.zeros((2, 4), jnp.int32),
        "lengths": [2],
    } | arguments
    attend = models.stateless(models.dense_causal_attention)
    runs = [models.LayerRun(num_layers=n, attend=attend) for n in values["lengths"]]
    with pytest.raises(ValueError, match=sentence):
        model.cached_hidden_states(values["tokens"], None, runs=runs, positions=values["positions"])
