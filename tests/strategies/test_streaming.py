"""Streaming: sinks and recent blocks, as pictures; windows exact to the token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import Streaming, UnsupportedError, sparse_attention
from tests.drawing import block_matrix
from tests.oracles import attention, selection, streaming

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
    assert pattern.blocks.kv_indices.shape == (1, 1, 64, 3)
    pattern = Streaming(sink_size=4, recent_size=8, block_size=4).select(*arrays(253, 256))
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


EXACT_PICTURES = {
    # Query 4 sees keys 1-4: three before its block.
    "reaches-back": (
        {"sink_size": 0, "recent_size": 4},
        {"T": 16, "S": 16},
        """
        #...
        ##..
        .##.
        ..##
        """,
    ),
    "one-more-key-than-two-blocks": (
        {"sink_size": 5, "recent_size": 6},
        {"T": 24, "S": 24},
        """
        #.....
        ##....
        ###...
        ####..
        #####.
        ##.###
        """,
    ),
    "itself": (
        {"sink_size": 0, "recent_size": 1},
        {"T": 12, "S": 12},
        """
        #..
        .#.
        ..#
        """,
    ),
    # Queries 0-3 stand at positions 10-13, and see keys from 7 on.
    "two-diagonals": (
        {"sink_size": 1, "recent_size": 4},
        {"T": 8, "S": 18},
        """
        ####.
        #.###
        """,
    ),
    "padding": (
        {"sink_size": 1, "recent_size": 2},
        {"T": 20, "S": 20, "kv_lengths": [10]},
        """
        #....
        ##...
        ###..
        .....
        .....
        """,
    ),
}


@pytest.mark.parametrize(("sizes", "call", "picture"), EXACT_PICTURES.values(), ids=EXACT_PICTURES)
def test_exact_windows_list_the_blocks_that_they_meet(sizes: dict, call: dict, picture: str):
    lengths = jnp.array(call["kv_lengths"], jnp.int32) if "kv_lengths" in call else None
    strategy = Streaming(**sizes, block_size=4, exact=True)
    pattern = strategy.select(*arrays(call["T"], call["S"]), kv_lengths=lengths)
    np.testing.assert_array_equal(
        selection.listed_blocks(pattern.blocks)[0, 0], block_matrix(picture)
    )


ATTENDED = {
    "lengths": ({"sink_size": 3, "recent_size": 9}, [37, 20], None),
    "packed": ({"sink_size": 0, "recent_size": 9}, None, [[0] * 12 + [1] * 25, [0] * 37]),
    "beyond-all-keys": ({"sink_size": 0, "recent_size": 99}, None, None),
}


@pytest.mark.parametrize(("sizes", "lengths", "segment_ids"), ATTENDED.values(), ids=ATTENDED)
def test_exact_windows_hold_to_the_token(sizes: dict, lengths: list, segment_ids: list):
    strategy = Streaming(**sizes, block_size=8, exact=True)
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.array(rng.normal(size=(2, length, heads, 8)), jnp.float32)
        for length, heads in ((21, 4), (37, 2), (37, 2))
    )
    given = {"kv_lengths": lengths, "segment_ids": segment_ids}
    given = {name: None if x is None else jnp.array(x, jnp.int32) for name, x in given.items()}

    @jax.jit
    def attend(q, k, v):
        pattern = strategy.select(q, k, **given)
        return sparse_attention(q, k, v, pattern, return_lse=True, **given)

    pairs = streaming.visible_pairs(
        *(2, 21, 37),
        sink_sizes=[sizes["sink_size"]] * 4,
        recent_sizes=[sizes["recent_size"]] * 4,
        kv_lengths=lengths,
    )
    if segment_ids is not None:
        ids = np.array(segment_ids)
        pairs &= (ids[:, 16:, None] == ids[:, None, :])[:, None]
    for found, expected in zip(attend(q, k, v), attention.attention(q, k, v, pairs), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_exact_sinks_of_packed_sequences_are_refused():
    segment_ids = jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(UnsupportedError, match=r"sink_size=1: .* pass sink_size=0"):
        Streaming(sink_size=1, exact=True).select(*arrays(8, 8), segment_ids=segment_ids)
