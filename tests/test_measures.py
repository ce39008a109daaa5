"""Recall, density and output error against their formulas; what oracle and random blocks are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import BlockMask
from sparseattn_jax.measures import (
    attention_recall,
    density,
    output_error,
    select_oracle,
    select_random,
)
from sparseattn_jax.pattern import SparsePattern, TokenColumns
from tests.oracles import attention as oracle
from tests.oracles import selection

recall_of = jax.jit(attention_recall)
oracle_of = jax.jit(select_oracle)
random_of = jax.jit(select_random)


def draw(B=2, T=21, S=29, N=4, K=2, H=8):
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, S, K, H)]
    return [jnp.array(1.5 * rng.normal(size=shape), jnp.float32) for shape in shapes]


def draw_mask(B=2, T=21, S=29, N=4, *, is_causal=True, seed=1):
    keep = np.random.default_rng(seed).random((B, N, -(-T // 8), -(-S // 8))) < 0.5
    mask = BlockMask.from_dense(
        jnp.array(keep), q_len=T, kv_len=S, block_q=8, block_kv=8, is_causal=is_causal
    )
    return keep, mask


def softmax(q, k, **visibility):
    """[B, N, T, S], 0 in rows that see no key."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    keys = np.repeat(np.asarray(k, np.float64), N // K, axis=2)
    logits = np.einsum("btnh,bsnh->bnts", np.asarray(q, np.float64), keys) / H**0.5
    weights = np.exp(logits) * oracle.visible_pairs(B, T, S, **visibility)[:, None]
    totals = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(totals == 0.0, 1.0, totals)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("lengths", [None, [29, 17], [29, 0]], ids=["all", "lengths", "no-key"])
def test_recall_is_the_mean_kept_mass(is_causal: bool, lengths: list[int] | None):
    q, k = draw()
    keep, mask = draw_mask(is_causal=is_causal)
    kv_lengths = None if lengths is None else jnp.array(lengths, jnp.int32)
    recall = recall_of(q, k, mask, kv_lengths=kv_lengths)
    shares = softmax(q, k, is_causal=is_causal, kv_lengths=lengths)
    kept = (shares * oracle.listed_pairs(keep, 21, 29, 8, 8)).sum(axis=-1)
    for b, n in np.ndindex(2, 4):
        rows = shares[b, n].sum(axis=-1) > 0
        expected = kept[b, n][rows].mean() if rows.any() else 1.0
        np.testing.assert_allclose(recall[b, n], expected, rtol=1e-5)


def test_recall_counts_segments():
    q, k = draw(T=29)
    _, mask = draw_mask(T=29)
    segment_ids = jnp.array([[0] * 8 + [1] * 21, [0] * 29], jnp.int32)
    both = recall_of(q, k, mask, segment_ids=segment_ids)
    alone = recall_of(q, k, mask)
    np.testing.assert_array_equal(both[1], alone[1])
    assert (both[0] != alone[0]).all()


def test_recall_of_everything_is_1():
    q, k = draw()
    mask = BlockMask.from_dense(
        jnp.ones((2, 1, 3, 4), bool), q_len=21, kv_len=29, block_q=8, block_kv=8
    )
    np.testing.assert_allclose(recall_of(q, k, mask), 1.0, rtol=1e-6)


def test_recall_refuses_a_mask_of_other_lengths():
    q, k = draw()
    _, mask = draw_mask(T=20)
    with pytest.raises(ValueError, match="block_mask is for q_len=20, kv_len=29"):
        attention_recall(q, k, mask)


def test_output_error_is_relative_per_head():
    reference = jnp.full((1, 5, 3, 4), 2.0)
    out = reference.at[0, :, 1].mul(1.5).at[0, 0, 2, 0].add(2.0)
    np.testing.assert_allclose(output_error(out, reference), [[0.0, 0.5, 20**-0.5]], rtol=1e-6)


def test_output_error_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"out.shape=\(1, 5, 3, 4\) and reference.shape"):
        output_error(jnp.ones((1, 5, 3, 4)), jnp.ones((1, 5, 3, 8)))


