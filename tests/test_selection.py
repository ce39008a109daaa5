"""Visible and forced blocks against the tokens, and ranges of query blocks."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.block_mask import num_visible_blocks
from sparseattn_jax.kernels.antidiagonal_scores import antidiagonal_scores
from sparseattn_jax.selection import (
    diagonal_blocks,
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
        diagonals = diagonal_blocks(q_len, kv_len, 8)[0][:, None]
        np.testing.assert_array_equal(((columns >= diagonals) | (columns == 0)) & visible, forced)
    most = num_forced_blocks(q_len, kv_len, 8, is_causal=is_causal)
    assert forced.sum(axis=-1).max() <= most


def test_forced_blocks_of_an_unaligned_offset():
    # Queries 0-7 stand at positions 12-19: key blocks 1 and 2.
    visible, forced = oracle.visible_and_forced(1, 16, 28, 8, is_causal=True)
    np.testing.assert_array_equal(visible[0, 0], block_matrix("###. ####"))
    np.testing.assert_array_equal(forced[0, 0], block_matrix("###. #.##"))


def random_qk(batch=1, q_len=61, kv_len=75, q_heads=2, kv_heads=1, head_dim=8):
    rng = np.random.default_rng(q_len)
    shapes = (batch, q_len, q_heads, head_dim), (batch, kv_len, kv_heads, head_dim)
    return tuple(jnp.array(2 * rng.normal(size=shape), jnp.float32) for shape in shapes)


def antidiagonal(operands, q_blocks, **options):
    return antidiagonal_scores(
        *operands, stride=4, q_blocks=q_blocks, workspace_bytes=2**16, **options
    )


def of_means(operands, q_blocks, *, block_size, **_):
    """Scores that compile faster: those of the blocks' mean tokens."""
    q, k = (x.reshape(len(x), -1, block_size, *x.shape[2:]).mean(axis=2) for x in operands)
    q = q[:, q_blocks[0] : q_blocks[1]]
    return jnp.exp(jnp.einsum("binh,bjh->bnij", q, k[:, :, 0], preferred_element_type=jnp.float32))


@functools.partial(jax.jit, static_argnames=("is_causal", "max_blocks", "workspace_bytes", "score"))
def select_in_ranges(
    q,
    k,
    threshold,
    kv_lengths=None,
    *,
    is_causal=True,
    max_blocks=None,
    workspace_bytes=2**29,
    score=antidiagonal,
):
    """In blocks of 8 and, of the antidiagonal scores, strides of 4."""
    options = {"block_size": 8, "is_causal": is_causal, "kv_lengths": kv_lengths}
    return select_cumulative(
        functools.partial(score, **options),
        (q, k),
        jnp.broadcast_to(threshold, (q.shape[2],)),
        max_blocks=max_blocks,
        backend=None,
        workspace_bytes=workspace_bytes,
        **options,
    )


RANGES = {
    "odd": ({}, {}, 1000),
    "one-row-each": ({"q_len": 37}, {}, 1),
    "T=S": ({"q_len": 64, "kv_len": 64}, {}, 200),
    "lengths": ({"batch": 3}, {"kv_lengths": [75, 40, 0]}, 1000),
    "non-causal": ({}, {"is_causal": False}, 500),
    "per-head": ({"q_heads": 3}, {"threshold": [0.2, 0.8, 1.0]}, 500),
    "capacity": ({"batch": 2, "q_heads": 4, "kv_heads": 2}, {"max_blocks": 4}, 1000),
}


@pytest.mark.parametrize(("shape", "call", "workspace_bytes"), RANGES.values(), ids=RANGES)
def test_ranges_of_rows_do_not_change_the_pattern(shape: dict, call: dict, workspace_bytes: int):
    q, k = random_qk(**shape)
    threshold = jnp.array(call.get("threshold", 0.8), jnp.float32)
    lengths = call.get("kv_lengths")
    arrays = (q, k, threshold, None if lengths is None else jnp.array(lengths, jnp.int32))
    options = {x: call[x] for x in ("is_causal", "max_blocks") if x in call}
    whole = select_in_ranges(*arrays, **options)
    in_ranges = select_in_ranges(*arrays, **options, workspace_bytes=workspace_bytes)
    np.testing.assert_array_equal(whole.blocks.kv_num_blocks, in_ranges.blocks.kv_num_blocks)
    np.testing.assert_array_equal(whole.blocks.kv_indices, in_ranges.blocks.kv_indices)
    np.testing.assert_array_equal(whole.num_dropped, in_ranges.num_dropped)
    assert (whole.num_dropped.sum() > 0) == ("max_blocks" in call)


