"""Prefill by name: a strategy's parameters and the operands in one call."""

from typing import Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.attention import Out, OutAndLse, PrefillOptions, prefill_attention
from sparseattn_jax.checks import (
    check_causal,
    check_kv,
    check_kv_lengths,
    check_qk,
    check_segment_ids,
    check_share,
    check_threshold,
    checked,
)
from sparseattn_jax.head_patterns import HeadPatterns
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.strategies.flex_prefill import FlexPrefill
from sparseattn_jax.strategies.minference import MInference
from sparseattn_jax.strategies.streaming import Streaming
from sparseattn_jax.strategies.xattention import XAttention


class _XAttentionOptions(PrefillOptions, total=False):
    threshold: float | Float32[Array, ""] | Float32[Array, " N"]
    stride: int
    block_size: int


class _FlexPrefillOptions(PrefillOptions, total=False):
    gamma: float | Float32[Array, ""] | Float32[Array, " N"]
    tau: float | Float32[Array, ""]
    min_budget: int | None
    max_budget: int | None
    sparsity_ratio: float | Float32[Array, ""] | None
    block_size: int
    per_row: bool
    gqa_interleave: bool


class _MInferenceOptions(PrefillOptions, total=False):
    vertical_size: int
    slash_size: int
    adaptive_budget: float | None
    heads: HeadPatterns | None
    block_size: int


class _StreamingOptions(PrefillOptions, total=False):
    sink_size: int
    recent_size: int
    block_size: int
    exact: bool


@overload
def xattention_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_XAttentionOptions],
) -> Out: ...


@overload
def xattention_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    return_lse: Literal[True],
    **options: Unpack[_XAttentionOptions],
) -> OutAndLse: ...


@checked(check_qk, check_kv, check_causal, check_threshold, check_kv_lengths, check_segment_ids)
def xattention_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    threshold: float | Float32[Array, ""] | Float32[Array, " N"] = 0.95,
    stride: int = 16,
    block_size: int = 128,
    is_causal: bool = True,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Out | OutAndLse:
    """Attention over the key blocks that antidiagonal scores select (arXiv:2503.16428).

    Args:
        q: queries, at the end of the keys if causal. Head n reads kv head n // (N // K).
        k: keys.
        v: values.
        threshold: share of the estimated softmax mass to keep, in [0, 1]; one for all heads or
            one per head. 1 keeps every visible block, 0 the first and the diagonal ones.
        stride: tokens per antidiagonal; divides block_size. Scoring costs 1/stride of q k^T.
        block_size: queries and keys per block.
        is_causal: whether a query sees keys up to its own position only.
        kv_lengths: valid keys of each sequence; the rest is padding, of any finite value.
        segment_ids: a query sees keys of its own segment only; needs is_causal.
        return_lse: whether to return the log-sum-exp too.
        backend: see `prefill_attention`.

    Returns:
        The output in q's dtype, or (output, log-sum-exp).

    Raises:
        ValueError: an argument is out of range or does not fit the others.
        UnsupportedError: the named backend, or packed sequences, cannot be run.
    """
    strategy = XAttention(threshold=threshold, stride=stride, block_size=block_size)
    return prefill_attention(
        q,
        k,
        v,
        strategy,
        is_causal=is_causal,
        kv_lengths=kv_lengths,
        segment_ids=segment_ids,
        return_lse=return_lse,
        backend=backend,
    )


@overload
def flexprefill_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_FlexPrefillOptions],
) -> Out: ...


@overload
def flexprefill_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    return_lse: Literal[True],
    **options: Unpack[_FlexPrefillOptions],
) -> OutAndLse: ...


def _check_gamma(q: jax.Array, gamma: float | jax.Array) -> None:
    check_share(q, gamma=gamma)


@checked(check_qk, check_kv, check_causal, _check_gamma, check_kv_lengths, check_segment_ids)
def flexprefill_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    gamma: float | Float32[Array, ""] | Float32[Array, " N"] = 0.9,
    tau: float | Float32[Array, ""] = 0.1,
    min_budget: int | None = None,
    max_budget: int | None = None,
    sparsity_ratio: float | Float32[Array, ""] | None = None,
    block_size: int = 128,
    per_row: bool = False,
    gqa_interleave: bool = False,
    is_causal: bool = True,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Out | OutAndLse:
    """Attention over the key blocks that FlexPrefill selects (arXiv:2502.20766).

    Args:
        q: queries, at the end of the keys. Head n reads kv head n // (N // K), see also
            gqa_interleave.
        k: keys.
        v: values.
        gamma: share of the mass to hold, in [0, 1]; one for all heads or one per query head.
        tau: distance below which pooled scores decide; 0 for none of the heads.
        min_budget: tokens of columns, and of slashes, at least.
        max_budget: tokens of columns, and of slashes, at most.
        sparsity_ratio: share of the visible blocks that a head lists at most, in [0, 1], or None.
        block_size: queries and keys per block.
        per_row: whether pooled scores are to hold gamma of each row's, not of all rows' together.
        gqa_interleave: whether query head n reads kv head n % K, as in ChatGLM.
        is_causal: must be true: the last queries decide.
        kv_lengths: valid keys of each sequence; the rest is padding, of any finite value.
        segment_ids: packed sequences; FlexPrefill does not take them.
        return_lse: whether to return the log-sum-exp too.
        backend: see `prefill_attention`.

    Returns:
        The output in q's dtype, or (output, log-sum-exp).

    Raises:
        ValueError: an argument is out of range or does not fit the others.
        UnsupportedError: the named backend, or packed sequences, cannot be run.
    """
    # The strategy and the attention take the heads of one kv head together.
    heads = np.arange(q.shape[2]).reshape(-1, k.shape[2]).T.ravel()
    if gqa_interleave:
        q, gamma = q[:, :, heads], jnp.broadcast_to(gamma, heads.shape)[heads]
    strategy = FlexPrefill(
        gamma=gamma,
        tau=tau,
        min_budget=min_budget,
        max_budget=max_budget,
        sparsity_ratio=sparsity_ratio,
        block_size=block_size,
        per_row=per_row,
    )
    out = prefill_attention(
        q,
        k,
        v,
        strategy,
        is_causal=is_causal,
        kv_lengths=kv_lengths,
        segment_ids=segment_ids,
        return_lse=return_lse,
        backend=backend,
    )
    if gqa_interleave:
        out = jax.tree.map(lambda x: x[:, :, np.argsort(heads)], out)
    return out


