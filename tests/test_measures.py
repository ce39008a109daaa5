"""Recall and output error against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import BlockMask
from sparseattn_jax.measures import attention_recall, output_error
from tests.oracles import attention as oracle

recall_of = jax.jit(attention_recall)


def draw(B=2, T=21, S=29, N=4, K=2, H=8):
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, S, K, H)]
    return [jnp.array(1.5 * rng.normal(size=shape), jnp.float32) for shape in shapes]


def draw_mask(B=2, T=21, S=29, N=4, *, is_causal=True):
    keep = np.random.default_rng(1).random((B, N, -(-T // 8), -(-S // 8))) < 0.5
    mask = BlockMask.from_dense(
        jnp.array(keep), q_len=T, kv_len=S, block_q=8, block_kv=8, is_causal=is_causal
    )
    return keep, mask


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("lengths", [None, [29, 17], [29, 0]], ids=["all", "lengths", "no-key"])
def test_recall_is_the_mean_kept_mass(is_causal: bool, lengths: list[int] | None):
    q, k = draw()
    keep, mask = draw_mask(is_causal=is_causal)
    kv_lengths = None if lengths is None else jnp.array(lengths, jnp.int32)
    recall = recall_of(q, k, mask, kv_lengths=kv_lengths)
    visible = oracle.visible_pairs(2, 21, 29, is_causal=is_causal, kv_lengths=lengths)[:, None]
    listed = oracle.listed_pairs(keep, 21, 29, 8, 8)
    keys = np.repeat(np.asarray(k, np.float64), 2, axis=2)
    logits = np.einsum("btnh,bsnh->bnts", np.asarray(q, np.float64), keys) / 8**0.5
    weights = np.exp(logits) * visible
    totals = weights.sum(axis=-1)
    for b, n in np.ndindex(2, 4):
        rows = totals[b, n] > 0
        kept = (weights * listed)[b, n].sum(axis=-1)
        expected = (kept[rows] / totals[b, n][rows]).mean() if rows.any() else 1.0
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
