"""Vertical and slash scores in plain XLA: the meaning of the op, on any device.

Two sweeps over chunks of keys: the first finds each query's softmax statistics, the second sums
the weights. The sums along diagonals are column sums of the chunk skewed by one column a row.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.kernels.last_queries import last_queries


@functools.partial(jax.jit, static_argnames=("num_queries", "workspace_bytes"))
def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    kv_lengths: Int32[Array, " B"] | None,
    *,
    num_queries: int,
    workspace_bytes: int,
) -> tuple[Float32[Array, "B N S"], Float32[Array, "B N S"]]:
    """Sums per key and per distance; the arguments are those of the op."""
    batch, kv_len, num_kv_heads, head_dim = k.shape
    num_heads = q.shape[2]
    queries, first, count = last_queries(q, kv_lengths, kv_len=kv_len, num_queries=num_queries)
    num = queries.shape[1]
    queries = queries.reshape(batch, num, num_kv_heads, num_heads // num_kv_heads, head_dim)
    row = jnp.arange(num)[None, :]
    positions = jnp.where(row < count[:, None], row + first[:, None], -1)

    column_bytes = 2 * 4 * batch * num_heads * num
    num_chunks = -(-kv_len // min(kv_len, max(1, workspace_bytes // column_bytes)))
    width = -(-kv_len // num_chunks)

    def start_of(chunk: Int32[Array, ""] | int) -> Int32[Array, ""]:
        # The last chunk moves back to end with the keys; what it then repeats is masked.
        return jnp.minimum(chunk * width, kv_len - width).astype(jnp.int32)

    def logits_of(chunk: Int32[Array, ""] | int) -> Float32[Array, "B N n width"]:
        keys = lax.dynamic_slice_in_dim(k, start_of(chunk), width, axis=1)
        column = start_of(chunk) + jnp.arange(width)[None, None, :]
        visible = (column >= chunk * width) & (column <= positions[:, :, None])
        return _logits(queries, keys, visible).reshape(batch, num_heads, num, width)

    def find_statistics(
        chunk: Int32[Array, ""] | int, statistics: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        row_max, total = statistics
        logits = logits_of(chunk)
        new_max = jnp.maximum(row_max, logits.max(axis=-1, keepdims=True))
        shift = _finite(new_max)
        new = jnp.exp(logits - shift).sum(axis=-1, keepdims=True)
        return new_max, total * jnp.exp(row_max - shift) + new

    def add_weights(
        chunk: Int32[Array, ""] | int, sums: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        vertical, diagonals = sums
        weights = jnp.exp(logits_of(chunk) - shift) * inverse_total
        start = start_of(chunk)
        vertical = _add_at(vertical, weights.sum(axis=-2), start)
        return vertical, _add_at(diagonals, _diagonal_sums(weights), kv_len - width - start)

    empty = jnp.full((batch, num_heads, num, 1), -jnp.inf), jnp.zeros((batch, num_heads, num, 1))
    row_max, total = lax.fori_loop(0, num_chunks, find_statistics, empty)
    shift, inverse_total = _finite(row_max), 1.0 / jnp.where(total == 0.0, 1.0, total)
    # Diagonal e holds row i and column i + kv_len - 1 - e. The rest of the axis stays 0.
    zeros = jnp.zeros((batch, num_heads, kv_len)), jnp.zeros((batch, num_heads, 2 * kv_len))
    vertical, diagonals = lax.fori_loop(0, num_chunks, add_weights, zeros)
    slash = jax.vmap(lambda x, start: lax.dynamic_slice_in_dim(x, start, kv_len, axis=-1))(
        diagonals, kv_len - 1 - first
    )
    return vertical, slash


def _logits(
    queries: Float[Array, "B n K G H"],
    keys: Float[Array, "B width K H"],
    visible: Bool[Array, "B n width"],
) -> Float32[Array, "B K G n width"]:
    """Scaled products, -inf where the key is not visible."""
    # float32 operands must not be rounded to tf32; narrower ones multiply exactly as they are.
    precision = lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None
    logits = jnp.einsum(
        "bnkgh,bckh->bkgnc",
        queries,
        keys,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return jnp.where(visible[:, None, None], logits * queries.shape[-1] ** -0.5, -jnp.inf)


def _finite(row_max: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """What logits may be shifted by: a row without visible keys has no maximum."""
    return jnp.where(jnp.isneginf(row_max), 0.0, row_max)


def _diagonal_sums(weights: Float32[Array, "B N n width"]) -> Float32[Array, "B N diagonals"]:
    """Sums of the elements (i, c) with equal i - c, from the last column's to the last row's."""
    *heads, num, width = weights.shape
    skewed = jnp.pad(jnp.flip(weights, axis=-1), ((0, 0), (0, 0), (0, 0), (0, num)))
    # Rows read one element short move right by one more each.
    skewed = skewed.reshape(*heads, -1)[..., : num * (width + num - 1)]
    return skewed.reshape(*heads, num, width + num - 1).sum(axis=-2)


def _add_at(
    sums: Float32[Array, "B N length"],
    new: Float32[Array, "B N new"],
    start: Int32[Array, ""],
) -> Float32[Array, "B N length"]:
    """Adds `new` to the part of `sums` that begins at `start`."""
    old = lax.dynamic_slice_in_dim(sums, start, new.shape[-1], axis=-1)
    return lax.dynamic_update_slice_in_dim(sums, old + new, start, axis=-1)
