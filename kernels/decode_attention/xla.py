"""Decode attention in plain XLA: the meaning of the op, on any device.

A chunk of each list at a time is gathered from the cache and folded into an online softmax
(FlashAttention-2, arXiv:2307.08691 algorithm 1). Time follows the longest list; memory holds one
chunk per kv head. A cache without lists is one whose every block, up to its length, is listed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.kernels.products import matmul

_CHUNK = 2048  # slots per kv head that are gathered at a time
_DENSE_BLOCK = 128


@functools.partial(jax.jit, static_argnames=("block_kv", "scale"))
def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "R S K H"],
    v: Float[Array, "R S K H"],
    kv_lengths: Int32[Array, " B"],
    kv_positions: Int32[Array, "B S"] | None,
    kv_indices: Int32[Array, "B #K M"] | None,
    kv_num_blocks: Int32[Array, "B #K"] | None,
    *,
    block_kv: int | None,
    scale: float,
    kv_rows: Int32[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Output and log-sum-exp; the arguments are those of the op."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    if kv_indices is None or kv_num_blocks is None or block_kv is None:
        block_kv = _DENSE_BLOCK
        kv_indices, kv_num_blocks = _every_block(kv_lengths, kv_positions, S, block_kv)
    chunk = min(max(1, _CHUNK // block_kv), kv_indices.shape[-1])
    queries = q.reshape(B, T, K, N // K, H).astype(jnp.float32)
    q_positions = kv_lengths[:, None] - T + jnp.arange(T)[None]
    take = _take
    if kv_rows is not None:
        # One axis of slots and heads: for an axis of one head XLA may copy the cache.
        k, v = (x.reshape(len(x), S * K, H) for x in (k, v))
        take = functools.partial(_take_from_rows, kv_rows)

    def visit(
        i: Int32[Array, ""] | int, carry: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        accumulator, row_max, row_sum = carry
        entries = i * chunk + jnp.arange(chunk)
        slots, exists = _slots_of(kv_indices, kv_num_blocks, entries, block_kv, S)
        slots = jnp.broadcast_to(slots, (B, K, slots.shape[-1]))
        positions = slots if kv_positions is None else jax.vmap(_at)(kv_positions, slots)
        visible = exists[:, :, None] & (positions >= 0)[:, :, None]
        visible &= positions[:, :, None] <= q_positions[:, None, :, None]
        # A weight of 0 does not undo a NaN in a block that is not listed.
        keys, values = (jnp.where(exists[..., None], take(x, slots), 0) for x in (k, v))
        scores = matmul("btkgh,bksh->bktgs", queries, keys) * scale
        scores = jnp.where(visible[:, :, :, None], scores, -jnp.inf)
        new_max = jnp.maximum(row_max, jnp.max(scores, axis=-1))
        shift = jnp.where(jnp.isneginf(new_max), 0.0, new_max)
        weights = jnp.exp(scores - shift[..., None])
        decay = jnp.exp(row_max - shift)
        return (
            accumulator * decay[..., None] + matmul("bktgs,bksh->bktgh", weights, values),
            new_max,
            row_sum * decay + jnp.sum(weights, axis=-1),
        )

    row_sum = jnp.zeros((B, K, T, N // K), jnp.float32)
    accumulator = jnp.zeros((*row_sum.shape, H), jnp.float32)
    num_chunks = (jnp.max(kv_num_blocks) + chunk - 1) // chunk
    accumulator, row_max, row_sum = lax.fori_loop(
        0, num_chunks, visit, (accumulator, row_sum - jnp.inf, row_sum)
    )
    divisor = jnp.where(row_sum == 0.0, 1.0, row_sum)
    lse = jnp.where(row_sum == 0.0, -jnp.inf, row_max + jnp.log(divisor))
    out = jnp.swapaxes(accumulator / divisor[..., None], 1, 2)
    return out.reshape(q.shape).astype(q.dtype), jnp.swapaxes(lse, 1, 2).reshape(B, T, N)


def _every_block(
    kv_lengths: Int32[Array, " B"],
    kv_positions: Int32[Array, "B S"] | None,
    capacity: int,
    block_kv: int,
) -> tuple[Int32[Array, "B 1 M"], Int32[Array, "B 1"]]:
    """Lists of all blocks that can hold a visible slot, the same for every head."""
    num_blocks = -(-capacity // block_kv)
    if kv_positions is None:
        used = jnp.clip(kv_lengths, 0, capacity)
    else:
        used = jnp.full_like(kv_lengths, capacity)
    indices = jnp.arange(num_blocks, dtype=jnp.int32)
    indices = jnp.broadcast_to(indices, (kv_lengths.shape[0], 1, num_blocks))
    return indices, (used[:, None] + block_kv - 1) // block_kv


def _slots_of(
    indices: Int32[Array, "B #K M"],
    counts: Int32[Array, "B #K"],
    entries: Int32[Array, " chunk"],
    block_kv: int,
    capacity: int,
) -> tuple[Int32[Array, "B #K slots"], Bool[Array, "B #K slots"]]:
    """The slots of some entries of every list, and which of them exist."""
    blocks = jnp.take(indices, jnp.minimum(entries, indices.shape[-1] - 1), axis=-1)
    slots = blocks[..., None] * block_kv + jnp.arange(block_kv)[None, None, None]
    exists = (entries[None, None] < counts[..., None])[..., None] & (slots < capacity)
    slots, exists = (x.reshape(*counts.shape, -1) for x in (slots, exists))
    return jnp.minimum(slots, capacity - 1), exists


def _take(x: Float[Array, "B S K H"], slots: Int32[Array, "B K slots"]) -> Array:
    """x[b, slots[b, h], h]."""
    return jax.vmap(jax.vmap(_at, in_axes=(1, 0)))(x, slots)


def _take_from_rows(
    rows: Int32[Array, " B"], x: Float[Array, "R SK H"], slots: Int32[Array, "B K slots"]
) -> Float[Array, "B K slots H"]:
    """The keys or values of all heads in some slots, where slots and heads are one axis."""
    num_heads = slots.shape[1]
    heads = jnp.arange(num_heads, dtype=jnp.int32)[None, :, None]
    return x[rows[:, None, None], slots * num_heads + heads]


def _at(x: Array, slots: Int32[Array, "..."]) -> Array:
    return x[slots]
