"""A model on a mesh of devices computes what it does on one."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from sparseattn_jax import DuoAttention, XAttention, models, prefill_attention, sequence_parallel
from sparseattn_jax.kv_cache import KVCache
from sparseattn_jax.models import hf_weights, sharding
from sparseattn_jax.models.prefill import prefill
from sparseattn_jax.models.weights import name_of
from tests.models.small_models import CONFIG, MASKS, STREAMING, drawn, prompts

# Unlike CONFIG its sizes divide by the devices.
DIVISIBLE = dataclasses.replace(CONFIG, vocab_size=32)
L, N, K = CONFIG.num_layers, CONFIG.num_heads, CONFIG.num_kv_heads
B, T = 4, 16
TOKENS = jnp.asarray(np.random.default_rng(0).integers(CONFIG.vocab_size, size=(B, T)), jnp.int32)


def on_mesh(mesh: jax.sharding.Mesh) -> tuple[models.Llama, jax.Array]:
    tokens = jax.device_put(TOKENS, sharding.token_sharding(TOKENS.shape, mesh))
    return sharding.place(drawn(DIVISIBLE)[0], mesh), tokens


def parameters(model: models.Llama) -> dict[str, jax.Array]:
    state = nnx.to_pure_dict(nnx.state(model))
    return {name_of(key): leaf for key, leaf in jax.tree.leaves_with_path(state)}


def attend(q: jax.Array, k: jax.Array, v: jax.Array, strategy, /) -> jax.Array:
    return prefill_attention(q, k, v, strategy)


def logits(model: models.Llama, tokens: jax.Array, **options) -> jax.Array:
    return nnx.jit(lambda model, tokens: model(tokens, **options))(model, tokens)


def assert_close(found, expected) -> None:
    """To float32 rounding of sums in another order."""
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "fsdp": 2, "model": 2},
        {"data": 2, "seq": 2, "model": 2},
        pytest.param({"fsdp": 8}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_logits_are_those_of_one_device(axes: dict[str, int]) -> None:
    tokens = jnp.tile(TOKENS, (2, 1))
    mesh = sharding.create_mesh(**axes)
    placed = jax.device_put(tokens, sharding.token_sharding(tokens.shape, mesh))
    model = drawn(DIVISIBLE)[0]
    assert_close(logits(sharding.place(model, mesh), placed), logits(model, tokens))


def test_each_device_holds_its_part() -> None:
    model, tokens = on_mesh(sharding.create_mesh(fsdp=2, seq=2, model=2))
    shapes = {
        name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in parameters(model).items()
    }
    assert shapes == {
        "embedding": (16, 8),
        "head": (16, 8),
        "final_norm.scale": (16,),
        "layers.attention_norm.scale": (3, 16),
        "layers.attention.query.kernel": (3, 8, 16),
        "layers.attention.key.kernel": (3, 8, 8),
        "layers.attention.value.kernel": (3, 8, 8),
        "layers.attention.output.kernel": (3, 16, 8),
        "layers.mlp_norm.scale": (3, 16),
        "layers.mlp.gate.kernel": (3, 8, 12),
        "layers.mlp.up.kernel": (3, 8, 12),
        "layers.mlp.down.kernel": (3, 12, 8),
    }
    assert tokens.sharding.shard_shape(tokens.shape) == (B // 2, T // 2)


def test_one_device_is_a_mesh() -> None:
    model, tokens = on_mesh(sharding.create_mesh(devices=jax.devices()[:1]))
    assert {len(leaf.devices()) for leaf in parameters(model).values()} == {1}
    assert_close(logits(model, tokens), logits(drawn(DIVISIBLE)[0], TOKENS))


def test_every_parameter_of_every_variant_has_axes() -> None:
    config = dataclasses.replace(
        DIVISIBLE, attention_bias=True, output_bias=True, mlp_bias=True, qk_norm=True
    )
    model = nnx.eval_shape(lambda: models.Llama(config, rngs=nnx.Rngs(0)))
    sharding_of = sharding.shardings(config, sharding.create_mesh(fsdp=2, seq=2, model=2))
    for name, leaf in parameters(model).items():
        assert len(sharding.logical_axes(name)) == leaf.ndim
        assert sharding_of(name, leaf.shape).is_fully_replicated == (
            "norm" in name or name.endswith(("output.bias", "down.bias"))
        )


def test_the_weights_come_to_the_tokens() -> None:
    """With the attention wrapped the compiler gathers each layer's weights and sums nothing."""
    mesh = sharding.create_mesh(fsdp=4, devices=jax.devices()[:4])
    model, tokens = on_mesh(mesh)
    graphdef, params = nnx.split(model)
    wrapped = sequence_parallel.wrap(models.dense_causal_attention, mesh)
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params).hidden_states(x, attend=wrapped))
    program = run.lower(params, tokens).compile().as_text()
    assert re.search(r"all-gather(-start)?\(", program)
    assert not re.search(r"all-reduce(-start)?\(", program)


