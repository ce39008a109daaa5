"""Vertical and slash scores: where the last queries' softmax mass lies, by key and by distance.

The last n = num_queries valid queries of a sequence stand at positions p; with causal softmax rows

    P[p, j] = exp(scale * q[p] . k[j]) / sum_{j' <= p} exp(scale * q[p] . k[j']),    j <= p,
    vertical[j] = sum_p P[p, j]         the column of key j
    slash[d]    = sum_p P[p, p - d]     the diagonal of distance d

and scale = H ** -0.5. The op is causal: query i stands at position i + S - T, and with
L = kv_lengths[b] (S by default) it is valid iff that lies before L. Where a sequence has fewer
than n valid queries, those are all. Both results sum to the number of queries that were summed.

MInference ranks both as they are. FlexPrefill counts the tokens that cover a share of each and
ranks sums over blocks of them: `pooled_scores.block_sums`.

Sources: MInference (arXiv:2407.02490) algorithm 2, with n = 64; FlexPrefill (arXiv:2502.20766)
algorithm 3, with n = block_size and means in place of sums.
"""

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.kernels.backends import (
    Backend,
    Implementation,
    choose,
    device_facts,
    never_refuses,
)
from sparseattn_jax.kernels.vertical_slash_scores import mosaic_sm90, xla
from sparseattn_jax.kernels.vertical_slash_scores.tiling import CallFacts

_TABLE: Mapping[Backend, Implementation[CallFacts]] = {
    "mosaic_sm90": Implementation(mosaic_sm90.run, mosaic_sm90.refusal),
    "xla": Implementation(xla.run, never_refuses),
}


def vertical_slash_scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    num_queries: int,
    kv_lengths: Int32[Array, " B"] | None = None,
    workspace_bytes: int = 2**29,
    backend: Backend | None = None,
) -> tuple[Float32[Array, "B N S"], Float32[Array, "B N S"]]:
    """The sums per key and per distance, float32 whatever the operands' dtype.

    Args:
        q: queries, T <= S; head n reads kv head n // (N // K).
        k: keys.
        num_queries: how many queries at the end of each sequence are summed.
        kv_lengths: valid keys of each sequence, by default all.
        workspace_bytes: memory for the part of P, and its copy, that exists at one time; at least
            one key's column of it does.
        backend: which implementation runs, by default the best that can.

    Returns:
        vertical, by key, 0 for padding; slash, by distance, 0 for distances that no query sees.

    Raises:
        ValueError: num_queries is less than 1.
        UnsupportedError: the named backend cannot run this call.
    """
    if num_queries < 1:
        raise ValueError(f"num_queries={num_queries} must be at least 1; 64 is usual")
    facts = CallFacts(
        device=device_facts(q, k), dtype=q.dtype, head_dim=q.shape[-1], num_queries=num_queries
    )
    return choose(_TABLE, backend, facts).run(
        jax.lax.stop_gradient(q),
        jax.lax.stop_gradient(k),
        kv_lengths,
        num_queries=num_queries,
        workspace_bytes=workspace_bytes,
    )
