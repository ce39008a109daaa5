"""Block lists: for each row of a block matrix, the columns that it keeps.

A list is a pair of arrays. `indices[..., r, :counts[..., r]]` ascends strictly; entries past the
count repeat the row's first index (0 if the row is empty), so that a prefetch of them is safe.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32


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
    columns = jnp.where(keep, _columns_of(keep), num_cols)
    indices = jnp.sort(columns, axis=-1)[..., :width]
    first = indices[..., :1]
    indices = jnp.where(indices < num_cols, indices, jnp.where(first < num_cols, first, 0))
    return indices, jnp.sum(keep, axis=-1, dtype=jnp.int32)


def to_dense(
    indices: Int32[Array, "*batch rows width"], counts: Int32[Array, "*batch rows"], num_cols: int
) -> Bool[Array, "*batch rows cols"]:
    """The block matrix that the lists describe; the inverse of `from_dense`."""
    is_listed = _columns_of(indices) < counts[..., None]
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
    scores: Float[Array, "*batch rows cols"], keep: Bool[Array, "*batch rows cols"], width: int
) -> Bool[Array, "*batch rows cols"]:
    """Of each row's kept columns the `width` highest-scored; among equals the lower column."""
    if width >= keep.shape[-1]:
        return keep
    order = jnp.argsort(jnp.where(keep, -scores, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return keep & (rank < width)


def _columns_of(matrix: Array) -> Int32[Array, "*batch rows cols"]:
    return lax.broadcasted_iota(jnp.int32, matrix.shape, matrix.ndim - 1)
