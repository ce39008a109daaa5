"""The Hopper kernels with every choice of tiles, to be compiled: no arrays, only their shapes."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparseattn_jax.kernels.decode_attention import mosaic_sm90

type Program = tuple[Callable[..., Any], Sequence[jax.ShapeDtypeStruct | None]]


def run(*operands: jax.Array | None, block_kv: int | None, scale: float) -> Any:
    """The kernel, with the rows of the cache as an operand like the others."""
    *given, kv_rows = operands
    return mosaic_sm90.run(*given, kv_rows=kv_rows, block_kv=block_kv, scale=scale)


def program(
    dtype: str, head_dim: int, block_kv: int | None, *, has_positions: bool, q_len: int
) -> Program:
    """13 sequences of 32 query heads on 8 kv heads, which share the lists if q_len is 1."""
    B, N, K, S, M = 13, 32, 8, 8192, 40
    heads = 1 if q_len == 1 else K
    kv = jax.ShapeDtypeStruct((B, S, K, head_dim), dtype)
    listed = block_kv is not None
    return functools.partial(run, block_kv=block_kv, scale=head_dim**-0.5), (
        jax.ShapeDtypeStruct((B, q_len, N, head_dim), dtype),
        kv,
        kv,
        jax.ShapeDtypeStruct((B,), jnp.int32),
        jax.ShapeDtypeStruct((B, S), jnp.int32) if has_positions else None,
        jax.ShapeDtypeStruct((B, heads, M), jnp.int32) if listed else None,
        jax.ShapeDtypeStruct((B, heads), jnp.int32) if listed else None,
        None,
    )


def pool_program(dtype: str, head_dim: int, block_kv: int | None) -> Program:
    """8 kv heads of 13 sequences, each of 4 query heads, in a pool of 32 layers."""
    B, G, S, M = 13 * 8, 4, 8192, 40
    pool = jax.ShapeDtypeStruct((32 * B, S, 1, head_dim), dtype)
    of_each = jax.ShapeDtypeStruct((B,), jnp.int32)
    listed = block_kv is not None
    return functools.partial(run, block_kv=block_kv, scale=head_dim**-0.5), (
        jax.ShapeDtypeStruct((B, 1, G, head_dim), dtype),
        pool,
        pool,
        of_each,
        None,
        jax.ShapeDtypeStruct((B, 1, M), jnp.int32) if listed else None,
        jax.ShapeDtypeStruct((B, 1), jnp.int32) if listed else None,
        of_each,
    )


_SHAPES = tuple(itertools.product((64, 128, 256), (None, 64, 128)))
_KINDS = (("bfloat16", False, 1), ("float16", True, 3))

PROGRAMS = {
    f"{dtype}-H{head_dim}-{block_kv}-T{q_len}-{'ring' if has_positions else 'order'}": program(
        dtype, head_dim, block_kv, has_positions=has_positions, q_len=q_len
    )
    for (head_dim, block_kv), (dtype, has_positions, q_len) in itertools.product(_SHAPES, _KINDS)
} | {
    f"bfloat16-H{head_dim}-{block_kv}-pool": pool_program("bfloat16", head_dim, block_kv)
    for head_dim, block_kv in _SHAPES
}
