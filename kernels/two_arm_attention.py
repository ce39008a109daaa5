"""Two arms in one sweep: attention over block lists, and over a part of their blocks.

    outer = softmax(scale * q k^T, over the visible keys of all listed blocks) v
    inner = the same over the visible keys of the inner lists, whose blocks count as outer ones too

Training a gate between full and streaming attention needs both. The sweep attends to the inner
blocks and to the remaining ones, each block once, forward and backward. The outer arm is the union
of these two disjoint sets of keys (`kernels/attention_union.py`).

It reaches the inner blocks' gradient as one of `inner` and of `lse_i`, so that these blocks too are
visited once, whatever the arms' cotangents.

Source: the gates are PruLong's (arXiv:2506.17121), equation 1.
"""

from jaxtyping import Array, Float, Int32

from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.attention_union import Arm, union
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.kernels.block_sparse_attention import block_sparse_attention


def two_arm_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    kv_indices: Int32[Array, "B #N Tb M"],
    kv_num_blocks: Int32[Array, "B #N Tb"],
    inner_indices: Int32[Array, "B #N Tb inner"],
    inner_num_blocks: Int32[Array, "B #N Tb"],
    *,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    backend: Backend | None = None,
) -> tuple[Arm, Arm]:
    """Both arms; differentiable in q, k and v, through outputs and log-sum-exps.

    Args:
        q: queries; head n reads kv head n // (N // K).
        k: keys.
        v: values.
        kv_indices: the outer lists, per query block, of key blocks.
        kv_num_blocks: how many entries of each count.
        inner_indices: the inner lists; either pair may be shared by all heads.
        inner_num_blocks: how many entries of each count.
        block_q: queries per query block.
        block_kv: keys per key block.
        is_causal: whether a query sees keys up to its own position only.
        scale: factor of the logits.
        kv_lengths: valid keys of each sequence, by default all.
        segment_ids: per key position; a query sees keys of its own segment only.
        backend: of both parts of the sweep; see `block_sparse_attention`.

    Returns:
        (output in q's dtype, natural log-sum-exp) of the outer arm, and of the inner one. The
        outer output is rounded to q's dtype once more than `block_sparse_attention`'s.

    Raises:
        UnsupportedError: the named backend cannot run this call.
    """
    num_blocks = -(-k.shape[1] // block_kv)
    is_outer = block_lists.to_dense(kv_indices, kv_num_blocks, num_blocks)
    is_inner = block_lists.to_dense(inner_indices, inner_num_blocks, num_blocks)
    rest_lists = block_lists.from_dense(is_outer & ~is_inner)
    inner, rest = (
        block_sparse_attention(
            q,
            k,
            v,
            *lists,
            block_q=block_q,
            block_kv=block_kv,
            is_causal=is_causal,
            scale=scale,
            kv_lengths=kv_lengths,
            segment_ids=segment_ids,
            backend=backend,
        )
        for lists in ((inner_indices, inner_num_blocks), rest_lists)
    )
    return union(inner, rest), inner
