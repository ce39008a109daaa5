"""Attention to what a strategy selects, and to block lists."""

from typing import Literal, TypedDict, Unpack, overload

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.block_mask import BlockMask
from sparseattn_jax.checks import (
    check_block_mask,
    check_causal,
    check_kv,
    check_kv_lengths,
    check_pattern,
    check_qk,
    check_scale,
    check_segment_ids,
    checked,
)
from sparseattn_jax.kernels import block_sparse_attention as kernel
from sparseattn_jax.kernels.attention_union import union
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.kernels.column_attention import column_attention
from sparseattn_jax.pattern import HeadWindows, SparsePattern, TokenColumns
from sparseattn_jax.strategies.protocol import Strategy

type Out = Float[Array, "B T N H"]
type OutAndLse = tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]


class _Options(TypedDict, total=False):
    kv_lengths: Int32[Array, " B"] | None
    segment_ids: Int32[Array, "B S"] | None
    backend: Backend | None


class _AttentionOptions(_Options, total=False):
    scale: float | None


class PrefillOptions(_Options, total=False):
    """What every prefill function takes by name, beside `return_lse`."""

    is_causal: bool


@overload
def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    strategy: Strategy,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[PrefillOptions],
) -> Out: ...


@overload
def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    strategy: Strategy,
    *,
    return_lse: Literal[True],
    **options: Unpack[PrefillOptions],
) -> OutAndLse: ...


@checked(check_qk, check_kv, check_causal, check_kv_lengths, check_segment_ids)
def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    strategy: Strategy,
    *,
    is_causal: bool = True,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Out | OutAndLse:
    """Attention over the keys that a strategy selects, differentiable in q, k and v.

    Args:
        q: queries, at the end of the keys if causal. Head n reads kv head n // (N // K).
        k: keys.
        v: values.
        strategy: selects the keys; the selection has no gradient. How many blocks a capacity of
            its own dropped is said by the pattern of its `select` alone.
        is_causal: whether a query sees keys up to its own position only.
        kv_lengths: valid keys of each sequence; the rest is padding, of any finite value.
        segment_ids: a query sees keys of its own segment only.
        return_lse: whether to return the log-sum-exp too.
        backend: of the attention; the selection takes the best backend that runs.

    Returns:
        The output in q's dtype, or (output, log-sum-exp).

    Raises:
        ValueError: an argument is out of range or does not fit the others.
        UnsupportedError: the named backend cannot run this call.
    """
    pattern = strategy.select(
        q, k, is_causal=is_causal, kv_lengths=kv_lengths, segment_ids=segment_ids
    )
    return sparse_attention(
        q,
        k,
        v,
        pattern,
        kv_lengths=kv_lengths,
        segment_ids=segment_ids,
        return_lse=return_lse,
        backend=backend,
    )


@overload
def sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    pattern: SparsePattern,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_AttentionOptions],
) -> Out: ...


@overload
def sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    pattern: SparsePattern,
    *,
    return_lse: Literal[True],
    **options: Unpack[_AttentionOptions],
) -> OutAndLse: ...


@checked(check_qk, check_kv, check_scale, check_kv_lengths, check_segment_ids, check_pattern)
def sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    pattern: SparsePattern,
    *,
    scale: float | None = None,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Out | OutAndLse:
    """Attention over a pattern that a strategy selected; see `block_sparse_attention`.

    Blocks and columns are attended to each by a kernel of its own; a key that both list counts
    once. A named backend must run both.
    """
    out, lse = _attend(
        *(q, k, v, pattern.blocks, pattern.columns, pattern.windows),
        scale=scale,
        kv_lengths=kv_lengths,
        segment_ids=segment_ids,
        backend=backend,
    )
    return (out, lse) if return_lse else out


@overload
def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_mask: BlockMask,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_AttentionOptions],
) -> Out: ...


@overload
def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_mask: BlockMask,
    *,
    return_lse: Literal[True],
    **options: Unpack[_AttentionOptions],
) -> OutAndLse: ...


@checked(check_qk, check_kv, check_scale, check_kv_lengths, check_segment_ids, check_block_mask)
def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Out | OutAndLse:
    """Attention over the listed blocks; cost and gradients in proportion to their number.

    Args:
        q: queries, at the end of the keys if the mask is causal. Head n reads kv head
            n // (N // K).
        k: keys.
        v: values.
        block_mask: the listed blocks. A query that sees no key has output 0, log-sum-exp -inf.
        scale: positive factor of the logits, by default head_dim ** -0.5.
        kv_lengths: valid keys of each sequence; the rest is padding, of any finite value.
            Of causal calls the queries at padded positions are padding too and see nothing.
        segment_ids: a query sees keys of its own segment only.
        return_lse: whether to return the log-sum-exp too.
        backend: of forward and backward; by default the best that can run. The last bits of q's
            gradient by `mosaic_sm90` may differ from run to run; those of `xla` never do.

    Returns:
        The output in q's dtype, or (output, log-sum-exp).

    Raises:
        ValueError: an argument does not fit the others, or the mask is of other lengths.
        UnsupportedError: the named backend cannot run this call.
    """
    out, lse = _attend(
        *(q, k, v, block_mask),
        scale=scale,
        kv_lengths=kv_lengths,
        segment_ids=segment_ids,
        backend=backend,
    )
    return (out, lse) if return_lse else out


def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    blocks: BlockMask,
    columns: TokenColumns | None = None,
    windows: HeadWindows | None = None,
    *,
    scale: float | None,
    **options: Unpack[_Options],
) -> OutAndLse:
    lists = blocks.kv_indices, blocks.kv_num_blocks
    geometry = {
        "block_q": blocks.block_q,
        "block_kv": blocks.block_kv,
        "is_causal": blocks.is_causal,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
    }
    of_blocks = kernel.block_sparse_attention(
        *(q, k, v, *lists),
        windows=None if windows is None else jnp.stack([windows.sinks, windows.recents]),
        **geometry,
        **options,
    )
    if columns is None:
        return of_blocks
    of_columns = column_attention(
        *(q, k, v, columns.indices, columns.counts, *lists), **geometry, **options
    )
    return union(of_blocks, of_columns)
