"""How good a selection is: the softmax mass that it keeps, and the error of its output."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.attention import block_sparse_attention
from sparseattn_jax.block_mask import BlockMask
from sparseattn_jax.checks import (
    check_block_mask,
    check_kv_lengths,
    check_qk,
    check_segment_ids,
    checked,
)
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.strategies.full import Full


@checked(check_qk, check_kv_lengths, check_segment_ids, check_block_mask)
def attention_recall(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    block_mask: BlockMask,
    *,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    backend: Backend | None = None,
) -> Float32[Array, "B N"]:
    """Share of the softmax mass that a mask keeps, per head: the mean over its queries.

    A query's share is exp(lse of its listed keys - lse of its visible keys), both by block-sparse
    attention, so nothing of size T x S exists. Queries that see no key do not count; a head
    without others has recall 1.

    Args:
        q: queries, at the end of the keys if the mask is causal.
        k: keys.
        block_mask: the mask to judge.
        kv_lengths: valid keys of each sequence; the rest is padding.
        segment_ids: a query sees keys of its own segment only.
        backend: of the attention.

    Raises:
        ValueError: an argument does not fit the others, or the mask is of other lengths.
        UnsupportedError: the named backend cannot run this call.
    """
    everything = Full(block_size=block_mask.block_kv).select(
        q, k, is_causal=block_mask.is_causal, kv_lengths=kv_lengths
    )

    def lse_of(mask: BlockMask) -> Float32[Array, "B T N"]:
        _, lse = block_sparse_attention(
            q,
            k,
            k,  # the values do not matter
            mask,
            kv_lengths=kv_lengths,
            segment_ids=segment_ids,
            return_lse=True,
            backend=backend,
        )
        return lse

    total = lse_of(everything.blocks)
    counts = jnp.isfinite(total)
    shares = jnp.exp(lse_of(block_mask) - jnp.where(counts, total, 0.0))
    num_queries = jnp.sum(counts, axis=1, dtype=jnp.float32)
    kept = jnp.sum(jnp.where(counts, shares, 0.0), axis=1)
    return jnp.where(num_queries == 0.0, 1.0, kept / jnp.maximum(num_queries, 1.0))


def _check_outputs(out: jax.Array, reference: jax.Array) -> None:
    if out.shape != reference.shape or out.ndim != 4:
        raise ValueError(
            f"out.shape={out.shape} and reference.shape={reference.shape} must be one shape "
            "[batch, length, heads, head_dim]"
        )


@checked(_check_outputs)
def output_error(
    out: Float[Array, "B T N H"], reference: Float[Array, "B T N H"]
) -> Float32[Array, "B N"]:
    """Relative error |out - reference| / |reference| of each head, in the Euclidean norm.

    Args:
        out: the output to judge.
        reference: what it should be, as dense attention gives it.

    Raises:
        ValueError: the shapes differ.
    """
    out, reference = out.astype(jnp.float32), reference.astype(jnp.float32)
    error = jnp.sqrt(jnp.sum(jnp.square(out - reference), axis=(1, 3)))
    size = jnp.sqrt(jnp.sum(jnp.square(reference), axis=(1, 3)))
    return error / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)
