"""Selections at equal budgets: random blocks below every strategy, the oracle above them all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import BlockMask, FlexPrefill, MInference, Streaming, XAttention
from sparseattn_jax.kernels.antidiagonal_scores import antidiagonal_scores
from sparseattn_jax.kernels.block_lists import keep_highest
from sparseattn_jax.measures import attention_recall, select_oracle, select_random
from sparseattn_jax.strategies import STRATEGIES
from sparseattn_jax.synthetic import structured_qkv

LENGTH, BLOCK, STRIDE, SEEDS = 512, 32, 8, range(3)
# kv heads, of two query heads each: a wide band, columns, narrow slashes, needles.
MIXTURE = {
    "sink": (9.0, 6.0, 0.0, 6.0),
    "local": (9.0, 8.0, 10.0, 8.0),
    "local_width": (48.0, 24.0, 1.0, 24.0),
    "column": (0.0, 10.0, 0.0, 0.0),
    "slash": (0.0, 0.0, 10.0, 0.0),
    "needle": (0.0, 0.0, 0.0, 12.0),
}
SLASH_HEADS = slice(4, 6)
SETTINGS = {
    "flex_prefill": FlexPrefill(gamma=0.93, min_budget=96, block_size=BLOCK),
    "minference": MInference(
        vertical_size=24,
        sink_size=8,
        recent_size=32,
        slash_size=64,
        num_queries=32,
        block_size=BLOCK,
    ),
    "streaming": Streaming(sink_size=32, recent_size=96, block_size=BLOCK),
    "xattention": XAttention(threshold=0.9, stride=STRIDE, block_size=BLOCK),
}

recall_of = jax.jit(attention_recall)
oracle_of = jax.jit(select_oracle)
random_of = jax.jit(select_random)
select_in_jit = jax.jit(lambda strategy, q, k: strategy.select(q, k))
scores_in_jit = jax.jit(
    functools.partial(antidiagonal_scores, stride=STRIDE, block_size=BLOCK, is_causal=True)
)


@jax.jit
def draw_in_jit(key):
    return structured_qkv(
        key,
        q_len=LENGTH,
        num_heads=8,
        num_kv_heads=4,
        head_dim=128,
        dtype=jnp.float32,
        num_sinks=8,
        num_columns=6,
        num_slashes=4,
        num_needles=3,
        needle_size=32,
        noise=0.5,
        **{name: jnp.array(strengths) for name, strengths in MIXTURE.items()},
    )


@functools.cache
def draw(seed: int):
    return draw_in_jit(jax.random.key(seed))[:2]


@functools.cache
def select(name: str, seed: int):
    return select_in_jit(SETTINGS[name], *draw(seed))


def test_every_strategy_that_leaves_something_out_is_covered():
    mixtures = {"duo_attention", "per_head"}
    assert SETTINGS.keys() | mixtures | {"full"} == STRATEGIES.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_strategy_beats_random_blocks(name: str):
    gains = []
    for seed in SEEDS:
        pattern = select(name, seed)
        random = random_of(jax.random.key(seed), pattern)
        gains.append(recall_of(*draw(seed), pattern) - recall_of(*draw(seed), random))
    assert np.mean(gains) > 0.04


@pytest.mark.parametrize("name", SETTINGS)
def test_no_lists_of_blocks_beat_the_oracle(name: str):
    for seed in SEEDS:
        blocks = select(name, seed).blocks  # columns are no blocks, and may be better
        best = recall_of(*draw(seed), oracle_of(*draw(seed), blocks))
        assert (recall_of(*draw(seed), blocks) <= best + 1e-5).all()


def highest(scores: jax.Array, budget: BlockMask) -> BlockMask:
    """The first block, the diagonal and the highest scores, as many as the budget has."""
    visible = jnp.broadcast_to(jnp.tri(LENGTH // BLOCK, dtype=bool), scores.shape)
    scores = jnp.where(jnp.eye(LENGTH // BLOCK, dtype=bool)[None, None], jnp.inf, scores)
    keep = keep_highest(scores.at[..., 0].set(jnp.inf), visible, budget.kv_num_blocks)
    return BlockMask.from_dense(keep, q_len=LENGTH, kv_len=LENGTH, block_q=BLOCK, block_kv=BLOCK)


def test_antidiagonal_scores_beat_diagonal_ones():
    gains = []
    for seed in SEEDS:
        q, k = draw(seed)
        budget = select("xattention", seed).blocks
        # The antidiagonals of queries in reversed order are the diagonals.
        reversed_q = q.reshape(1, -1, STRIDE, *q.shape[2:])[:, :, ::-1].reshape(q.shape)
        antidiagonal, diagonal = (
            recall_of(q, k, highest(scores_in_jit(x, k), budget)) for x in (q, reversed_q)
        )
        gains.append((antidiagonal - diagonal)[0])
    # A diagonal meets a slash only where their distances agree.
    assert np.mean(gains, axis=0)[SLASH_HEADS].min() > 0.02
    assert np.min(gains) > -0.01
