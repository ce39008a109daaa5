"""The model that is trained: a LLaMA whose heads mix full and streaming attention by a gate."""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, Key, PyTree

from sparseattn_jax import Streaming, block_sparse_attention, models
from sparseattn_jax.models.llama import abstract


def draw_weights(config: models.LlamaConfig, key: Key[Array, ""]) -> PyTree:
    """The weights of an untrained model, as nested dictionaries."""
    return nnx.to_pure_dict(nnx.state(models.Llama(config, rngs=nnx.Rngs(key))))


def weight_shapes(config: models.LlamaConfig) -> PyTree:
    """The shapes and dtypes of `draw_weights`."""
    return abstract(config)[1]


def logits(
    config: models.LlamaConfig,
    weights: PyTree,
    tokens: Int32[Array, "B T"],
    *,
    gates: Float32[Array, "L K"] | None,
    streaming: Streaming,
) -> Float32[Array, "B T V"]:
    """Logits of the next byte; without gates attention is dense."""
    model = nnx.merge(_graphdef(config), nnx.State(weights))
    if gates is None:
        return model(tokens)
    return model(tokens, attend=functools.partial(mixed_attention, streaming), per_layer=gates)


def mixed_attention(
    streaming: Streaming,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    gates: Float32[Array, " K"],
) -> Float[Array, "B T N H"]:
    """gate * full + (1 - gate) * streaming, one gate per KV head (PruLong, arXiv:2506.17121)."""
    full = models.dense_causal_attention(q, k, v, None)
    blocks = streaming.select(q, k).blocks
    recent = block_sparse_attention(q, k, v, blocks)
    gate = jnp.repeat(gates, q.shape[2] // k.shape[2])[None, None, :, None].astype(q.dtype)
    return gate * full + (1 - gate) * recent


@functools.cache
def _graphdef(config: models.LlamaConfig) -> nnx.GraphDef:
    return abstract(config)[0]
