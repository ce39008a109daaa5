"""The block lists of windows are those of the keys that queries see."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.streaming_attention import tiling

SINKS = (0, 1, 3, 4, 5, 9)
RECENTS = (0, 1, 2, 4, 5, 8, 13, 30)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "BLOCK", 4)


def seen_blocks(q_len: int, kv_len: int, sink: int, recent: int) -> np.ndarray:
    """[Tb, Sb] bool: of which key blocks some query of a query block sees a key."""
    position = np.arange(q_len)[:, None] + kv_len - q_len
    key = np.arange(kv_len)[None]
    seen = (key <= position) & ((key < sink) | (key > position - recent))
    seen = np.pad(seen, ((0, -q_len % 4), (0, -kv_len % 4)))
    return seen.reshape(-(-q_len // 4), 4, -(-kv_len // 4), 4).any(axis=(1, 3))


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (22, 22), (24, 24), (5, 21), (16, 31)])
def test_lists_cover_what_is_seen_and_nothing_else(q_len: int, kv_len: int):
    windows = np.array(list(itertools.product(SINKS, RECENTS)), np.int32).T
    windows = np.minimum(windows, kv_len)
    num_blocks = -(-kv_len // 4)
    indices, counts = tiling.covering_lists(
        jnp.array(windows), width=num_blocks, q_len=q_len, kv_len=kv_len
    )
    expected = [seen_blocks(q_len, kv_len, *window) for window in windows.T]
    keep = jnp.array(np.stack(expected))
    for one, other in zip((indices, counts), block_lists.from_dense(keep), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4])
def test_the_width_is_that_of_the_longest_list(offset: int):
    q_len = 60
    for sink, recent in itertools.product(SINKS, RECENTS[1:]):
        longest = seen_blocks(q_len, q_len + offset, sink, recent).sum(axis=1).max()
        width = tiling.list_width(sink, recent, q_len=q_len, kv_len=q_len + offset)
        assert width == longest, (sink, recent)


def test_memory_follows_the_window_not_the_keys():
    assert tiling.list_width(8, 16, q_len=10**6, kv_len=10**6) == 2 + 5
