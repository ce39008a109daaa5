"""Block lists: for each row of a block matrix, the columns that it keeps.

A list is a pair of arrays. `indices[..., r, :counts[..., r]]` ascends strictly; entries past the
count repeat the row's first index (0 if the row is empty), so that a prefetch of them is safe.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Num, UInt32

_SIGN_BIT = 1 << 31


def from_dense(
    keep: Bool[Array, "*batch rows cols"], width: int | None = None
) -> tuple[Int32[Array, "*batch rows width"], Int32[Array, "*batch rows"]]:
    """Lists the kept columns of every row.

    Args:
        keep: which columns each row keeps.
        width: the lists' static width, by default the number of columns. A row must not keep
            more columns than that.

    Returns:
        (indices, counts).
    """
    num_cols = keep.shape[-1]
    width = num_cols if width is None else width
    columns = jnp.where(keep, columns_of(keep), num_cols)
    indices = jnp.sort(columns, axis=-1)[..., :width]
    first = indices[..., :1]
    indices = jnp.where(indices < num_cols, indices, jnp.where(first < num_cols, first, 0))
    return indices, jnp.sum(keep, axis=-1, dtype=jnp.int32)


def to_dense(
    indices: Int32[Array, "*batch rows width"], counts: Int32[Array, "*batch rows"], num_cols: int
) -> Bool[Array, "*batch rows cols"]:
    """The block matrix that the lists describe; the inverse of `from_dense`."""
    is_listed = columns_of(indices) < counts[..., None]
    # Entries past the count go to an extra column, which is dropped.
    columns = jnp.where(is_listed, indices, num_cols)
    keep = jnp.zeros((*counts.shape, num_cols + 1), dtype=bool)
    return jnp.put_along_axis(keep, columns, True, axis=-1, inplace=False)[..., :num_cols]


def transpose(
    indices: Int32[Array, "*batch rows width"], counts: Int32[Array, "*batch rows"], num_cols: int
) -> tuple[Int32[Array, "*batch cols rows"], Int32[Array, "*batch cols"]]:
    """The lists of the transposed block matrix: for each column, the rows that keep it."""
    return from_dense(jnp.swapaxes(to_dense(indices, counts, num_cols), -1, -2))


def keep_highest(
    scores: Float[Array, "*batch rows cols"],
    keep: Bool[Array, "*batch rows cols"],
    width: int | Int32[Array, "*batch rows"],
) -> Bool[Array, "*batch rows cols"]:
    """Of each row's kept columns the `width` highest-scored; among equals the lower column."""
    if isinstance(width, int) and width >= keep.shape[-1]:
        return keep
    scores = scores.astype(jnp.float32)
    scores = jnp.where(scores == 0.0, 0.0, scores)  # -0.0 ranks like 0.0
    bits = lax.bitcast_convert_type(scores, jnp.uint32)
    rank = jnp.where(scores < 0.0, ~bits, bits | jnp.uint32(_SIGN_BIT))
    room = jnp.broadcast_to(jnp.asarray(width, jnp.int32), rank.shape[:-1])
    return shortest_prefix(rank, keep, keep.astype(jnp.int32), room)


def shortest_prefix(
    rank: UInt32[Array, "*batch rows cols"],
    candidates: Bool[Array, "*batch rows cols"],
    weights: Num[Array, "*batch rows cols"],
    needed: Num[Array, "*batch rows"],
) -> Bool[Array, "*batch rows cols"]:
    """The first candidates by descending rank whose weights reach `needed`, or all of them.

    Equal ranks go by ascending column. Weights are not negative, and 0 where no candidate is. The
    cut is found bit by bit: no row is sorted. Floats that are not negative rank as their bits do.
    """
    zero = jnp.zeros((), weights.dtype)

    def weight_above(cut: UInt32[Array, "*batch rows"]) -> Num[Array, "*batch rows"]:
        return jnp.sum(jnp.where(rank >= cut[..., None], weights, zero), axis=-1)

    def set_bit(step: Int32[Array, ""], cut: UInt32[Array, "*batch rows"]) -> Array:
        raised = cut | (jnp.uint32(_SIGN_BIT) >> step.astype(jnp.uint32))
        return jnp.where(weight_above(raised) >= needed, raised, cut)

    # The highest cut at or above which the weights still reach what is needed. Adding a
    # non-negative term to a sum of fixed order never lowers it, so the bisection is exact.
    cut = lax.fori_loop(0, 32, set_bit, jnp.zeros(needed.shape, jnp.uint32))[..., None]
    is_above = candidates & (rank > cut)
    is_tied = candidates & (rank == cut)
    tied_weights = jnp.where(is_tied, weights, zero)
    before = jnp.cumsum(tied_weights, axis=-1) - tied_weights
    weight_of_above = jnp.sum(jnp.where(is_above, weights, zero), axis=-1, keepdims=True)
    return is_above | (is_tied & (weight_of_above + before < needed[..., None]))


def columns_of(matrix: Array) -> Int32[Array, "*batch rows cols"]:
    return lax.broadcasted_iota(jnp.int32, matrix.shape, matrix.ndim - 1)
