"""Patterns whose heads are selected by different strategies."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32

from sparseattn_jax.block_mask import BlockMask
from sparseattn_jax.pattern import HeadWindows, SparsePattern, TokenColumns


def query_heads(
    name: str, heads: jax.Array | np.ndarray, q: jax.Array, k: jax.Array
) -> Bool[Array, " N"]:
    """Per query head what is said per kv head or per query head.

    Raises:
        ValueError: `heads`, whose name is given, is of another shape or not boolean.
    """
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    heads = jnp.asarray(heads)
    if heads.shape not in ((num_kv_heads,), (num_heads,)) or heads.dtype != jnp.bool:
        raise ValueError(
            f"{name} has shape {heads.shape} and dtype {heads.dtype}; pass bool of shape "
            f"({num_kv_heads},), one per kv head of this layer, or ({num_heads},), one per query "
            "head"
        )
    return jnp.repeat(heads, num_heads // heads.shape[0])


def select_if(is_needed: Bool[Array, ""], select: Callable[[], SparsePattern]) -> SparsePattern:
    """What `select` returns, or without its cost a pattern of the same shapes with empty lists."""
    shapes = jax.eval_shape(select)

    def empty() -> SparsePattern:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return lax.cond(is_needed, select, empty)


def mix(first: SparsePattern, second: SparsePattern, is_first: Bool[Array, " N"]) -> SparsePattern:
    """The first pattern in some heads, the second in the others: lists, columns and windows.

    Lists are as wide as the wider ones and exist for every head, also where heads shared them.

    Args:
        first: for any number of heads or for all alike.
        second: likewise, in blocks of the same size.
        is_first: which query heads take the first.

    Raises:
        ValueError: the patterns are in blocks of different sizes.
    """
    _check_alike(first.blocks, second.blocks)
    return SparsePattern(
        blocks=_mixed_blocks(first.blocks, second.blocks, is_first),
        num_dropped=_where(is_first, first.num_dropped, second.num_dropped),
        columns=_mixed_columns(first, second, is_first),
        windows=_mixed_windows(first, second, is_first),
    )


def _check_alike(first: BlockMask, second: BlockMask) -> None:
    sizes = (first.block_q, first.block_kv), (second.block_q, second.block_kv)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the strategies select in blocks of {sizes[0]} and {sizes[1]} queries and keys; give "
            "both the same block_size"
        )


def _mixed_blocks(first: BlockMask, second: BlockMask, is_first: Array) -> BlockMask:
    width = max(first.kv_indices.shape[-1], second.kv_indices.shape[-1])
    return dataclasses.replace(
        first,
        kv_indices=_where(
            is_first, _widened(first.kv_indices, width), _widened(second.kv_indices, width)
        ),
        kv_num_blocks=_where(is_first, first.kv_num_blocks, second.kv_num_blocks),
    )


def _mixed_columns(
    first: SparsePattern, second: SparsePattern, is_first: Array
) -> TokenColumns | None:
    given = [pattern.columns for pattern in (first, second) if pattern.columns is not None]
    if not given:
        return None
    width = max(columns.indices.shape[-1] for columns in given)
    counts, indices = zip(
        *(_counts_and_indices(pattern.columns, given[0], width) for pattern in (first, second)),
        strict=True,
    )
    return TokenColumns(
        indices=_where(is_first, *indices),
        counts=_where(is_first, *counts),
        kv_len=given[0].kv_len,
    )


def _counts_and_indices(
    columns: TokenColumns | None, like: TokenColumns, width: int
) -> tuple[Int32[Array, "B N"], Int32[Array, "B N width"]]:
    if columns is None:
        return jnp.zeros_like(like.counts), jnp.zeros((*like.counts.shape, width), jnp.int32)
    return columns.counts, _widened(columns.indices, width)


def _mixed_windows(
    first: SparsePattern, second: SparsePattern, is_first: Array
) -> HeadWindows | None:
    if first.windows is None and second.windows is None:
        return None
    everything = HeadWindows(
        sinks=jnp.zeros(is_first.shape, jnp.int32),
        recents=jnp.full(is_first.shape, first.blocks.kv_len, jnp.int32),
    )
    windows = first.windows or everything, second.windows or everything
    return jax.tree.map(lambda a, b: jnp.where(is_first, a, b), *windows)


def _widened(indices: Int32[Array, "*rows M"], width: int) -> Int32[Array, "*rows width"]:
    """Lists with more room, whose new entries repeat the row's first index."""
    missing = width - indices.shape[-1]
    if missing == 0:
        return indices
    if indices.shape[-1] == 0:
        return jnp.zeros((*indices.shape[:-1], width), jnp.int32)
    more = jnp.broadcast_to(indices[..., :1], (*indices.shape[:-1], missing))
    return jnp.concatenate([indices, more], axis=-1)


def _where(is_first: Array, first: Array, second: Array) -> Array:
    """By heads, which are the second axis."""
    return jnp.where(is_first.reshape(1, -1, *(1,) * (first.ndim - 2)), first, second)