@overload
def minference_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_MInferenceOptions],
) -> Out: ...


@overload
def minference_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    return_lse: Literal[True],
    **options: Unpack[_MInferenceOptions],
) -> OutAndLse: ...


@checked(check_qk, check_kv, check_causal, check_kv_lengths, check_segment_ids)
def minference_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    vertical_size: int = 1000,
    slash_size: int = 6096,
    adaptive_budget: float | None = None,
    heads: HeadPatterns | None = None,
    block_size: int = 64,
    is_causal: bool = True,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Out | OutAndLse:
    """Attention over key columns and slashes, or what each head's pattern says (arXiv:2407.02490).

    Up to some 7,000 keys the default sizes select everything.

    Args:
        q: queries, at the end of the keys. Head n reads kv head n // (N // K).
        k: keys.
        v: values.
        vertical_size: single keys that all queries of a head see, 30 at least.
        slash_size: distances at which all queries of a head see keys, in blocks; 50 at least.
        adaptive_budget: share of the valid keys, in (0, 1]: a fifth of it are columns, the rest
            distances. Replaces both sizes; None for no such share.
        heads: kind and sizes of each query head, by default those above for all.
        block_size: queries and keys per block.
        is_causal: must be true: the last queries decide.
        kv_lengths: valid keys of each sequence; the rest is padding, of any finite value.
        segment_ids: packed sequences; MInference does not take them.
        return_lse: whether to return the log-sum-exp too.
        backend: see `prefill_attention`.

    Returns:
        The output in q's dtype, or (output, log-sum-exp).

    Raises:
        ValueError: an argument is out of range or does not fit the others.
        UnsupportedError: the named backend, or packed sequences, cannot be run.
    """
    strategy = MInference(
        vertical_size=vertical_size,
        slash_size=slash_size,
        adaptive_budget=adaptive_budget,
        heads=heads,
        block_size=block_size,
    )
    return prefill_attention(
        q,
        k,
        v,
        strategy,
        is_causal=is_causal,
        kv_lengths=kv_lengths,
        segment_ids=segment_ids,
        return_lse=return_lse,
        backend=backend,
    )


@overload
def streaming_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_StreamingOptions],
) -> Out: ...


@overload
def streaming_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    return_lse: Literal[True],
    **options: Unpack[_StreamingOptions],
) -> OutAndLse: ...


@checked(check_qk, check_kv, check_causal, check_kv_lengths, check_segment_ids)
def streaming_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    sink_size: int = 128,
    recent_size: int = 1024,
    block_size: int = 128,
    exact: bool = False,
    is_causal: bool = True,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Out | OutAndLse:
    """Attention to the first and the most recent keys (arXiv:2309.17453); see `Streaming`.

    Args:
        q: queries, at the end of the keys. Head n reads kv head n // (N // K).
        k: keys.
        v: values.
        sink_size: first keys that every query sees; 0 for none.
        recent_size: keys before and at each query's position.
        block_size: queries and keys per block.
        exact: whether the sizes hold to the token; by default they are those of whole blocks.
        is_causal: must be true: a window looks back.
        kv_lengths: valid keys of each sequence; the rest is padding, of any finite value.
        segment_ids: a query sees keys of its own segment only, and that segment's sinks; not for
            exact sinks.
        return_lse: whether to return the log-sum-exp too.
        backend: see `prefill_attention`.

    Returns:
        The output in q's dtype, or (output, log-sum-exp).

    Raises:
        ValueError: an argument is out of range or does not fit the others.
        UnsupportedError: the named backend cannot run this call.
    """
    return prefill_attention(
        q,
        k,
        v,
        Streaming(sink_size=sink_size, recent_size=recent_size, block_size=block_size, exact=exact),
        is_causal=is_causal,
        kv_lengths=kv_lengths,
        segment_ids=segment_ids,
        return_lse=return_lse,
        backend=backend,
    )
