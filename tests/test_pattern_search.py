"""The search for patterns against recalls and costs by their rules."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import MInference
from sparseattn_jax.head_patterns import KINDS
from sparseattn_jax.pattern_search import search_head_patterns
from tests.oracles import attention, minference

T, BLOCK = 96, 4
SETTINGS = {
    "sink_size": 1,
    "recent_size": 1,
    "last_size": 9,
    "num_queries": 16,
    "block_size": BLOCK,
}
CANDIDATES = (("stream_llm", 1, 8), ("vertical_and_slash", 10, 1), ("block_sparse", 2, 1))
DENSITY = 0.4


@functools.cache
def draw() -> tuple[np.ndarray, np.ndarray]:
    """Heads that look at the neighbours, at some keys, and at the keys of the query's topic."""
    rng = np.random.default_rng(0)
    q, k = 0.3 * rng.normal(size=(2, 1, T, 3, 16))
    turn = 0.2 * np.arange(T)[:, None] * np.linspace(0.5, 2, 8)
    waves = 1.8 * np.concatenate([np.cos(turn), np.sin(turn)], axis=-1)
    # Of any sign, so that the means of blocks do not show them.
    waves *= rng.choice([-1, 1], size=(T, 1))
    q[0, :, 0] += waves
    k[0, :, 0] += waves
    k[0, rng.permutation(T)[:10], 1] += 1.5
    q[0, :, 1] += 1
    topics = 2 * rng.normal(size=(6, 16))
    of_blocks = np.repeat(rng.integers(0, 6, T // BLOCK), BLOCK)
    q[0, :, 2] += topics[of_blocks]
    k[0, :, 2] += topics[of_blocks]
    return q.astype(np.float32), k.astype(np.float32)


def oracle_of(head: tuple) -> tuple[np.ndarray, np.ndarray]:
    """(recall, computed pairs) of each head, were it this one."""
    q, k = draw()
    heads = [head] * 3
    keep, columns = minference.selected(q, k, heads=heads, **SETTINGS)
    pairs = minference.kept_pairs(keep, columns, heads, T, T, BLOCK)
    causal = np.broadcast_to(np.tri(T, dtype=bool), pairs.shape)
    kept, whole = (attention.attention(q, k, k, x)[1] for x in (pairs, causal))
    recall = np.exp(kept - whole)[:, T // 2 :].mean(axis=(0, 1))
    num_columns = np.array([len(of_head) for of_head in columns[0]])
    return recall, BLOCK**2 * keep.sum(axis=(0, 2, 3)) + T * num_columns


@functools.cache
def search():
    operands = map(jnp.asarray, draw())
    return search_head_patterns(
        *operands,
        density=DENSITY,
        candidates=CANDIDATES,
        strategy=MInference(**SETTINGS),
        first_query=T // 2,
    )


def test_every_head_gets_its_kind() -> None:
    patterns, _ = search()
    assert [KINDS[kind] for kind in patterns.kinds.tolist()] == [kind for kind, *_ in CANDIDATES]


def test_recalls_and_costs_are_those_of_the_patterns() -> None:
    patterns, recalls = search()
    allowed = DENSITY * T * (T + 1) / 2
    for head, (kind, *_) in enumerate(CANDIDATES):
        recall, pairs = oracle_of((kind, *patterns.sizes[head].tolist()))
        np.testing.assert_allclose(recalls[head], recall[head], atol=1e-5)
        assert 0.9 * allowed < pairs[head] <= allowed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, r"density=0.0 must lie in \(0, 1\]"),
        ({"density": 0.5, "first_query": T}, r"first_query=96 must lie in \[0, q_len=96\)"),
        ({"density": 0.5, "candidates": ()}, "must hold at least one"),
        ({"density": 0.01}, "density=0.01 is too low for head 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    defaults = {"candidates": CANDIDATES[:1], "first_query": 9, "strategy": MInference(**SETTINGS)}
    with pytest.raises(ValueError, match=message):
        search_head_patterns(*map(jnp.asarray, draw()), **(defaults | arguments))
