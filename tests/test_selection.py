"""Visible and forced blocks against the tokens, and ranges of query blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.block_mask import num_visible_blocks
from sparseattn_jax.kernels.antidiagonal_scores import antidiagonal_scores
from sparseattn_jax.selection import (
    first_diagonal_blocks,
    num_forced_blocks,
    select_cumulative,
)
from tests.drawing import block_matrix
from tests.oracles import selection as oracle

GEOMETRIES = {
    "square": (32, 32, True, None),
    "odd": (29, 29, True, None),
    "shorter-than-a-block": (3, 3, True, None),
    "aligned-offset": (16, 40, True, None),
    "unaligned-offset": (21, 45, True, None),
    "lengths": (45, 45, True, [45, 16, 9, 0]),
    "lengths-unaligned-offset": (21, 45, True, [45, 33, 25, 24]),
    "non-causal": (21, 45, False, None),
    "non-causal-lengths": (50, 45, False, [45, 16, 9, 0]),
}


@pytest.mark.parametrize(
    ("q_len", "kv_len", "is_causal", "lengths"), GEOMETRIES.values(), ids=GEOMETRIES
)
def test_visible_and_forced_blocks_follow_the_tokens(q_len, kv_len, is_causal, lengths):
    batch = 1 if lengths is None else len(lengths)
    visible, forced = oracle.visible_and_forced(
        batch, q_len, kv_len, 8, is_causal=is_causal, kv_lengths=lengths
    )
    kv_lengths = None if lengths is None else jnp.array(lengths, jnp.int32)
    counts = num_visible_blocks(
        q_len=q_len,
        kv_len=kv_len,
        block_q=8,
        block_kv=8,
        is_causal=is_causal,
        kv_lengths=kv_lengths,
    )
    columns = np.arange(visible.shape[-1])
    np.testing.assert_array_equal(columns < np.array(counts)[:, None, :, None], visible)
    if is_causal:
        diagonals = first_diagonal_blocks(q_len, kv_len, 8)[:, None]
        np.testing.assert_array_equal(((columns >= diagonals) | (columns == 0)) & visible, forced)
    most = num_forced_blocks(q_len, kv_len, 8, is_causal=is_causal)
    assert forced.sum(axis=-1).max() <= most


def test_forced_blocks_of_an_unaligned_offset():
    # Queries 0-7 stand at positions 12-19: key blocks 1 and 2.
    visible, forced = oracle.visible_and_forced(1, 16, 28, 8, is_causal=True)
    np.testing.assert_array_equal(visible[0, 0], block_matrix("###. ####"))
    np.testing.assert_array_equal(forced[0, 0], block_matrix("###. #.##"))


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("max_blocks", [None, 4])
def test_chunks_of_rows_do_not_change_the_pattern(is_causal: bool, max_blocks: int | None):
    rng = np.random.default_rng(0)
    q, k = (jnp.array(2 * rng.normal(size=(2, *x, 8)), jnp.float32) for x in ((61, 4), (75, 2)))

    def select(workspace_bytes: int):
        def select(q, k, kv_lengths):
            return select_cumulative(
                functools.partial(score, q, k, kv_lengths),
                jnp.full(4, 0.8),
                batch=2,
                q_len=61,
                kv_len=75,
                block_size=8,
                is_causal=is_causal,
                kv_lengths=kv_lengths,
                max_blocks=max_blocks,
                backend=None,
                workspace_bytes=workspace_bytes,
            )

        return jax.jit(select)(q, k, jnp.array([75, 40], jnp.int32))

    def score(q, k, kv_lengths, q_blocks):
        ranges.append(q_blocks)
        return antidiagonal_scores(
            q,
            k,
            stride=4,
            block_size=8,
            is_causal=is_causal,
            kv_lengths=kv_lengths,
            q_blocks=q_blocks,
        )

    ranges = []
    whole = select(2**29)
    assert ranges == [(0, 8)]
    ranges.clear()
    chunked = select(1000)
    assert ranges == [(first, min(first + 3, 8)) for first in (0, 3, 6)]
    np.testing.assert_array_equal(whole.blocks.kv_num_blocks, chunked.blocks.kv_num_blocks)
    np.testing.assert_array_equal(whole.blocks.kv_indices, chunked.blocks.kv_indices)
    np.testing.assert_array_equal(whole.num_dropped, chunked.num_dropped)
    assert (whole.num_dropped.sum() > 0) == (max_blocks is not None)
