"""Segments: sequences that are packed one after another into a row."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32


def segment_bounds(
    segment_ids: Int32[Array, "B S"],
) -> tuple[Int32[Array, "B S"], Int32[Array, "B S"]]:
    """Where each position's segment starts, and the position that it ends before.

    A segment is a run of equal ids.
    """
    length = segment_ids.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None, :]
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    is_first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    is_last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    starts = lax.cummax(jnp.where(is_first, positions, 0), axis=1)
    ends = lax.cummin(jnp.where(is_last, positions + 1, length), axis=1, reverse=True)
    return starts, ends
