"""Cumulative block selection in plain XLA: the meaning of the op, on any device.

The cut-off score is found by bisection on its bits with a masked sum per step: non-negative
floats order as their bit patterns do, so 32 steps are exact and no row is sorted by score.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

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
    selected = forced | _shortest_prefix(rank, visible, mass, needed)
    selected = jnp.where((threshold >= 1.0)[..., None], visible, selected)
    capacity = scores.shape[-1] if max_blocks is None else min(max_blocks, scores.shape[-1])
    kept = selected
    if capacity < scores.shape[-1]:
        room = jnp.full(needed.shape, capacity, jnp.float32)
        kept = _shortest_prefix(rank, selected, selected.astype(jnp.float32), room)
    indices, counts = block_lists.from_dense(kept, capacity)
    return indices, counts, jnp.sum(selected & ~kept, axis=(-2, -1), dtype=jnp.int32)


def _shortest_prefix(
    rank: UInt32[Array, "B N Tb Sb"],
    candidates: Bool[Array, "B N Tb Sb"],
    weights: Float32[Array, "B N Tb Sb"],
    needed: Float32[Array, "B N Tb"],
) -> Bool[Array, "B N Tb Sb"]:
    """The first candidates by descending rank whose weights reach `needed`, or all of them.

    Equal ranks go by ascending index. Weights of blocks that are no candidates must be 0.
    """

    def weight_above(cut: UInt32[Array, "B N Tb"]) -> Float32[Array, "B N Tb"]:
        return jnp.sum(jnp.where(rank >= cut[..., None], weights, 0.0), axis=-1)

    def set_bit(step: Int32[Array, ""], cut: UInt32[Array, "B N Tb"]) -> UInt32[Array, "B N Tb"]:
        raised = cut | (jnp.uint32(_SIGN_BIT) >> step.astype(jnp.uint32))
        return jnp.where(weight_above(raised) >= needed, raised, cut)

    # The highest cut at or above which the weights still reach what is needed. Adding a
    # non-negative term to a sum of fixed order never lowers it, so the bisection is exact.
    cut = lax.fori_loop(0, 32, set_bit, jnp.zeros(needed.shape, jnp.uint32))[..., None]
    is_above = candidates & (rank > cut)
    is_tied = candidates & (rank == cut)
    tied_weights = jnp.where(is_tied, weights, 0.0)
    before = jnp.cumsum(tied_weights, axis=-1) - tied_weights
    weight_of_above = jnp.sum(jnp.where(is_above, weights, 0.0), axis=-1, keepdims=True)
    return is_above | (is_tied & (weight_of_above + before < needed[..., None]))
