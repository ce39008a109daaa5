"""Bounds of packed sequences, drawn."""

import jax.numpy as jnp
import numpy as np

from sparseattn_jax.kernels.segments import segment_bounds


def test_bounds_of_every_position():
    ids = jnp.array([[7, 7, 7, 2, 5, 5], [0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 4, 1]], jnp.int32)
    starts, ends = segment_bounds(ids)
    np.testing.assert_array_equal(
        starts, [[0, 0, 0, 3, 4, 4], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 3, 5]]
    )
    np.testing.assert_array_equal(
        ends, [[3, 3, 3, 4, 6, 6], [6, 6, 6, 6, 6, 6], [1, 2, 3, 5, 5, 6]]
    )


def test_a_row_of_one():
    starts, ends = segment_bounds(jnp.array([[3]], jnp.int32))
    assert (starts.tolist(), ends.tolist()) == ([[0]], [[1]])
