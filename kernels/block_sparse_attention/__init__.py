"""Attention over listed key blocks: out = softmax(scale * q k^T, over the visible listed keys) v.

Query i stands at position p = i + S - T. With L = kv_lengths[b] (S by default), key j of a listed
block is visible to query i iff j < L; if causal, j <= p and p < L; with segment ids, those of
j and p agree; in a head with a window, j < sink or j > p - recent. A query that sees nothing has
output 0, log-sum-exp -inf and gradient 0.

Source: FlashAttention-2 (arXiv:2307.08691) over the block lists of Block-Sparse-Attention
(Guo et al., 2024).
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.kernels.attention_gradients import attend
from sparseattn_jax.kernels.backends import (
    Backend,
    Implementation,
    choose,
    device_facts,
    never_refuses,
)
from sparseattn_jax.kernels.block_sparse_attention import mosaic_sm90, mosaic_sm90_vjp, xla
from sparseattn_jax.kernels.block_sparse_attention.tiling import CallFacts

_FORWARD: Mapping[Backend, Implementation[CallFacts]] = {
    "mosaic_sm90": Implementation(mosaic_sm90.run, mosaic_sm90.refusal),
    "xla": Implementation(xla.run, never_refuses),
}
_BACKWARD: Mapping[Backend, Implementation[CallFacts]] = {
    "mosaic_sm90": Implementation(mosaic_sm90_vjp.run, mosaic_sm90_vjp.refusal),
    "xla": Implementation(xla.run_vjp, never_refuses),
}


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    kv_indices: Int32[Array, "B #N Tb M"],
    kv_num_blocks: Int32[Array, "B #N Tb"],
    *,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    windows: Int32[Array, "2 N"] | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Attends to the listed blocks; differentiable in q, k and v.

    Args:
        q: queries; head n reads kv head n // (N // K).
        k: keys.
        v: values.
        kv_indices: the lists of `kernels/block_lists.py`, per query block, of key blocks.
        kv_num_blocks: how many entries of each list count.
        block_q: queries per query block.
        block_kv: keys per key block.
        is_causal: whether a query sees keys up to its own position only.
        scale: factor of the logits.
        kv_lengths: valid keys of each sequence, by default all. What follows in k and v is
            padding, which may hold any finite value.
        segment_ids: per key position; a query sees keys of its own segment only.
        windows: the sink size of each query head, then the recent size of each: of the listed
            keys a query sees only the first `sink` of the sequence and the last `recent` up to
            its own, that one included. A head whose recent size is S has no window. Full,
            block-sparse and streaming heads are one call: full ones list every block, streaming
            ones those of their sinks and windows.
        backend: what runs, forward and backward; by default the best that can. The last bits of
            q's gradient by `mosaic_sm90` may differ from run to run; those of `xla` never do.

    Returns:
        The output in q's dtype, and the natural log-sum-exp of the scaled logits.

    Raises:
        ValueError: windows without is_causal.
        UnsupportedError: the named backend cannot run this call.
    """
    if windows is not None:
        if not is_causal:
            raise ValueError(
                "is_causal=False: windows look back from each query; "
                "pass is_causal=True, or windows=None"
            )
        windows = jnp.clip(windows, 0, k.shape[1])
    facts = CallFacts(
        device=device_facts(q, k, v),
        dtype=q.dtype,
        head_dim=q.shape[-1],
        block_q=block_q,
        block_kv=block_kv,
        has_segment_ids=segment_ids is not None,
    )
    return attend(
        choose(_FORWARD, backend, facts),
        choose(_BACKWARD, backend, facts),
        *(q, k, v, kv_indices, kv_num_blocks, kv_lengths, segment_ids, windows),
        block_q=block_q,
        block_kv=block_kv,
        is_causal=is_causal,
        scale=scale,
    )
