"""Block lists against drawn matrices, and their laws."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from sparseattn_jax.kernels import block_lists
from tests.drawing import block_matrix

DRAWN = block_matrix("""
    #..
    ...
    .##
    ###
""")

# Few, so that cases share compiled programs: single rows and columns, odd and even sizes.
SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 1, 7),
    (2, 2, 5, 1),
    (1, 3, 2, 2),
    (1, 2, 3, 3),
    (2, 1, 5, 4),
    (1, 1, 4, 6),
    (2, 3, 5, 7),
]
matrices = hypothesis.extra.numpy.arrays(bool, st.sampled_from(SHAPES))


def test_lists_ascend_and_repeat_their_first_entry():
    indices, counts = block_lists.from_dense(jnp.array(DRAWN))
    np.testing.assert_array_equal(counts, [1, 0, 2, 3])
    np.testing.assert_array_equal(indices, [[0, 0, 0], [0, 0, 0], [1, 2, 1], [0, 1, 2]])


def test_width_cuts_the_unused_entries():
    indices, counts = block_lists.from_dense(jnp.array(DRAWN[:3]), width=2)
    np.testing.assert_array_equal(indices, [[0, 0], [0, 0], [1, 2]])
    np.testing.assert_array_equal(counts, [1, 0, 2])


def test_entries_past_the_count_are_not_listed():
    dense = block_lists.to_dense(jnp.array([[2, 0, 1]]), jnp.array([1]), 3)
    np.testing.assert_array_equal(dense, [[False, False, True]])


@hypothesis.given(matrices)
def test_from_dense_and_to_dense_are_inverse(matrix: np.ndarray):
    indices, counts = block_lists.from_dense(jnp.array(matrix))
    np.testing.assert_array_equal(block_lists.to_dense(indices, counts, matrix.shape[-1]), matrix)


@hypothesis.given(matrices)
def test_transpose_lists_the_transposed_matrix(matrix: np.ndarray):
    num_rows, num_cols = matrix.shape[-2:]
    indices, counts = block_lists.from_dense(jnp.array(matrix))
    transposed = block_lists.transpose(indices, counts, num_cols)
    np.testing.assert_array_equal(
        block_lists.to_dense(*transposed, num_rows), np.swapaxes(matrix, -1, -2)
    )


def test_keep_highest_takes_the_lower_column_among_equals():
    scores = jnp.array([[1.0, 3.0, 3.0, 3.0, 9.0]])
    keep = jnp.array([[True, True, True, True, False]])
    np.testing.assert_array_equal(
        block_lists.keep_highest(scores, keep, 2), [[False, True, True, False, False]]
    )


def test_keep_highest_takes_as_many_as_each_row_may_have():
    scores = jnp.array([[-1.0, 0.0, -0.0, jnp.inf, -2.0]] * 5 + [[-jnp.inf, -3.0, 0.5, 0.5, -3.0]])
    keep = jnp.array([[True] * 5] * 5 + [[True, True, True, False, True]])
    kept = block_lists.keep_highest(scores, keep, jnp.array([0, 1, 2, 4, 9, 2], jnp.int32))
    expected = block_matrix("""
        .....
        ...#.
        .#.#.
        ####.
        #####
        .##..
    """)
    np.testing.assert_array_equal(kept, expected)
