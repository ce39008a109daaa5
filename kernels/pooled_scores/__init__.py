"""Pooled block scores: attention between block means, and how far it is from the truth.

With q_mean[I] and k_mean[J] the means of the valid tokens of query block I and key block J,

    E[I, :] = softmax over the key blocks visible to query block I of scale * q_mean[I] . k_mean[J]

and scale = H ** -0.5. The ops are causal: query i stands at position i + S - T, and with
L = kv_lengths[b] (S by default) keys j >= L are padding, and so are queries at p >= L. A key block
is visible iff its first key is at or before the position of the query block's last valid query.
Blocks count from the first query and from the first key.

Whether E is to be trusted is measured on the last queries, with m = (e + v) / 2:

    e = softmax over all key blocks of scale * mean(last block_size valid queries) . k_mean[J]
    v = the last queries' true mass of each key block, divided by its sum
    distance = sqrt((KL(e || m) + KL(v || m)) / 2),    0 <= distance <= sqrt(ln 2)

with natural logarithms and 0 ln 0 = 0. The last queries need not be a block.

Source: FlexPrefill (arXiv:2502.20766) algorithms 2 and 4. There a block without
any mass makes the distance undefined; here it is a limit like any other.
"""

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
from sparseattn_jax.kernels.pooled_scores import xla
from sparseattn_jax.kernels.pooled_scores.xla import block_sums as block_sums

_SCORES: Mapping[Backend, Implementation[DeviceFacts]] = {
    "xla": Implementation(xla.run_scores, never_refuses),
}
_DISTANCE: Mapping[Backend, Implementation[DeviceFacts]] = {
    "xla": Implementation(xla.run_distance, never_refuses),
}


def pooled_scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    block_size: int,
    kv_lengths: Int32[Array, " B"] | None = None,
    q_blocks: tuple[int, int] | None = None,
    backend: Backend | None = None,
) -> Float32[Array, "B N rows Sb"]:
    """The rows of E; means and softmax are float32 whatever the operands' dtype.

    Args:
        q: queries, T <= S; head n reads kv head n // (N // K).
        k: keys.
        block_size: queries and keys per block.
        kv_lengths: valid keys of each sequence, by default all.
        q_blocks: the first query block to score and the one to stop before, by default all.
        backend: which implementation runs, by default the best that can.

    Returns:
        One score per scored query block and key block, 0 where the key block is not visible. A
        row sums to 1, or to 0 if its block has no valid query.

    Raises:
        UnsupportedError: the named backend cannot run this call.
    """
    return choose(_SCORES, backend, device_facts(q, k)).run(
        jax.lax.stop_gradient(q),
        jax.lax.stop_gradient(k),
        kv_lengths,
        block_size=block_size,
        q_blocks=(0, -(-q.shape[1] // block_size)) if q_blocks is None else q_blocks,
    )


def pooled_distance(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    vertical: Float32[Array, "B N S"],
    *,
    block_size: int,
    kv_lengths: Int32[Array, " B"] | None = None,
    backend: Backend | None = None,
) -> Float32[Array, "B N"]:
    """The square-root Jensen-Shannon distance between the pooled estimate and the true mass.

    Args:
        q: queries, T <= S; head n reads kv head n // (N // K).
        k: keys.
        vertical: the mass of each key, as `vertical_slash_scores` gives it for
            num_queries=block_size.
        block_size: keys per block, and how many queries count as the last ones.
        kv_lengths: valid keys of each sequence, by default all.
        backend: which implementation runs, by default the best that can.

    Returns:
        The distance of each query head, 0 for a sequence without valid queries.

    Raises:
        UnsupportedError: the named backend cannot run this call.
    """
    return choose(_DISTANCE, backend, device_facts(q, k)).run(
        jax.lax.stop_gradient(q),
        jax.lax.stop_gradient(k),
        jax.lax.stop_gradient(vertical),
        kv_lengths,
        block_size=block_size,
    )
