"""What the Mosaic GPU kernels share, apart from kernels."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseattn_jax.kernels import mosaic

# Tiles and tiles of a group: few, so that cases share compiled programs.
SIZES = [(1, 1), (1, 3), (7, 1), (12, 4), (13, 4), (24, 23), (40, 13), (40, 50)]


@given(st.sampled_from(SIZES), st.data())
def test_longest_first_sorts_groups_stably(sizes: tuple[int, int], data: st.DataObject) -> None:
    num_tiles, group = sizes
    work = data.draw(st.lists(st.integers(0, 5), min_size=num_tiles, max_size=num_tiles))
    order = mosaic.longest_first(jnp.asarray(work, jnp.int32), group)
    expected = sorted(range(len(work)), key=lambda tile: (tile // group, -work[tile], tile))
    np.testing.assert_array_equal(order, expected)


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([24, 40, 72]))
def test_warpgroups_share_the_registers_that_they_start_with(
    computing: int, loading: int, loading_registers: int
) -> None:
    warpgroups = computing + loading
    at_start = 65536 // (128 * warpgroups) // 8 * 8  # what ptxas gives each thread
    registers = mosaic.computing_registers(
        computing=computing, loading=loading, loading_registers=loading_registers
    )
    assert registers % 8 == 0
    assert registers <= 248
    taken = computing * registers + loading * loading_registers
    assert taken <= warpgroups * at_start
    assert registers == 248 or taken + 8 * computing > warpgroups * at_start


@pytest.mark.parametrize("length", [16, 13])
def test_whole_tiles_pads_to_multiples_of_8(length: int) -> None:
    x = jnp.ones((2, length, 3, 4))
    padded = mosaic.whole_tiles(x)
    assert padded.shape == (2, 16, 3, 4)
    np.testing.assert_array_equal(padded[:, :length], x)
    assert not padded[:, length:].any()
