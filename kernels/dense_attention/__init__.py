"""Dense attention with any mask: out = softmax(scale * q k^T + mask, over the visible keys) v.

Query i stands at position p = i + S - T. With L = kv_lengths[b] (S by default), key j is visible to
query i iff j < L; if causal, j <= p and p < L; with segment ids, those of j and p agree; and where
the mask is boolean, it is true. An additive mask is added to the scaled logits, -inf hides a key. A
query that sees nothing has output 0, log-sum-exp -inf and gradient 0.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.kernels.backends import (
    Backend,
    Implementation,
    choose,
    device_facts,
    never_refuses,
)
from sparseattn_jax.kernels.dense_attention import cudnn, xla
from sparseattn_jax.kernels.dense_attention.cudnn import CallFacts

_TABLE: Mapping[Backend, Implementation[CallFacts]] = {
    "cudnn": Implementation(cudnn.run, cudnn.refusal),
    "xla": Implementation(xla.run, never_refuses),
}


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    is_causal: bool,
    scale: float,
    mask: Bool[Array, "#B #N T S"] | Float[Array, "#B #N T S"] | None = None,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    needs_lse: bool = True,
    backend: Backend | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"] | None]:
    """Attends to all visible keys; differentiable in q, k, v and an additive mask.

    Args:
        q: queries; head n reads kv head n // (N // K).
        k: keys.
        v: values.
        is_causal: whether a query sees keys up to its own position only.
        scale: factor of the logits.
        mask: which keys a query sees, or what is added to its logits.
        kv_lengths: valid keys of each sequence, by default all. What follows in k and v is
            padding, which may hold any finite value.
        segment_ids: per key position; a query sees keys of its own segment only.
        needs_lse: whether the log-sum-exp is asked for, which `cudnn` cannot give.
        backend: what runs, forward and backward; by default the best that can.

    Returns:
        The output in q's dtype, and the natural log-sum-exp; None if it was not asked for.

    Raises:
        UnsupportedError: the named backend cannot run this call.
    """
    facts = call_facts(
        q,
        k,
        is_causal=is_causal,
        has_masks=any(x is not None for x in (mask, kv_lengths, segment_ids)),
        needs_lse=needs_lse,
    )
    out, lse = choose(_TABLE, backend, facts).run(
        q, k, v, mask, kv_lengths, segment_ids, is_causal=is_causal, scale=scale
    )
    return out, lse if needs_lse else None


def call_facts(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    is_causal: bool,
    has_masks: bool,
    needs_lse: bool,
) -> CallFacts:
    """What a backend needs to know of a call; `has_masks` if anything but causality hides keys."""
    return CallFacts(
        device=device_facts(q, k),
        dtype=jnp.dtype(q.dtype),
        head_dim=q.shape[-1],
        is_shifted=is_causal and q.shape[1] != k.shape[1],
        has_masks=has_masks,
        needs_lse=needs_lse,
    )
