"""What the Mosaic GPU kernels share, apart from kernels."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseattn_jax.kernels import mosaic


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 50))
def test_longest_first_sorts_groups_stably(work: list[int], group: int) -> None:
    order = mosaic.longest_first(jnp.asarray(work, jnp.int32), group)
    expected = sorted(range(len(work)), key=lambda tile: (tile // group, -work[tile], tile))
    np.testing.assert_array_equal(order, expected)


@pytest.mark.parametrize("length", [16, 13])
def test_whole_tiles_pads_to_multiples_of_8(length: int) -> None:
    x = jnp.ones((2, length, 3, 4))
    padded = mosaic.whole_tiles(x)
    assert padded.shape == (2, 16, 3, 4)
    np.testing.assert_array_equal(padded[:, :length], x)
    assert not padded[:, length:].any()
