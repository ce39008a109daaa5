"""The Hopper kernels for each head_dim, to be compiled: no arrays, only their shapes."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparseattn_jax.kernels.streaming_attention import mosaic_sm90

type Program = tuple[Callable[..., Any], Sequence[jax.ShapeDtypeStruct | None]]


def program(head_dim: int, dtype: str, own_sizes: bool, backward: bool) -> Program:
    """A prefill of 8192 tokens with 32 query heads on 8 key/value heads, or its gradients."""
    B, T, N, K = 1, 8192, 32, 8
    run = mosaic_sm90.run_vjp if backward else mosaic_sm90.run
    q = jax.ShapeDtypeStruct((B, T, N, head_dim), dtype)
    kv = jax.ShapeDtypeStruct((B, T, K, head_dim), dtype)
    rows = jax.ShapeDtypeStruct((B, T, N), jnp.float32)
    sizes = jax.ShapeDtypeStruct((N,), jnp.int32) if own_sizes else None
    options = {"sink_size": 128, "recent_size": 1024, "scale": head_dim**-0.5}
    arguments = (q, kv, kv, sizes, sizes, None, *((q, rows, q, rows) if backward else ()))
    return functools.partial(run, **options), arguments


PROGRAMS = {
    f"{'vjp-' * backward}H{head_dim}-{dtype}{'-own_sizes' * own_sizes}": program(
        head_dim, dtype, own_sizes, backward
    )
    for head_dim, (dtype, own_sizes), backward in itertools.product(
        (64, 128, 256), (("bfloat16", False), ("float16", True)), (False, True)
    )
}
