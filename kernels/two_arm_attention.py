"""Two arms in one sweep: attention over block lists, and over a part of their blocks.

    outer = softmax(scale * q k^T, over the visible keys of all listed blocks) v
    inner = the same over the visible keys of the inner lists, whose blocks count as outer ones too

Training a gate between full and streaming attention needs both. The sweep attends to the inner
blocks and to the remaining ones, each block once, forward and backward. With (inner, lse_i) and
(rest, lse_r) of these two disjoint sets of keys, the outer arm is their mean weighted by the
softmax mass of each set (the split softmax of Flash-Decoding and Ring Attention):

    lse_o = log(exp(lse_i) + exp(lse_r))
    outer = exp(lse_i - lse_o) * inner + exp(lse_r - lse_o) * rest

It reaches the inner blocks' gradient as one of `inner` and of `lse_i`, so that these blocks too are
visited once, whatever the arms' cotangents.

Source: the gates are PruLong's (arXiv:2506.17121), equation 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.kernels.block_sparse_attention import block_sparse_attention

type Arm = tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]


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
    return _union(inner, rest), inner


def _union(a: Arm, b: Arm) -> Arm:
    """Attention over the union of two disjoint sets of keys."""
    (a_out, a_lse), (b_out, b_lse) = a, b
    highest = jax.lax.stop_gradient(jnp.maximum(a_lse, b_lse))
    shift = jnp.where(jnp.isneginf(highest), 0.0, highest)
    a_mass, b_mass = jnp.exp(a_lse - shift), jnp.exp(b_lse - shift)
    total = a_mass + b_mass
    is_empty = total == 0.0
    divisor = jnp.where(is_empty, 1.0, total)
    out = (a_mass / divisor)[..., None] * a_out.astype(jnp.float32)
    out += (b_mass / divisor)[..., None] * b_out.astype(jnp.float32)
    lse = jnp.where(is_empty, -jnp.inf, shift + jnp.log(divisor))
    return out.astype(a_out.dtype), lse
