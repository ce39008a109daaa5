"""Dense attention in plain XLA: the meaning of the op, on any device.

Queries go in chunks, so that memory holds the scores of one chunk at a time; gradients compute them
again.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.kernels.products import matmul
from sparseattn_jax.kernels.softmax import softmax

_CHUNK_BYTES = 2**28  # of scores


@functools.partial(jax.jit, static_argnames=("is_causal", "scale"))
def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B #N T S"] | Float[Array, "#B #N T S"] | None,
    kv_lengths: Int32[Array, " B"] | None,
    segment_ids: Int32[Array, "B S"] | None,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Output and log-sum-exp; the arguments are those of the op."""
    batch, q_len, num_heads, head_dim = q.shape
    kv_len, num_kv_heads = k.shape[1:3]
    num_chunks = -(-4 * batch * num_heads * q_len * kv_len // _CHUNK_BYTES)
    chunk_size = -(-q_len // min(num_chunks, q_len))
    missing = -q_len % chunk_size
    queries = jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, 0)))
    masks = None if mask is None else jnp.pad(mask, ((0, 0), (0, 0), (0, missing), (0, 0)))
    lengths = jnp.full(batch, kv_len, jnp.int32) if kv_lengths is None else kv_lengths

    @jax.checkpoint
    def attend(chunk: Int32[Array, ""]) -> tuple[Array, Array]:
        start = chunk * chunk_size
        rows = lax.dynamic_slice_in_dim(queries, start, chunk_size, axis=1)
        rows = rows.reshape(batch, chunk_size, num_kv_heads, -1, head_dim)
        logits = matmul("btkgh,bskh->bkgts", rows, k) * scale
        logits = logits.reshape(batch, num_heads, chunk_size, kv_len)
        positions = start + jnp.arange(chunk_size, dtype=jnp.int32) + (kv_len - q_len)
        visible = _visible(positions, lengths, segment_ids, kv_len, is_causal=is_causal)[:, None]
        if masks is not None:
            of_chunk = lax.dynamic_slice_in_dim(masks, start, chunk_size, axis=2)
            if of_chunk.dtype == jnp.bool_:
                visible = visible & of_chunk
            else:
                logits = logits + of_chunk.astype(jnp.float32)
        out, lse = _softmax_and_values(jnp.where(visible, logits, -jnp.inf), v)
        return out.astype(q.dtype), lse

    out, lse = lax.map(attend, jnp.arange((q_len + missing) // chunk_size, dtype=jnp.int32))

    def joined(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :q_len]

    return joined(out), joined(lse)


def _visible(
    positions: Int32[Array, " rows"],
    lengths: Int32[Array, " B"],
    segment_ids: Int32[Array, "B S"] | None,
    kv_len: int,
    *,
    is_causal: bool,
) -> Bool[Array, "B #rows S"]:
    keys = jnp.arange(kv_len, dtype=jnp.int32)[None, None, :]
    visible = keys < lengths[:, None, None]
    position = positions[None, :, None]
    if is_causal:
        visible = visible & (keys <= position) & (position < lengths[:, None, None])
    if segment_ids is not None:
        of_queries = jnp.take(segment_ids, positions, axis=1, mode="clip")
        visible = visible & (of_queries[:, :, None] == segment_ids[:, None, :])
    return visible


def _softmax_and_values(
    logits: Float32[Array, "B N rows S"], v: Float[Array, "B S K H"]
) -> tuple[Float32[Array, "B rows N H"], Float32[Array, "B rows N"]]:
    batch, num_heads, num_rows, kv_len = logits.shape
    weights, lse = softmax(logits)
    weights = weights.reshape(batch, v.shape[2], -1, num_rows, kv_len)
    out = matmul("bkgts,bskh->btkgh", weights, v)
    return out.reshape(batch, num_rows, num_heads, -1), jnp.moveaxis(lse, 1, 2)
