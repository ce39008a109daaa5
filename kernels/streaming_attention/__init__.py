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

import dataclasses
import functools
from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.kernels.backends import (
    Backend,
    DeviceFacts,
    Implementation,
    choose,
    device_facts,
    never_refuses,
)
from sparseattn_jax.kernels.streaming_attention import xla

_FORWARD: Mapping[Backend, Implementation[DeviceFacts]] = {
    "xla": Implementation(xla.run, never_refuses),
}
_BACKWARD: Mapping[Backend, Implementation[DeviceFacts]] = {
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
        backend: what runs, forward and backward; by default the best that can.

    Returns:
        The output in q's dtype, and the natural log-sum-exp of the scaled logits.

    Raises:
        ValueError: sink_size is negative, recent_size is not positive, or T exceeds S.
        UnsupportedError: the named backend cannot run this call.
    """
    _check(sink_size, recent_size, q_len=q.shape[1], kv_len=k.shape[1])
    facts = device_facts(q, k, v)
    call = _Call(
        forward=choose(_FORWARD, backend, facts),
        backward=choose(_BACKWARD, backend, facts),
        sink_size=sink_size,
        recent_size=recent_size,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
    )
    return _attend(call, q, k, v, sink_sizes, recent_sizes, kv_lengths)


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


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of a call."""

    forward: Implementation[DeviceFacts]
    backward: Implementation[DeviceFacts]
    sink_size: int
    recent_size: int
    scale: float

    def options(self) -> dict[str, int | float]:
        return {
            "sink_size": self.sink_size,
            "recent_size": self.recent_size,
            "scale": self.scale,
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, *operands: Array | None) -> tuple[Array, Array]:
    return call.forward.run(*operands, **call.options())


def _attend_fwd(call: _Call, *operands: Array | None) -> tuple[tuple[Array, Array], tuple]:
    out, lse = _attend(call, *operands)  # pyright: ignore[reportGeneralTypeIssues]
    return (out, lse), (*operands, out, lse)


def _attend_bwd(call: _Call, residuals: tuple, cotangents: tuple[Array, Array]) -> tuple:
    d_q, d_k, d_v = call.backward.run(*residuals, *cotangents, **call.options())
    return d_q, d_k, d_v, None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
