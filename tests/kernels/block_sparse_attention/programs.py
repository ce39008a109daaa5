"""The Hopper kernels with every choice of tiles, to be compiled: no arrays, only their shapes."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparseattn_jax.kernels.block_sparse_attention import mosaic_sm90, mosaic_sm90_vjp

type Program = tuple[Callable[..., Any], Sequence[jax.ShapeDtypeStruct | None]]


def program(
    dtype: str, head_dim: int, block_q: int, block_kv: int, is_causal: bool, windows: bool
) -> Program:
    """A prefill of 8192 tokens with 32 query heads on 8 key/value heads."""
    B, T, N, K, M = 1, 8192, 32, 8, 16
    run = functools.partial(
        mosaic_sm90.run,
        block_q=block_q,
        block_kv=block_kv,
        is_causal=is_causal,
        scale=head_dim**-0.5,
    )
    kv = jax.ShapeDtypeStruct((B, T, K, head_dim), dtype)
    return lambda *x: run(*x[:6], None, x[6]), (
        jax.ShapeDtypeStruct((B, T, N, head_dim), dtype),
        kv,
        kv,
        jax.ShapeDtypeStruct((B, N, T // block_q, M), jnp.int32),
        jax.ShapeDtypeStruct((B, N, T // block_q), jnp.int32),
        jax.ShapeDtypeStruct((B,), jnp.int32),
        jax.ShapeDtypeStruct((2, N), jnp.int32) if windows else None,
    )


def vjp_program(
    dtype: str, head_dim: int, block_q: int, block_kv: int, is_causal: bool, windows: bool
) -> Program:
    """The gradients of that prefill."""
    _, given = program(dtype, head_dim, block_q, block_kv, is_causal, windows)
    run = functools.partial(
        mosaic_sm90_vjp.run,
        block_q=block_q,
        block_kv=block_kv,
        is_causal=is_causal,
        scale=head_dim**-0.5,
    )
    q = given[0]
    rows = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    return lambda *x: run(*x[:6], None, *x[6:]), (
        *given,
        q,
        rows,
        q,
        rows,
    )


_SHAPES = itertools.product((64, 128, 256), (64, 128), (64, 128))
_KINDS = {
    "bfloat16-{}-causal": ("bfloat16", True, False),
    "float16-{}-full": ("float16", False, False),
    "float16-{}-windows": ("float16", True, True),
}

PROGRAMS = {
    name + kind.format(f"H{head_dim}-{block_q}x{block_kv}"): make(
        dtype, head_dim, block_q, block_kv, is_causal, windows
    )
    for (head_dim, block_q, block_kv), kind, (name, make) in itertools.product(
        _SHAPES, _KINDS, (("", program), ("vjp-", vjp_program))
    )
    for dtype, is_causal, windows in (_KINDS[kind],)
}
