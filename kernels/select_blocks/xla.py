"""Cumulative block selection in plain XLA: the meaning of the op, on any device."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from sparseattn_jax.kernels import block_lists

_SIGN_BIT = 1 << 31


@functools.partial(jax.jit, static_argnames=("max_blocks",))
def run(
    scores: Float32[Array, "B N Tb Sb"],
    threshold: Float32[Array, " N"],
    forced: Bool[Array, "#B #N Tb Sb"],
    visible: Bool[Array, "#B #N Tb Sb"],
    *,
    max_blocks: int | None,
) -> tuple[Int32[Array, "B N Tb M"], Int32[Array, "B N Tb"], Int32[Array, "B N"]]:
    """Lists of the selected blocks; the arguments are those of the op."""
    visible = jnp.broadcast_to(visible, scores.shape)
    forced = forced & visible
    bits = lax.bitcast_convert_type(scores, jnp.uint32)
    rank = jnp.where(forced, bits | jnp.uint32(_SIGN_BIT), bits & jnp.uint32(_SIGN_BIT - 1))
    mass = jnp.where(visible, scores, 0.0)
    threshold = threshold[None, :, None]
    needed = threshold * mass.sum(axis=-1)
    selected = forced | block_lists.shortest_prefix(rank, visible, mass, needed)
    selected = jnp.where((threshold >= 1.0)[..., None], visible, selected)
    capacity = scores.shape[-1] if max_blocks is None else min(max_blocks, scores.shape[-1])
    kept = selected
    if capacity < scores.shape[-1]:
        room = jnp.full(needed.shape, capacity, jnp.int32)
        kept = block_lists.shortest_prefix(rank, selected, selected.astype(jnp.int32), room)
    indices, counts = block_lists.from_dense(kept, capacity)
    return indices, counts, jnp.sum(selected & ~kept, axis=(-2, -1), dtype=jnp.int32)