def test_density_counts_visible_blocks_of_each_sequence():
    keep = np.zeros((2, 1, 3, 4), bool)
    keep[0, 0] = [[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1]]
    keep[1, 0] = [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    mask = BlockMask.from_dense(jnp.array(keep), q_len=21, kv_len=29, block_q=8, block_kv=8)
    # Query blocks end at positions 15, 23 and 28: they see 2, 3 and 4 key blocks.
    np.testing.assert_allclose(density(mask), [[4 / 9], [4 / 9]])
    lengths = jnp.array([29, 16], jnp.int32)
    np.testing.assert_allclose(density(mask, kv_lengths=lengths), [[4 / 9], [2 / 2]])
    nothing = jnp.zeros(2, jnp.int32)
    np.testing.assert_array_equal(density(mask, kv_lengths=nothing), 0.0)


def draw_pattern():
    """Block 0 for every query block of both heads, and columns 3, 9, 27 or none."""
    keep = np.zeros((1, 2, 3, 4), bool)
    keep[..., 0] = True
    blocks = BlockMask.from_dense(jnp.array(keep), q_len=21, kv_len=29, block_q=8, block_kv=8)
    columns = TokenColumns(
        indices=jnp.array([[[3, 9, 27], [0, 0, 0]]], jnp.int32),
        counts=jnp.array([[3, 0]], jnp.int32),
        kv_len=29,
    )
    return SparsePattern(blocks=blocks, num_dropped=jnp.zeros((1, 2), jnp.int32), columns=columns)


def test_columns_outside_of_the_blocks_cost_a_part_of_one():
    pattern = draw_pattern()
    # Column 9 is seen by three query blocks, 27 by the last.
    np.testing.assert_allclose(density(pattern), [[(3 + 4 / 8) / 9, 3 / 9]])
    q, k = draw(B=1, N=2)
    shares = softmax(q, k, is_causal=True)
    kept = np.zeros((2, 29), bool)
    kept[:, :8] = kept[0, [9, 27]] = True
    expected = (shares * kept[None, :, None]).sum(axis=-1).mean(axis=-1)
    np.testing.assert_allclose(recall_of(q, k, pattern), expected, rtol=1e-5)
    # As many blocks as cost so much: two in a row of the first head, one in a row of the second.
    np.testing.assert_array_equal(oracle_of(q, k, pattern).kv_num_blocks[0], [[2] * 3, [1] * 3])


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("lengths", [None, [29, 17], [29, 0]], ids=["all", "lengths", "no-key"])
def test_the_oracle_takes_the_blocks_of_highest_mass(is_causal: bool, lengths: list[int] | None):
    q, k = draw()
    keep, budget = draw_mask(is_causal=is_causal)
    kv_lengths = None if lengths is None else jnp.array(lengths, jnp.int32)
    found = selection.listed_blocks(oracle_of(q, k, budget, kv_lengths=kv_lengths))
    shares = softmax(q, k, is_causal=is_causal, kv_lengths=lengths)
    visible, _ = selection.visible_and_forced(2, 21, 29, 8, is_causal=is_causal, kv_lengths=lengths)
    for b, n, i in np.ndindex(2, 4, 3):
        mass = shares[b, n, i * 8 : (i + 1) * 8].sum(axis=0)
        mass = np.add.reduceat(mass, np.arange(0, 29, 8))
        count = (keep[b, n, i] & visible[b, 0, i]).sum()
        expected = np.argsort(np.where(visible[b, 0, i], -mass, np.inf), kind="stable")[:count]
        assert np.flatnonzero(found[b, n, i]).tolist() == sorted(expected)


def test_the_oracle_sees_segments_and_blocks_that_are_not_square():
    q, k = draw(T=29)
    budget = BlockMask.from_dense(
        jnp.ones((2, 1, 2, 8), bool).at[..., 1:].set(False),
        q_len=29,
        kv_len=29,
        block_q=16,
        block_kv=4,
    )
    segment_ids = jnp.array([[0] * 16 + [1] * 13] * 2, jnp.int32)
    found = selection.listed_blocks(oracle_of(q, k, budget, segment_ids=segment_ids))
    assert (found.sum(axis=-1) == 1).all()
    # The second query block is the second segment.
    assert not found[:, :, 1, :4].any()
    best = recall_of(q, k, oracle_of(q, k, budget))
    for column in range(8):
        keep = jnp.zeros((2, 1, 2, 8), bool).at[..., 0, column % 4].set(True)
        keep = keep.at[..., 1, column].set(True)
        other = BlockMask.from_dense(keep, q_len=29, kv_len=29, block_q=16, block_kv=4)
        assert (recall_of(q, k, other) <= best + 1e-6).all()


def test_random_blocks_are_visible_seeded_and_as_many_as_the_budget_has():
    keep, budget = draw_mask(T=61, S=61)
    lengths = jnp.array([61, 37], jnp.int32)
    visible, forced = selection.visible_and_forced(
        2, 61, 61, 8, is_causal=True, kv_lengths=[61, 37]
    )
    draws = [
        selection.listed_blocks(random_of(jax.random.key(seed), budget, kv_lengths=lengths))
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    counts = (keep & visible).sum(axis=-1)
    for found in draws:
        assert not (found & ~visible).any()
        np.testing.assert_array_equal(found.sum(axis=-1), counts)
        # The first block and the diagonal come first.
        num_forced = np.minimum((forced & visible).sum(axis=-1), counts)
        np.testing.assert_array_equal((found & forced).sum(axis=-1), num_forced)


def test_random_blocks_without_causality_are_any():
    _, budget = draw_mask(is_causal=False)
    draws = [random_of(jax.random.key(seed), budget).to_dense() for seed in range(8)]
    listed = np.mean(draws, axis=(0, 1, 2, 3))
    assert (np.ptp(listed) < 0.35) and (listed > 0).all()


def test_lengths_of_other_sequences_are_refused():
    _, budget = draw_mask()
    lengths = jnp.array([29], jnp.int32)
    message = r"kv_lengths has shape \(1,\); pass one length per sequence, of shape \(2,\)"
    with pytest.raises(ValueError, match=message):
        density(budget, kv_lengths=lengths)
    with pytest.raises(ValueError, match=message):
        select_random(jax.random.key(0), budget, kv_lengths=lengths)


def test_selectors_refuse_a_budget_of_other_lengths():
    q, k = draw()
    _, budget = draw_mask(T=20)
    with pytest.raises(ValueError, match="block_mask is for q_len=20, kv_len=29"):
        select_oracle(q, k, budget)
