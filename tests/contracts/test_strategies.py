"""What every registered strategy must do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import (
    DuoAttention,
    FlexPrefill,
    Full,
    MInference,
    PerHead,
    Streaming,
    XAttention,
)
from sparseattn_jax.strategies import STRATEGIES
from sparseattn_jax.strategies.protocol import Strategy
from tests.oracles import selection

BLOCK = 8
MIXED = jnp.array([True, False])
SETTINGS = {
    "duo_attention": DuoAttention(
        retrieval=XAttention(threshold=0.6, stride=4, block_size=BLOCK),
        retrieval_heads=MIXED,
        sink_size=5,
        recent_size=10,
    ),
    "flex_prefill": FlexPrefill(gamma=0.6, tau=0.3, block_size=BLOCK),
    "full": Full(block_size=BLOCK),
    "minference": MInference(
        vertical_size=9, slash_size=5, sink_size=8, recent_size=2, block_size=BLOCK
    ),
    "per_head": PerHead(
        first=Full(block_size=BLOCK),
        second=Streaming(sink_size=8, recent_size=16, block_size=BLOCK),
        is_first=MIXED,
    ),
    "streaming": Streaming(sink_size=8, recent_size=16, block_size=BLOCK),
    "xattention": XAttention(threshold=0.6, stride=4, block_size=BLOCK),
}
KEEP_ALL = {
    "duo_attention": DuoAttention(
        retrieval=Full(block_size=BLOCK), retrieval_heads=MIXED, recent_size=64
    ),
    "flex_prefill": FlexPrefill(gamma=1.0, block_size=BLOCK),
    "full": Full(block_size=BLOCK),
    "minference": MInference(vertical_size=64, slash_size=64, block_size=BLOCK),
    "per_head": PerHead(
        first=XAttention(threshold=1.0, stride=4, block_size=BLOCK),
        second=Full(block_size=BLOCK),
        is_first=MIXED,
    ),
    "streaming": Streaming(sink_size=8, recent_size=64, block_size=BLOCK),
    "xattention": XAttention(threshold=1.0, stride=4, block_size=BLOCK),
}
SHAPES = {
    "square": (48, 48, None),
    "odd": (45, 45, None),
    "T<S": (21, 61, None),
    "T<block": (3, 3, None),
    "lengths": (45, 45, [45, 17]),
}
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


def draw(T: int, S: int, lengths: list[int] | None):
    rng = np.random.default_rng(0)
    q = jnp.array(2.5 * rng.normal(size=(2, T, 4, 8)), jnp.float32)
    k = jnp.array(2.5 * rng.normal(size=(2, S, 2, 8)), jnp.float32)
    return q, k, None if lengths is None else jnp.array(lengths, jnp.int32)


@jax.jit
def select_in_jit(strategy: Strategy, q, k, lengths):
    return strategy.select(q, k, kv_lengths=lengths)


@functools.cache
def select(name: str, shape: str, *, keep_all: bool = False):
    """The pattern of a strategy, by the names of its registration and of the shape."""
    strategy = (KEEP_ALL if keep_all else SETTINGS)[name]
    return select_in_jit(strategy, *draw(*SHAPES[shape]))


def test_every_registered_strategy_is_covered():
    assert SETTINGS.keys() == KEEP_ALL.keys() == STRATEGIES.keys()
    for name, strategy in SETTINGS.items():
        assert type(strategy) is STRATEGIES[name] is type(KEEP_ALL[name])
        assert isinstance(strategy, Strategy)


@every_strategy
@pytest.mark.parametrize("shape", SHAPES)
def test_lists_are_legal(name: str, shape: str):
    pattern = select(name, shape)
    blocks = pattern.blocks
    indices, counts = np.array(blocks.kv_indices), np.array(blocks.kv_num_blocks)
    assert (blocks.q_len, blocks.kv_len, blocks.is_causal) == (*SHAPES[shape][:2], True)
    assert indices.dtype == counts.dtype == np.int32
    assert indices.shape[0] == 2 and indices.shape[1] in (1, 4)
    assert indices.shape[:3] == counts.shape
    assert counts.min() >= 0 and counts.max() <= indices.shape[-1]
    listed = np.arange(indices.shape[-1]) < counts[..., None]
    # Every entry may be loaded, listed or not; unlisted ones repeat the first.
    assert indices.min() >= 0 and indices.max() < blocks.num_kv_blocks
    assert (np.diff(indices, axis=-1) > 0)[listed[..., 1:]].all()
    first = np.broadcast_to(indices[..., :1], indices.shape)
    np.testing.assert_array_equal(indices[~listed], first[~listed])
    assert (indices[..., 0][counts == 0] == 0).all()
    np.testing.assert_array_equal(pattern.num_dropped, 0)
    assert pattern.num_dropped.shape == counts.shape[:2]


@every_strategy
@pytest.mark.parametrize("shape", SHAPES)
def test_lists_the_diagonal_and_nothing_invisible(name: str, shape: str):
    pattern = select(name, shape)
    keep = selection.listed_blocks(pattern.blocks)
    q_len, kv_len, lengths = SHAPES[shape]
    visible, forced = selection.visible_and_forced(
        2, q_len, kv_len, BLOCK, is_causal=True, kv_lengths=lengths
    )
    assert not (keep & ~visible).any()
    if pattern.columns is not None:
        # The first block's keys may be columns instead.
        keep[..., 0] |= (np.array(pattern.columns.indices[..., :BLOCK]) < BLOCK).all(axis=-1)[
            ..., None
        ]
    assert keep[np.broadcast_to(forced, keep.shape)].all()


@every_strategy
@pytest.mark.parametrize("shape", SHAPES)
def test_the_keep_all_setting_equals_full(name: str, shape: str):
    keep = selection.listed_blocks(select(name, shape, keep_all=True).blocks)
    everything = selection.listed_blocks(select("full", shape).blocks)
    np.testing.assert_array_equal(keep, np.broadcast_to(everything, keep.shape))


@every_strategy
def test_is_deterministic_and_the_same_under_vmap(name: str):
    strategy, operands = SETTINGS[name], draw(*SHAPES["lengths"])
    expected = select(name, "lengths")

    def select_one(q, k, length):
        return strategy.select(q[None], k[None], kv_lengths=length[None])

    mapped = jax.jit(jax.vmap(select_one))(*operands)
    windows = jax.tree.map(lambda leaf: leaf[0], mapped.windows)  # the same for all sequences
    mapped = dataclasses.replace(mapped, windows=None)
    mapped = dataclasses.replace(jax.tree.map(lambda leaf: leaf[:, 0], mapped), windows=windows)
    again = select_in_jit(strategy, *operands)
    for other in (mapped, again):
        jax.tree.map(np.testing.assert_array_equal, other, expected)


@every_strategy
def test_is_a_pytree_with_static_shapes(name: str):
    strategy = SETTINGS[name]
    leaves, treedef = jax.tree.flatten(strategy)
    assert jax.tree.unflatten(treedef, leaves) == strategy
    assert jax.tree.unflatten(treedef, [object()] * len(leaves)) is not None