@pytest.mark.parametrize(
    "strategies",
    [
        DuoAttention(
            retrieval=XAttention(threshold=jnp.full(L, 0.6), stride=2, block_size=4),
            retrieval_heads=jnp.asarray(MASKS),
            sink_size=2,
            recent_size=3,
        ),
        pytest.param(
            XAttention(
                threshold=jnp.linspace(0.2, 0.9, L * N, dtype=jnp.float32).reshape(L, N),
                stride=2,
                block_size=4,
            ),
            marks=pytest.mark.full,
        ),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "seq": 4},
        pytest.param({"seq": 4, "model": 2}, marks=pytest.mark.full),
        pytest.param({"fsdp": 4, "seq": 2}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_sparse_attention_over_spread_sequences(strategies, axes: dict[str, int]) -> None:
    """Thresholds and head masks of each layer are scanned, and reach the ranks of their heads."""
    mesh = sharding.create_mesh(**axes)
    model, tokens = on_mesh(mesh)
    wrapped = sequence_parallel.wrap(attend, mesh)
    found = logits(model, tokens, attend=wrapped, per_layer=strategies)
    model = drawn(DIVISIBLE)[0]
    assert_close(found, logits(model, TOKENS, attend=attend, per_layer=strategies))
    everything = logits(model, TOKENS)
    assert np.abs(found - everything).max() > 0.05 * np.abs(everything).max()


LENGTHS = np.array([16, 9, 12, 5], np.int32)
PROMPTS = np.asarray(TOKENS), LENGTHS


def test_a_spread_prompt_fills_the_cache() -> None:
    """In chunks, by heads, of a policy with streaming heads; as on one device."""
    mesh = sharding.create_mesh(data=2, seq=4)

    def create() -> KVCache:
        return STREAMING.create_cache(DIVISIBLE, batch=B, capacity=T)

    where = sharding.cache_shardings(jax.eval_shape(create), mesh)
    assert where.full_k.spec == PartitionSpec(None, ("seq", "model"), None)
    found = prefill(
        *(on_mesh(mesh)[0], *PROMPTS, jax.jit(create, out_shardings=where)(), STREAMING),
        chunk_size=8,
        attention=sequence_parallel.wrap(prefill_attention, mesh),
    )
    expected = prefill(drawn(DIVISIBLE)[0], *PROMPTS, create(), STREAMING, chunk_size=T)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


@pytest.mark.full
def test_prompts_in_chunks_on_a_mesh() -> None:
    """`prefill` as it is, split by the compiler; the cache stays where it is."""
    mesh = sharding.create_mesh(seq=4, model=2)
    expected, _ = prefill(
        *(drawn(DIVISIBLE)[0], *PROMPTS),
        *(STREAMING.create_cache(DIVISIBLE, batch=B, capacity=T), STREAMING),
        chunk_size=8,
    )

    def create() -> KVCache:
        return STREAMING.create_cache(DIVISIBLE, batch=B, capacity=T)

    where = sharding.cache_shardings(jax.eval_shape(create), mesh)
    cache = jax.jit(create, out_shardings=where)()
    found, cache = prefill(on_mesh(mesh)[0], *PROMPTS, cache, STREAMING, chunk_size=8)
    assert_close(found, expected)
    assert cache.full_k.sharding.shard_shape(cache.full_k.shape)[1] == T // 8


@pytest.mark.full
def test_generation_on_a_mesh() -> None:
    """By the same call; the cache is where the compiler puts it."""
    texts = prompts(21, 9, 14)
    options = {"max_new_tokens": 6, "policy": STREAMING, "capacity": 40, "chunk_size": 16}
    expected = models.generate(drawn(DIVISIBLE)[0], texts, **options)
    model, _ = on_mesh(sharding.create_mesh(data=2, fsdp=2, model=2))
    found = models.generate(model, texts, **options)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_a_checkpoint_is_read_to_its_shardings(tmp_path: pathlib.Path) -> None:
    model = drawn(DIVISIBLE)[0]
    hf_weights.save(model, tmp_path)
    mesh = sharding.create_mesh(fsdp=2, model=2, data=2)
    found = hf_weights.load(
        tmp_path, dtype=jnp.float32, shardings=sharding.shardings(DIVISIBLE, mesh)
    )
    placed = parameters(sharding.place(model, mesh))
    for name, leaf in parameters(found).items():
        assert leaf.sharding == placed[name].sharding
        np.testing.assert_array_equal(leaf, placed[name])


def test_meshes_are_of_automatic_axes() -> None:
    mesh = sharding.create_mesh(seq=8)
    assert mesh.axis_names == sharding.MESH_AXES
    assert mesh.axis_types == (AxisType.Auto,) * 4


def test_a_mesh_may_lack_axes_and_rules_may_name_others() -> None:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding_of = sharding.shardings(DIVISIBLE, mesh, {"mlp": "tensor", "embed": ("fsdp", "seq")})
    assert sharding_of("layers.mlp.down.kernel", (3, 24, 16)).spec == PartitionSpec(
        None, ("tensor",), ("fsdp",)
    )
    assert sharding_of("layers.attention.query.kernel", (3, 16, 32)).spec == PartitionSpec(
        None, ("fsdp",), None
    )


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda mesh: sharding.create_mesh(seq=0), "seq=0 must be at least 1"),
        (
            lambda mesh: sharding.create_mesh(data=2, model=2),
            "data=2, fsdp=1, seq=1 and model=2 make 4 devices, of 8 given; .* or pass 4 devices",
        ),
        (lambda mesh: sharding.logical_axes("layers.bias"), "path='layers.bias' is no parameter"),
        (
            lambda mesh: sharding.shardings(CONFIG, mesh)("head", (29, 16)),
            r"head has 29 vocab, .* the 2 devices .* \('model',\); pass rules={'vocab': None}",
        ),
        (
            lambda mesh: sharding.place(
                drawn(CONFIG)[0], mesh, {"vocab": None, "kv_heads": ("seq", "model")}
            ),
            r"layers.attention.key.kernel has 2 kv_heads, .* 4 devices .*\('seq', 'model'\)",
        ),
        (
            lambda mesh: sharding.shardings(CONFIG, mesh, {"heads": "fsdp"})(
                "layers.attention.query.kernel", (3, 16, 32)
            ),
            r"query.kernel has the axes \('layers', 'embed', 'heads'\), .* over mesh axis 'fsdp'",
        ),
        (
            lambda mesh: sharding.shardings(CONFIG, mesh, {"head": None}),
            r"rules name 'head', which is none of \['batch', 'length'",
        ),
        (
            lambda mesh: sharding.shardings(CONFIG, mesh, {"heads": "tensor"}),
            r"rules\['heads'\] names 'tensor', which is none of the mesh's axes \('data', 'fsdp'",
        ),
        (
            lambda mesh: sharding.token_sharding((2, 9), mesh),
            r"tokens has 9 length, which do not divide by the 2 devices of mesh axes \('seq',\)",
        ),
        (
            lambda mesh: sharding.cache_shardings(
                STREAMING.create_cache(CONFIG, batch=1, capacity=8), mesh, {"rows": ("fsdp", "seq")}
            ),
            r"cache.full_k has 3 rows, which do not divide by the 4 devices",
        ),
    ],
    ids=[
        "size",
        "devices",
        "path",
        "vocab",
        "whole heads",
        "twice",
        "logical",
        "mesh axis",
        "tokens",
        "cache",
    ],
)
def test_refuses(call, sentence: str) -> None:
    mesh = sharding.create_mesh(fsdp=2, seq=2, model=2)
    with pytest.raises(ValueError, match=sentence):
        call(mesh)
