"""Streaming: sinks and recent blocks, as pictures."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import Streaming
from tests.drawing import block_matrix
from tests.oracles import selection

PICTURES = {
    "sink-1-recent-2": (
        {"sink_size": 4, "recent_size": 8},
        {"T": 24, "S": 24},
        """
        #.....
        ##....
        ###...
        #.##..
        #..##.
        #...##
        """,
    ),
    "sizes-round-up-to-blocks": (
        {"sink_size": 5, "recent_size": 1},
        {"T": 20, "S": 20},
        """
        #....
        ##...
        ###..
        ##.#.
        ##..#
        """,
    ),
    "no-sink": (
        {"sink_size": 0, "recent_size": 8},
        {"T": 16, "S": 16},
        """
        #...
        ##..
        .##.
        ..##
        """,
    ),
    "odd-length": (
        {"sink_size": 4, "recent_size": 4},
        {"T": 13, "S": 13},
        """
        #...
        ##..
        #.#.
        #..#
        """,
    ),
    "queries-at-the-end": (
        {"sink_size": 4, "recent_size": 8},
        {"T": 8, "S": 24},
        """
        #..##.
        #...##
        """,
    ),
    "two-diagonals": (
        # Queries 0-3 stand at positions 10-13: blocks 2 and 3.
        {"sink_size": 4, "recent_size": 8},
        {"T": 8, "S": 18},
        """
        ####.
        #.###
        """,
    ),
    "padding": (
        {"sink_size": 4, "recent_size": 4},
        {"T": 20, "S": 20, "kv_lengths": [10]},
        """
        #....
        ##...
        #.#..
        .....
        .....
        """,
    ),
    "shorter-than-the-sink": (
        {"sink_size": 64, "recent_size": 64},
        {"T": 8, "S": 8},
        """
        #.
        ##
        """,
    ),
    "packed": (
        # The second segment starts at key 9; its sinks are keys 9-12, in blocks 2 and 3.
        {"sink_size": 4, "recent_size": 4},
        {"T": 24, "S": 24, "segment_ids": [[0] * 9 + [1] * 15]},
        """
        #.....
        ##....
        #.#...
        ..##..
        ..###.
        ..##.#
        """,
    ),
}


def arrays(T, S, B=1):
    return jnp.ones((B, T, 4, 16)), jnp.ones((B, S, 2, 16))


@pytest.mark.parametrize(("sizes", "call", "picture"), PICTURES.values(), ids=PICTURES)
def test_lists_sinks_and_recent_blocks(sizes: dict, call: dict, picture: str):
    per_token = {
        name: jnp.array(call[name], jnp.int32)
        for name in ("kv_lengths", "segment_ids")
        if name in call
    }
    q, k = arrays(call["T"], call["S"])
    pattern = Streaming(**sizes, block_size=4).select(q, k, **per_token)
    np.testing.assert_array_equal(
        selection.listed_blocks(pattern.blocks)[0, 0], block_matrix(picture)
    )


def test_lists_are_no_wider_than_the_windows():
    pattern = Streaming(sink_size=4, recent_size=8, block_size=4).select(*arrays(256, 256))
    assert pattern.blocks.kv_indices.shape == (1, 1, 64, 4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sink_size": -1}, "sink_size=-1 must not be negative"),
        ({"recent_size": 0}, "recent_size=0 must be at least 1"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
    ],
    ids=["sink", "recent", "block"],
)
def test_bad_sizes_are_refused(sizes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Streaming(**sizes).select(*arrays(8, 8))


def test_a_window_without_causality_is_refused():
    with pytest.raises(ValueError, match=r"is_causal=False: .* pass is_causal=True"):
        Streaming().select(*arrays(8, 8), is_causal=False)
