"""Streaming attention on Hopper: the block-sparse kernels over the blocks that windows touch."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.kernels.block_sparse_attention import (
    mosaic_sm90,
    mosaic_sm90_vjp,
)
from sparseattn_jax.kernels.block_sparse_attention import tiling as block_sparse
from sparseattn_jax.kernels.streaming_attention import tiling
from sparseattn_jax.kernels.streaming_attention.tiling import BLOCK


def refusal(facts: tiling.CallFacts) -> str | None:
    """Why these kernels cannot take a call with these facts; None if they can."""
    return mosaic_sm90.refusal(
        block_sparse.CallFacts(
            device=facts.device,
            dtype=facts.dtype,
            head_dim=facts.head_dim,
            block_q=BLOCK,
            block_kv=BLOCK,
            has_segment_ids=False,
        )
    )


def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sink_sizes: Int32[Array, " N"] | None,
    recent_sizes: Int32[Array, " N"] | None,
    kv_lengths: Int32[Array, " B"] | None,
    *,
    sink_size: int,
    recent_size: int,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """The op of this folder, for calls that `refusal` lets through."""
    lists, windows = _lists_and_windows(q, k, sink_sizes, recent_sizes, sink_size, recent_size)
    return mosaic_sm90.run(
        *(q, k, v, *lists, kv_lengths, None, windows),
        block_q=BLOCK,
        block_kv=BLOCK,
        is_causal=True,
        scale=scale,
    )


def run_vjp(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sink_sizes: Int32[Array, " N"] | None,
    recent_sizes: Int32[Array, " N"] | None,
    kv_lengths: Int32[Array, " B"] | None,
    out: Float[Array, "B T N H"],
    lse: Float32[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    d_lse: Float32[Array, "B T N"],
    *,
    sink_size: int,
    recent_size: int,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of q, k and v, for calls that `refusal` lets through.

    The transposed lists take 4 bytes per pair of blocks: once where heads have equal sizes, else
    for each query head.
    """
    lists, windows = _lists_and_windows(q, k, sink_sizes, recent_sizes, sink_size, recent_size)
    return mosaic_sm90_vjp.run(
        *(q, k, v, *lists, kv_lengths, None, windows),
        *(out, lse, d_out, d_lse),
        block_q=BLOCK,
        block_kv=BLOCK,
        is_causal=True,
        scale=scale,
    )


def _lists_and_windows(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    sink_sizes: Int32[Array, " N"] | None,
    recent_sizes: Int32[Array, " N"] | None,
    sink_size: int,
    recent_size: int,
) -> tuple[tuple[Int32[Array, "B #N Tb M"], Int32[Array, "B #N Tb"]], Int32[Array, "2 N"]]:
    """The block lists, one for all heads where these have equal sizes, and the heads' windows."""
    B, T, N, _ = q.shape
    S = k.shape[1]
    bounds = min(sink_size, S), min(recent_size, S)

    def per_head(sizes: Array | None, bound: int) -> Array:
        return jnp.full(N, bound, jnp.int32) if sizes is None else jnp.clip(sizes, 0, bound)

    sizes = (sink_sizes, recent_sizes)
    windows = jnp.stack([per_head(*each) for each in zip(sizes, bounds, strict=True)])
    own_lists = any(each is not None for each in sizes)
    indices, counts = tiling.covering_lists(
        windows if own_lists else windows[:, :1],
        width=tiling.list_width(*bounds, q_len=T, kv_len=S),
        q_len=T,
        kv_len=S,
    )
    indices, counts = (jnp.broadcast_to(x[None], (B, *x.shape)) for x in (indices, counts))
    return (indices, counts), windows
