"""Attention to the first and the most recent tokens, exact to the token.

Query i stands at position p = i + S - T. With L = kv_lengths[b] (S by default), key j is visible to
query i iff

    j <= p < L    and    (j < sink or j > p - recent).

`recent` counts the query's own token: with recent = 1 and no sinks a query sees itself only. A key
that is both a sink and recent counts once. out = softmax(scale * q k^T, over the visible keys) v. A
query that sees nothing has output 0, log-sum-exp -inf and gradient 0.

Source: StreamingLLM (arXiv:2309.17453), with the exact streaming mask of Block-Sparse-Attention
(Guo et al., 2024).
"""

from collections.abc import Mapping

from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.kernels.attention_gradients import attend
from sparseattn_jax.kernels.backends import (
    Backend,
    Implementation,
    choose,
    device_facts,
    never_refuses,
)
from sparseattn_jax.kernels.streaming_attention import mosaic_sm90, xla
from sparseattn_jax.kernels.streaming_attention.tiling import CallFacts

_FORWARD: Mapping[Backend, Implementation[CallFacts]] = {
    "mosaic_sm90": Implementation(mosaic_sm90.run, mosaic_sm90.refusal),
    "xla": Implementation(xla.run, never_refuses),
}
_BACKWARD: Mapping[Backend, Implementation[CallFacts]] = {
    "mosaic_sm90": Implementation(mosaic_sm90.run_vjp, mosaic_sm90.refusal),
    "xla": Implementation(xla.run_vjp, never_refuses),
}


def streaming_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    sink_size: int,
    recent_size: int,
    sink_sizes: Int32[Array, " N"] | None = None,
    recent_sizes: Int32[Array, " N"] | None = None,
    kv_lengths: Int32[Array, " B"] | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Attends to sinks and a window; differentiable in q, k and v.

    Time, forward and backward, is O(T * (sink_size + recent_size)).

    Args:
        q: queries; head n reads kv head n // (N // K).
        k: keys.
        v: values.
        sink_size: first keys that every query sees; 0 for none. May exceed S.
        recent_size: keys up to each query's own, that one included. May exceed S.
        sink_sizes: sink_size of each query head, which then bounds it: what is more counts as
            sink_size, what is negative as 0. By default sink_size.
        recent_sizes: recent_size of each query head, likewise. A head with 0 sees its sinks only,
            from its first query on.
        kv_lengths: valid keys of each sequence, by default all. What follows in k and v is
            padding, which may hold any finite value.
        scale: factor of the logits, by default H ** -0.5.
        backend: what runs, forward and backward; by default the best that can. The last bits of
            q's gradient by `mosaic_sm90` may differ from run to run; those of `xla` never do.

    Returns:
        The output in q's dtype, and the natural log-sum-exp of the scaled logits.

    Raises:
        ValueError: sink_size is negative, recent_size is not positive, or T exceeds S.
        UnsupportedError: the named backend cannot run this call.
    """
    _check(sink_size, recent_size, q_len=q.shape[1], kv_len=k.shape[1])
    facts = CallFacts(device=device_facts(q, k, v), dtype=q.dtype, head_dim=q.shape[3])
    return attend(
        choose(_FORWARD, backend, facts),
        choose(_BACKWARD, backend, facts),
        *(q, k, v, sink_sizes, recent_sizes, kv_lengths),
        sink_size=sink_size,
        recent_size=recent_size,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
    )


def _check(sink_size: int, recent_size: int, *, q_len: int, kv_len: int) -> None:
    if sink_size < 0:
        raise ValueError(f"sink_size={sink_size} must not be negative; pass 0 for no sinks")
    if recent_size < 1:
        raise ValueError(
            f"recent_size={recent_size} must be positive, it counts the query's own token; "
            "for heads without a window pass 0 in recent_sizes"
        )
    if q_len > kv_len:
        raise ValueError(
            f"q has {q_len} tokens and k only {kv_len}: the last query stands at the last key; "
            "pass no more queries than keys"
        )
