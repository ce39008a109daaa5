"""Pooled block scores in plain XLA: the meaning of the ops, on any device."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import xlog1py
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.kernels.last_queries import last_queries


@functools.partial(jax.jit, static_argnames=("block_size", "q_blocks"))
def run_scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    kv_lengths: Int32[Array, " B"] | None,
    *,
    block_size: int,
    q_blocks: tuple[int, int],
) -> Float32[Array, "B N rows Sb"]:
    """Rows of E; the arguments are those of the op."""
    q_len, kv_len = q.shape[1], k.shape[1]
    offset = kv_len - q_len
    if kv_lengths is None:
        kv_lengths = jnp.full(q.shape[0], kv_len, jnp.int32)
    q_lengths = jnp.minimum(kv_lengths - offset, q_len)
    first, stop = q_blocks
    queries = q[:, first * block_size : stop * block_size]
    queries = _block_means(queries, q_lengths - first * block_size, block_size)
    # The position behind each query block's last valid query; 0 sees no key block.
    start = jnp.arange(first, stop)[None, :] * block_size
    end = jnp.minimum(start + block_size, q_lengths[:, None])
    limits = jnp.where(start < end, end + offset, 0)
    keys = _block_means(k, kv_lengths, block_size)
    visible = jnp.arange(keys.shape[1])[None, None, :] * block_size < limits[:, :, None]
    return _attention(queries, keys, visible)


@functools.partial(jax.jit, static_argnames=("block_size",))
def run_distance(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    vertical: Float32[Array, "B N S"],
    kv_lengths: Int32[Array, " B"] | None,
    *,
    block_size: int,
) -> Float32[Array, "B N"]:
    """Distance of each query head; the arguments are those of the op."""
    kv_len = k.shape[1]
    queries, _, count = last_queries(q, kv_lengths, kv_len=kv_len, num_queries=block_size)
    queries = _block_means(queries, count, queries.shape[1])
    if kv_lengths is None:
        kv_lengths = jnp.full(q.shape[0], kv_len, jnp.int32)
    keys = _block_means(k, kv_lengths, block_size)
    limits = jnp.where(count > 0, kv_lengths, 0)[:, None, None]
    visible = jnp.arange(keys.shape[1])[None, None, :] * block_size < limits
    estimate = _attention(queries, keys, visible)[:, :, 0]
    mass = block_sums(vertical, block_size=block_size)
    total = mass.sum(axis=-1, keepdims=True)
    return _jensen_shannon_distance(estimate, mass / jnp.where(total == 0.0, 1.0, total))


def block_sums(x: Float32[Array, "B N S"], *, block_size: int) -> Float32[Array, "B N Sb"]:
    """Sums over blocks of keys, or of distances; the last block may be a partial one."""
    batch, heads, length = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -length % block_size)))
    return x.reshape(batch, heads, -1, block_size).sum(axis=-1)


def _block_means(
    x: Float[Array, "B length heads H"], lengths: Int32[Array, " B"], block_size: int
) -> Float32[Array, "B blocks heads H"]:
    """Means over each block's tokens before `lengths`; 0 where there is none."""
    batch, length, heads, head_dim = x.shape
    is_valid = jnp.arange(length)[None, :] < lengths[:, None]
    x = jnp.where(is_valid[:, :, None, None], x.astype(jnp.float32), 0.0)
    x = jnp.pad(x, ((0, 0), (0, -length % block_size), (0, 0), (0, 0)))
    sums = x.reshape(batch, -1, block_size, heads, head_dim).sum(axis=2)
    starts = jnp.arange(sums.shape[1])[None, :] * block_size
    left = jnp.minimum(lengths, length)[:, None] - starts
    return sums / jnp.clip(left, 1, block_size).astype(jnp.float32)[:, :, None, None]


def _attention(
    queries: Float32[Array, "B rows N H"],
    keys: Float32[Array, "B Sb K H"],
    visible: Bool[Array, "B #rows Sb"],
) -> Float32[Array, "B N rows Sb"]:
    """Softmax over the visible columns of each row; 0 where there is none."""
    batch, num_rows, num_heads, head_dim = queries.shape
    num_columns, num_kv_heads = keys.shape[1:3]
    # The rows of a kv head as one matrix: its product needs no transposition.
    queries = jnp.swapaxes(queries, 1, 2).reshape(batch, num_kv_heads, -1, head_dim)
    # Block means must not be rounded to tf32.
    logits = jnp.einsum("bkih,bjkh->bkij", queries, keys, precision=lax.Precision.HIGHEST)
    logits = logits.reshape(batch, num_heads, num_rows, num_columns)
    logits = jnp.where(visible[:, None], logits * head_dim**-0.5, -jnp.inf)
    row_max = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(row_max), 0.0, row_max))
    totals = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(totals == 0.0, 1.0, totals)


def _jensen_shannon_distance(
    p: Float32[Array, "B N Sb"], q: Float32[Array, "B N Sb"]
) -> Float32[Array, "B N"]:
    """The square root of the Jensen-Shannon divergence of two distributions.

    With m = (p + q) / 2 and r = (p - q) / (p + q) the divergence is half the sum of
    m ((1 + r) ln(1 + r) + (1 - r) ln(1 - r)): no term is negative, and the rounding error of each
    falls with r where the distributions are close.
    """
    both = p + q
    ratio = (p - q) / jnp.where(both == 0.0, 1.0, both)
    terms = xlog1py(1.0 + ratio, ratio) + xlog1py(1.0 - ratio, -ratio)
    return jnp.sqrt(jnp.maximum((both * terms).sum(axis=-1) / 4.0, 0.0))
