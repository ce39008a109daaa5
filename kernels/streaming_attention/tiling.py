"""Facts of a streaming attention call, and the key blocks that its kernels visit."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int32

from sparseattn_jax.kernels.backends import DeviceFacts

BLOCK = 128
"""Queries and keys per block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallFacts:
    """What a backend needs to know to accept or refuse a call."""

    device: DeviceFacts
    dtype: jnp.dtype
    head_dim: int


def list_width(sink_size: int, recent_size: int, *, q_len: int, kv_len: int) -> int:
    """The longest list of `covering_lists` for sizes up to these."""
    first = (kv_len - q_len) % BLOCK  # of a query block's positions, counted in its key block
    num_recent = (first + BLOCK - 1) // BLOCK - (first + 1 - recent_size) // BLOCK + 1
    num_sinks = -(-sink_size // BLOCK)
    return min(num_sinks + num_recent, -(-kv_len // BLOCK))


def covering_lists(
    windows: Int32[Array, "2 N"], *, width: int, q_len: int, kv_len: int
) -> tuple[Int32[Array, "N Tb M"], Int32[Array, "N Tb"]]:
    """For each head and query block the key blocks of which some query sees a key.

    Args:
        windows: the sink size of each head, then the recent size, none below 0.
        width: of the lists.
        q_len: queries, at the end of the keys.
        kv_len: keys.

    Returns:
        The lists of `kernels/block_lists.py`.
    """
    sink, recent = windows[:, :, None]
    first = jnp.arange(-(-q_len // BLOCK), dtype=jnp.int32)[None] * BLOCK + (kv_len - q_len)
    end = jnp.minimum(first + BLOCK, kv_len)
    end_block = _blocks(end)
    start_block = jnp.where(recent > 0, jnp.maximum(first + 1 - recent, 0) // BLOCK, end_block)
    num_sinks = jnp.minimum(_blocks(jnp.minimum(sink, end)), start_block)
    counts = num_sinks + end_block - start_block
    slots = jnp.arange(width, dtype=jnp.int32)[None, None]
    skipped = jnp.where(slots < num_sinks[..., None], 0, (start_block - num_sinks)[..., None])
    indices = slots + skipped
    first_listed = jnp.where(counts > 0, indices[..., 0], 0)
    return jnp.where(slots < counts[..., None], indices, first_listed[..., None]), counts


def _blocks(tokens: Int32[Array, "..."]) -> Int32[Array, "..."]:
    return (tokens + BLOCK - 1) // BLOCK
