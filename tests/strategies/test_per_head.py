"""PerHead: what each head sees is what its own strategy selects for it."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import (
    FlexPrefill,
    Full,
    MInference,
    PerHead,
    SparsePattern,
    Streaming,
    XAttention,
    sparse_attention,
)
from sparseattn_jax.head_patterns import HeadPatterns
from tests.oracles import selection

BLOCK = 8
HEADS = [("stream_llm", 5, 9), ("vertical_and_slash", 9, 5)] * 2
STRATEGIES = {
    "full": Full(block_size=BLOCK),
    "streaming": Streaming(sink_size=3, recent_size=11, block_size=BLOCK),
    "exact": Streaming(sink_size=0, recent_size=11, block_size=BLOCK, exact=True),
    "xattention": XAttention(threshold=0.6, stride=4, block_size=BLOCK),
    "narrow": XAttention(threshold=0.99, stride=4, block_size=BLOCK, max_blocks=3),
    "flex_prefill": FlexPrefill(gamma=0.6, tau=0.3, block_size=BLOCK),
    "minference": MInference(vertical_size=9, slash_size=5, sink_size=4, block_size=BLOCK),
    "a_shape": MInference(
        heads=HeadPatterns.of(HEADS), sink_size=4, recent_size=2, block_size=BLOCK
    ),
}
RUN_ALWAYS = {("exact", "xattention"), ("narrow", "a_shape")}
PAIRS = [
    pytest.param(*pair, marks=[pytest.mark.full] * (pair not in RUN_ALWAYS))
    for pair in itertools.combinations(STRATEGIES, 2)
]


def draw(B: int = 2, T: int = 21, S: int = 45, N: int = 4, K: int = 2, H: int = 8):
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H)]
    return [jnp.array(2 * rng.normal(size=shape), jnp.float32) for shape in shapes]


@jax.jit
def select_in_jit(strategy: Any, lengths: jax.Array, q: jax.Array, k: jax.Array):
    return strategy.select(q, k, kv_lengths=lengths)


@jax.jit
def attend(strategy: Any, lengths: jax.Array, *qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
    pattern = strategy.select(*qkv[:2], kv_lengths=lengths)
    return sparse_attention(*qkv, pattern, kv_lengths=lengths, return_lse=True)


LENGTHS = jnp.array([45, 38], jnp.int32)


@functools.cache
def select(name: str) -> SparsePattern:
    return select_in_jit(STRATEGIES[name], LENGTHS, *draw()[:2])


def of_head(pattern: SparsePattern, head: int) -> dict[str, Any]:
    """What a head sees and lost, in a form that does not depend on widths."""

    def at(array: jax.Array) -> np.ndarray:
        return np.asarray(array)[:, head if array.shape[1] > 1 else 0]

    columns, windows = pattern.columns, pattern.windows
    seen: dict[str, Any] = {
        "blocks": selection.listed_blocks(pattern.blocks),
        "num_dropped": pattern.num_dropped,
    }
    seen = {name: at(array).tolist() for name, array in seen.items()}
    seen["columns"] = [[]] * len(LENGTHS)
    if columns is not None:
        pairs = zip(at(columns.indices), at(columns.counts), strict=True)
        seen["columns"] = [indices[:count].tolist() for indices, count in pairs]
    seen["window"] = (0, pattern.blocks.kv_len)
    if windows is not None:
        seen["window"] = (int(windows.sinks[head]), int(windows.recents[head]))
    return seen


def assert_padding_is_legal(indices: jax.Array, counts: jax.Array) -> None:
    """Entries past the count repeat the first index, 0 if there is none."""
    slots, first = np.arange(indices.shape[-1]), np.asarray(indices[..., :1])
    first = np.where(np.asarray(counts)[..., None] == 0, 0, first)
    is_padding = slots >= np.asarray(counts)[..., None]
    np.testing.assert_array_equal(
        np.asarray(indices)[is_padding], np.broadcast_to(first, indices.shape)[is_padding]
    )


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_each_head_sees_what_its_strategy_selects(first: str, second: str) -> None:
    for heads in ([True, False], [False, True, True, False], [True] * 2, [False] * 2):
        strategy = PerHead(
            first=STRATEGIES[first], second=STRATEGIES[second], is_first=jnp.array(heads)
        )
        mixed = select_in_jit(strategy, LENGTHS, *draw()[:2])
        for head, is_first in enumerate(np.repeat(heads, 4 // len(heads))):
            own = select(first if is_first else second)
            assert of_head(mixed, head) == of_head(own, head)
        assert_padding_is_legal(mixed.blocks.kv_indices, mixed.blocks.kv_num_blocks)
        if mixed.columns is not None:
            assert_padding_is_legal(mixed.columns.indices, mixed.columns.counts)


def test_lists_are_as_wide_as_the_wider_ones() -> None:
    width = max(select(name).blocks.kv_indices.shape[-1] for name in ("narrow", "exact"))
    strategy = PerHead(
        first=STRATEGIES["narrow"], second=STRATEGIES["exact"], is_first=jnp.array([True, False])
    )
    mixed = jax.eval_shape(select_in_jit, strategy, LENGTHS, *draw()[:2])
    assert mixed.blocks.kv_indices.shape == (2, 4, 3, width)
    assert mixed.columns is None


@pytest.mark.parametrize(
    ("group", "head_dim"),
    [
        (2, 64),
        pytest.param(1, 64, marks=pytest.mark.full),
        pytest.param(4, 128, marks=pytest.mark.full),
        pytest.param(8, 128, marks=pytest.mark.full),
    ],
)
def test_each_head_equals_its_single_type_result(group: int, head_dim: int) -> None:
    qkv = draw(N=2 * group, K=2, H=head_dim)
    first, second = STRATEGIES["xattention"], STRATEGIES["exact"]
    mixed = attend(
        PerHead(first=first, second=second, is_first=jnp.array([False, True])), LENGTHS, *qkv
    )
    for strategy, heads in ((first, slice(group, None)), (second, slice(group))):
        alone = attend(strategy, LENGTHS, *qkv)
        for ours, own in zip(mixed, alone, strict=True):
            np.testing.assert_allclose(ours[:, :, heads], own[:, :, heads], atol=1e-6)


def test_the_heads_of_each_layer_may_be_scanned() -> None:
    q, k, _ = draw()
    layers = jnp.array([[True, False], [False, False], [True, True]])

    def layer(carry: None, is_first: jax.Array) -> tuple[None, jax.Array]:
        strategy = PerHead(
            first=STRATEGIES["full"], second=STRATEGIES["streaming"], is_first=is_first
        )
        return carry, strategy.select(q, k).blocks.kv_num_blocks

    _, counts = jax.jit(lambda: jax.lax.scan(layer, None, layers))()
    full, streaming = (
        np.asarray(STRATEGIES[name].select(q, k).blocks.kv_num_blocks)
        for name in ("full", "streaming")
    )
    for heads, found in zip(layers, counts, strict=True):
        is_first = np.repeat(heads, 2)[None, :, None]
        np.testing.assert_array_equal(found, np.where(is_first, full, streaming))


@pytest.mark.parametrize("heads", [[True, False], [True, True], [False, False]])
def test_a_strategy_without_heads_does_not_run(heads: list[bool]) -> None:
    ran: list[str] = []

    class Reporting(Streaming):
        def select(self, *operands: jax.Array, **options: Any) -> SparsePattern:
            jax.debug.callback(lambda: ran.append("first" if self.sink_size == 1 else "second"))
            return super().select(*operands, **options)

    first, second = (Reporting(sink_size=size, block_size=BLOCK) for size in (1, 2))

    @jax.jit
    def select(is_first: jax.Array) -> SparsePattern:
        strategy = PerHead(first=first, second=second, is_first=is_first)
        return strategy.select(*draw()[:2])

    jax.block_until_ready(select(jnp.array(heads)))
    jax.effects_barrier()
    assert sorted(ran) == ["first"] * any(heads) + ["second"] * (not all(heads))


@pytest.mark.parametrize(
    ("is_first", "message"),
    [
        (jnp.ones(3, bool), r"is_first has shape \(3,\) and dtype bool; pass bool of shape \(2,\)"),
        (jnp.ones((2, 2), bool), r"is_first has shape \(2, 2\).* one per kv head of this layer"),
        (jnp.ones(2), "dtype float32; pass bool"),
        (jnp.array(True), r"is_first has shape \(\)"),
    ],
    ids=["heads", "layers", "gates", "scalar"],
)
def test_heads_that_do_not_fit_are_refused(is_first: jax.Array, message: str) -> None:
    strategy = PerHead(first=Full(), second=Streaming(), is_first=is_first)
    with pytest.raises(ValueError, match=message):
        strategy.select(*draw()[:2])


def test_blocks_of_two_sizes_are_refused() -> None:
    strategy = PerHead(
        first=Full(block_size=8), second=Streaming(block_size=16), is_first=jnp.ones(2, bool)
    )
    with pytest.raises(ValueError, match=r"blocks of \(8, 8\) and \(16, 16\) .* same block_size"):
        strategy.select(*draw()[:2])


def test_a_refusal_of_either_strategy_is_heard() -> None:
    strategy = PerHead(
        first=Full(), second=Streaming(recent_size=0), is_first=jnp.array([True, True])
    )
    with pytest.raises(ValueError, match="recent_size=0 must be at least 1"):
        strategy.select(*draw()[:2])
