"""The Hopper kernels with every choice of tiles, to be compiled: no arrays, only their shapes."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparseattn_jax.kernels.decode_attention import mosaic_sm90

type Program = tuple[Callable[..., Any], Sequence[jax.ShapeDtypeStruct | None]]


def program(
    dtype: str, head_dim: int, block_kv: int | None, *, has_positions: bool, q_len: int
) -> Program:
    """13 sequences of 32 query heads on 8 kv heads, which share the lists if q_len is 1."""
    B, N, K, S, M = 13, 32, 8, 8192, 40
    heads = 1 if q_len == 1 else K
    run = functools.partial(mosaic_sm90.run, block_kv=block_kv, scale=head_dim**-0.5)
    kv = jax.ShapeDtypeStruct((B, S, K, head_dim), dtype)
    listed = block_kv is not None
    return run, (
        jax.ShapeDtypeStruct((B, q_len, N, head_dim), dtype),
        kv,
        kv,
        jax.ShapeDtypeStruct((B,), jnp.int32),
        jax.ShapeDtypeStruct((B, S), jnp.int32) if has_positions else None,
        jax.ShapeDtypeStruct((B, heads, M), jnp.int32) if listed else None,
        jax.ShapeDtypeStruct((B, heads), jnp.int32) if listed else None,
    )


_SHAPES = itertools.product((64, 128, 256), (None, 64, 128))
_KINDS = (("bfloat16", False, 1), ("float16", True, 3))

PROGRAMS = {
    f"{dtype}-H{head_dim}-{block_kv}-T{q_len}-{'ring' if has_positions else 'order'}": program(
        dtype, head_dim, block_kv, has_positions=has_positions, q_len=q_len
    )
    for (head_dim, block_kv), (dtype, has_positions, q_len) in itertools.product(_SHAPES, _KINDS)
}
