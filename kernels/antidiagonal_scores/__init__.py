"""Antidiagonal block scores: XAttention's estimate of where the softmax mass lies.

With groups of `stride` = s tokens, counted from the first query and from the first key,

    A[i, j] = (scale / s) * sum_{u < s} q[i s + s - 1 - u] . k[j s + u],    scale = H ** -0.5
    P[i, :] = softmax over the key groups visible to query group i of A[i, :]
    W[I, J] = sum of P[i, j] over the query groups i of block I and key groups j of block J

so A is the mean logit on the antidiagonal of an s x s tile and a row of W sums to the number of
query groups in its block. Query i stands at position p = i + S - T. With L = kv_lengths[b] (S by
default) keys j >= L are padding, and so are causal queries at p >= L. Padding enters a group as
zeros and the divisor stays s. A key group with no valid key is invisible, and so is, if causal,
one whose first key lies behind the position of the query group's last valid query. A query group
with no valid query adds nothing.

With segment_ids, whose segments are contiguous, queries see keys of their own segment: a key group
belongs to the segment of its last valid key, and the keys before that segment enter as zeros. It
is visible to a query group that has a valid query of that segment, or of segments on both sides.

Source: XAttention (arXiv:2503.16428) section 2.1.
"""

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.kernels.antidiagonal_scores import mosaic_sm90, xla
from sparseattn_jax.kernels.antidiagonal_scores.tiling import CallFacts
from sparseattn_jax.kernels.backends import (
    Backend,
    Implementation,
    choose,
    device_facts,
    never_refuses,
)

_TABLE: Mapping[Backend, Implementation[CallFacts]] = {
    "mosaic_sm90": Implementation(mosaic_sm90.run, mosaic_sm90.refusal),
    "xla": Implementation(xla.run, never_refuses),
}


def antidiagonal_scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    stride: int,
    block_size: int,
    is_causal: bool,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    q_blocks: tuple[int, int] | None = None,
    workspace_bytes: int = 2**29,
    backend: Backend | None = None,
) -> Float32[Array, "B N rows Sb"]:
    """The block sums W; sums and softmax statistics are float32 whatever the operands' dtype.

    Args:
        q: queries; head n reads kv head n // (N // K).
        k: keys.
        stride: tokens per group; divides block_size.
        block_size: queries and keys per block.
        is_causal: whether a query group sees key groups up to its own position only.
        kv_lengths: valid keys of each sequence, by default all.
        segment_ids: sequences packed in one row; T <= S.
        q_blocks: the first query block to score and the one to stop before, by default all.
        workspace_bytes: memory for the rows of A, or of what is left of them, that exist at one
            time, and for the keys behind them. At least the least that an implementation works
            on is processed at a time, as one query block of one kv head.
        backend: which implementation runs, by default the best that can.

    Returns:
        One score per scored query block and key block, 0 where no key group is visible.

    Raises:
        UnsupportedError: the named backend cannot run this call.
    """
    facts = CallFacts(
        device=device_facts(q, k),
        dtype=q.dtype,
        head_dim=q.shape[-1],
        stride=stride,
        block_size=block_size,
        has_segment_ids=segment_ids is not None,
    )
    return choose(_TABLE, backend, facts).run(
        jax.lax.stop_gradient(q),
        jax.lax.stop_gradient(k),
        kv_lengths,
        segment_ids=segment_ids,
        stride=stride,
        block_size=block_size,
        is_causal=is_causal,
        q_blocks=(0, -(-q.shape[1] // block_size)) if q_blocks is None else q_blocks,
        workspace_bytes=workspace_bytes,
    )
