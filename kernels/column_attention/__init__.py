"""Attention to single key columns, each query head's own: out = softmax(scale * q k^T) v over them.

The columns of head n are the keys columns[b, n, :num_columns[b, n]], the same for all its queries.
They go with the block lists of `kernels/block_sparse_attention`, and a key that both hold counts
there: with L = kv_lengths[b] (S by default), query i at position p = i + S - T sees column j iff
j < L; if causal, j <= p and p < L; with segment ids, those of j and p agree; and key block
j // block_kv is not listed for query block i // block_q. A query that sees nothing has output 0,
log-sum-exp -inf and gradient 0. `kernels/attention_union.py` joins both results.

The cost is that of T * C pairs, C the columns of a head, however they are spread over the keys.

There is no Hopper kernel yet. It would read the gathered columns in tiles, as
`block_sparse_attention` reads key blocks, under a mask of one bit per query block and column.

Source: the vertical columns of MInference (arXiv:2407.02490), appendix C.4.
"""

from collections.abc import Mapping

from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.kernels.attention_gradients import attend
from sparseattn_jax.kernels.backends import (
    Backend,
    DeviceFacts,
    Implementation,
    choose,
    device_facts,
    never_refuses,
)
from sparseattn_jax.kernels.column_attention import xla

_FORWARD: Mapping[Backend, Implementation[DeviceFacts]] = {
    "xla": Implementation(xla.run, never_refuses),
}
_BACKWARD: Mapping[Backend, Implementation[DeviceFacts]] = {
    "xla": Implementation(xla.run_vjp, never_refuses),
}


def column_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    columns: Int32[Array, "B N C"],
    num_columns: Int32[Array, "B N"],
    kv_indices: Int32[Array, "B #N Tb M"],
    kv_num_blocks: Int32[Array, "B #N Tb"],
    *,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    workspace_bytes: int = 2**27,
    backend: Backend | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Attends to the columns outside the listed blocks; differentiable in q, k and v.

    Args:
        q: queries; head n reads kv head n // (N // K).
        k: keys.
        v: values.
        columns: key positions of each query head, all different, in any order.
        num_columns: how many of them count; the others may be any position.
        kv_indices: lists of the key blocks whose columns are left out, per query block.
        kv_num_blocks: how many entries of each list count.
        block_q: queries per query block.
        block_kv: keys per key block.
        is_causal: whether a query sees keys up to its own position only.
        scale: factor of the logits.
        kv_lengths: valid keys of each sequence, by default all.
        segment_ids: per key position; a query sees keys of its own segment only.
        workspace_bytes: memory for the scores that exist at one time, and for each of their few
            copies; those of one query block do in any case.
        backend: what runs, forward and backward; by default `xla`, deterministic to the bit.

    Returns:
        The output in q's dtype, and the natural log-sum-exp of the scaled logits.

    Raises:
        UnsupportedError: the named backend cannot run this call.
    """
    facts = device_facts(q, k, v)
    return attend(
        choose(_FORWARD, backend, facts),
        choose(_BACKWARD, backend, facts),
        *(q, k, v, columns, num_columns, kv_indices, kv_num_blocks, kv_lengths, segment_ids),
        block_q=block_q,
        block_kv=block_kv,
        is_causal=is_causal,
        scale=scale,
        workspace_bytes=workspace_bytes,
    )