@pytest.mark.parametrize(
    ("workspace_bytes", "ranges"),
    [(2**29, [(0, 8)]), (1000, [(0, 3), (3, 6), (6, 8)]), (1, [(i, i + 1) for i in range(8)])],
    ids=["one", "three", "each-row"],
)
def test_ranges_follow_the_workspace(workspace_bytes: int, ranges: list[tuple[int, int]]):
    q, k = random_qk(batch=2, q_heads=4)
    asked = []

    def scores(operands, q_blocks):
        asked.append(q_blocks)
        return jnp.ones((2, 4, q_blocks[1] - q_blocks[0], 10), jnp.float32)

    select_cumulative(
        scores,
        (q, k),
        jnp.full(4, 0.8),
        block_size=8,
        is_causal=True,
        kv_lengths=None,
        max_blocks=None,
        backend=None,
        workspace_bytes=workspace_bytes,
    )
    assert asked == ranges


@pytest.mark.parametrize(
    ("tokens", "ranges"), [(2**17, 1), (2**18, 1), (2**19, 4), (2**20, 16)], ids=str
)
def test_ranges_of_32_heads(tokens: int, ranges: int):
    """Up to 256K tokens all scores are there at once; at 1M, 1/16 of 8.6 GB."""
    asked = []

    def scores(operands, q_blocks):
        asked.append(q_blocks)
        return jnp.ones((1, 32, q_blocks[1] - q_blocks[0], tokens // 128), jnp.float32)

    def select(q, k):
        return select_cumulative(
            scores,
            (q, k),
            jnp.full(32, 0.9),
            block_size=128,
            is_causal=True,
            kv_lengths=None,
            max_blocks=1024,
            backend="xla",
        )

    shapes = (1, tokens, 32, 128), (1, tokens, 8, 128)
    pattern = jax.eval_shape(select, *(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes))
    assert len(asked) == ranges
    assert pattern.blocks.kv_indices.shape == (1, 32, tokens // 128, 1024)


def test_ranges_under_vmap():
    q, k = random_qk(batch=2, q_len=64, kv_len=80)
    options = {"workspace_bytes": 500, "score": of_means}
    select = functools.partial(select_in_ranges, threshold=jnp.float32(0.8), **options)
    together = select(q, k)
    mapped = jax.vmap(lambda q, k: select(q[None], k[None]))(q, k)
    np.testing.assert_array_equal(mapped.blocks.kv_indices[:, 0], together.blocks.kv_indices)


def test_ranges_have_no_gradient():
    q, k = random_qk()

    def mass(q, k):
        return select_in_ranges(q, k, 0.8, workspace_bytes=200).blocks.density().sum() + q.sum()

    d_q, d_k = jax.jit(jax.grad(mass, argnums=(0, 1)))(q, k)
    np.testing.assert_array_equal(d_q, 1.0)
    np.testing.assert_array_equal(d_k, 0.0)


def temporary_bytes(score: Callable, length: int, workspace_bytes: int) -> int:
    """Of a selection with lists of 32 blocks, as compiled; its two heads have length / 8 blocks."""
    q, k = (jax.ShapeDtypeStruct((1, length, heads, 8), jnp.bfloat16) for heads in (2, 1))
    options = {"max_blocks": 32, "workspace_bytes": workspace_bytes, "score": score}
    compiled = select_in_ranges.lower(q, k, jnp.float32(0.8), **options).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "score",
    [of_means, pytest.param(antidiagonal, marks=pytest.mark.full)],
    ids=["means", "antidiagonal"],
)
def test_memory_does_not_grow_with_the_square_of_the_length(score: Callable):
    # All scores are 2**19 bytes at the first length and four times that at the second.
    first, at_once = temporary_bytes(score, 2048, 2**19), temporary_bytes(score, 4096, 2**21)
    in_ranges = temporary_bytes(score, 4096, 2**19)
    assert at_once > 3 * first
    assert in_ranges < 1.5 * first
    assert in_ranges < 8 * 2**19


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "segment_ids": np.repeat([[0, 1, 2]], [30, 25, 20], axis=1)},
        {"is_causal": False, "keep_sink": True, "keep_recent": True},
    ],
    ids=["segments", "kept-without-causality"],
)
def test_ranges_of_rows_take_their_part_of_everything(options: dict):
    q, k = random_qk(batch=1)
    options = {x: jnp.array(y, jnp.int32) if x == "segment_ids" else y for x, y in options.items()}
    uniform = np.random.default_rng(0).random((1, 2, 8, 10))

    @functools.partial(jax.jit, static_argnames="workspace_bytes")
    def select(workspace_bytes):
        def scores(operands, q_blocks):
            return jnp.array(uniform[:, :, slice(*q_blocks)], jnp.float32)

        return select_cumulative(
            scores,
            (q, k),
            jnp.full(2, 0.3),
            block_size=8,
            kv_lengths=None,
            max_blocks=None,
            backend=None,
            workspace_bytes=workspace_bytes,
            **options,
        )

    jax.tree.map(np.testing.assert_array_equal, select(2**29), select(200))
