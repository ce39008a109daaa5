"""Dense attention, with any mask: the peer of every sparse one."""

from typing import Literal, Unpack, overload

from jaxtyping import Array, Bool, Float, Int32

from sparseattn_jax.attention import Out, OutAndLse, PrefillOptions, prefill_attention
from sparseattn_jax.checks import (
    check_causal,
    check_kv,
    check_kv_lengths,
    check_mask,
    check_qk,
    check_segment_ids,
    checked,
    mask_shape,
)
from sparseattn_jax.kernels import dense_attention as dense
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.strategies.full import Full

type Mask = (
    Bool[Array, "T S"]
    | Bool[Array, "#B T S"]
    | Bool[Array, "#B #N T S"]
    | Float[Array, "T S"]
    | Float[Array, "#B T S"]
    | Float[Array, "#B #N T S"]
)
"""Which keys a query sees, or what is added to its scaled logits."""


class _FullOptions(PrefillOptions, total=False):
    mask: Mask | None


@overload
def full_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_FullOptions],
) -> Out: ...


@overload
def full_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    return_lse: Literal[True],
    **options: Unpack[_FullOptions],
) -> OutAndLse: ...


@checked(check_qk, check_kv, check_causal, check_mask, check_kv_lengths, check_segment_ids)
def full_prefill(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask | None = None,
    is_causal: bool = True,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Out | OutAndLse:
    """Dense attention, with any mask; differentiable in q, k, v and an additive mask.

    Args:
        q: queries, at the end of the keys if causal. Head n reads kv head n // (N // K).
        k: keys.
        v: values.
        mask: [T, S], [B, T, S] or [B, N, T, S], where B and N may be 1. Boolean: true where the
            query sees the key. Floating: added to the scaled logits, -inf hides a key. What
            causality, lengths or segments hide stays hidden. A query that sees nothing has
            output 0.
        is_causal: whether a query sees keys up to its own position only; False with a mask that
            says everything.
        kv_lengths: valid keys of each sequence; the rest is padding, of any finite value.
        segment_ids: a query sees keys of its own segment only.
        return_lse: whether to return the log-sum-exp too.
        backend: by default `cudnn` where it means the same (T = S or not causal, no masks, no
            log-sum-exp), otherwise the block-sparse kernel over all blocks; with a mask `xla`.

    Returns:
        The output in q's dtype, or (output, log-sum-exp).

    Raises:
        ValueError: an argument does not fit the others.
        UnsupportedError: the named backend cannot run this call.
    """
    facts = dense.call_facts(
        q,
        k,
        is_causal=is_causal,
        has_masks=any(x is not None for x in (mask, kv_lengths, segment_ids)),
        needs_lse=return_lse,
    )
    if mask is None and backend != "cudnn" and (backend or dense.cudnn.refusal(facts)):
        return prefill_attention(
            q,
            k,
            v,
            Full(),
            is_causal=is_causal,
            kv_lengths=kv_lengths,
            segment_ids=segment_ids,
            return_lse=return_lse,
            backend=backend,
        )
    out, lse = dense.dense_attention(
        q,
        k,
        v,
        mask=None if mask is None else mask.reshape(mask_shape(mask)),
        is_causal=is_causal,
        scale=q.shape[-1] ** -0.5,
        kv_lengths=kv_lengths,
        segment_ids=segment_ids,
        needs_lse=return_lse,
        backend=backend,
    )
    return out if lse is None else (out, lse)
