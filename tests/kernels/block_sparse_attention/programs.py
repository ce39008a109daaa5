"""The Hopper kernels with every choice of tiles, to be compiled: no arrays, only their shapes."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparseattn_jax.kernels.block_sparse_attention import mosaic_sm90, mosaic_sm90_vjp

type Program = tuple[Callable[..., Any], Sequence[jax.ShapeDtypeStruct]]


def program(dtype: str, head_dim: int, block_q: int, block_kv: int, is_causal: bool) -> Program:
    """A prefill of 8192 tokens with 32 query heads on 8 key/value heads."""
    B, T, N, K, M = 1, 8192, 32, 8, 16
    run = functools.partial(
        mosaic_sm90.run,
        segment_ids=None,
        block_q=block_q,
        block_kv=block_kv,
        is_causal=is_causal,
        scale=head_dim**-0.5,
    )
    kv = jax.ShapeDtypeStruct((B, T, K, head_dim), dtype)
    return run, (
        jax.ShapeDtypeStruct((B, T, N, head_dim), dtype),
        kv,
        kv,
        jax.ShapeDtypeStruct((B, N, T // block_q, M), jnp.int32),
        jax.ShapeDtypeStruct((B, N, T // block_q), jnp.int32),
        jax.ShapeDtypeStruct((B,), jnp.int32),
    )


def vjp_program(dtype: str, head_dim: int, block_q: int, block_kv: int, is_causal: bool) -> Program:
    """The gradients of that prefill."""
    _, given = program(dtype, head_dim, block_q, block_kv, is_causal)
    run = functools.partial(
        mosaic_sm90_vjp.run,
        segment_ids=None,
        block_q=block_q,
        block_kv=block_kv,
        is_causal=is_causal,
        scale=head_dim**-0.5,
    )
    q = given[0]
    rows = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    return lambda *x: run(*x[:6], out=x[6], lse=x[7], d_out=x[8], d_lse=x[9]), (
        *given,
        q,
        rows,
        q,
        rows,
    )


_SHAPES = itertools.product((64, 128, 256), (64, 128), (64, 128))
_KINDS = (("bfloat16", True), ("float16", False))

PROGRAMS = {
    f"{name}{dtype}-H{head_dim}-{block_q}x{block_kv}-{'causal' if is_causal else 'full'}": make(
        dtype, head_dim, block_q, block_kv, is_causal
    )
    for (head_dim, block_q, block_kv), (dtype, is_causal), (name, make) in itertools.product(
        _SHAPES, _KINDS, (("", program), ("vjp-", vjp_program))
    )
}
