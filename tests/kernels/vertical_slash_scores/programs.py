"""The Hopper kernels with every choice of tiles, to be compiled: no arrays, only their shapes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sparseattn_jax.kernels.vertical_slash_scores import mosaic_sm90

type Program = tuple[Callable[..., Any], Sequence[jax.ShapeDtypeStruct]]

KERNELS = 2  # the statistics and the sums


def program(dtype: str, head_dim: int, num_queries: int, group: int) -> Program:
    """A prefill of 8192 tokens."""
    B, T, K = 1, 8192, 8
    run = functools.partial(
        mosaic_sm90.run, kv_lengths=None, num_queries=num_queries, workspace_bytes=2**29
    )
    return run, (
        jax.ShapeDtypeStruct((B, T, K * group, head_dim), dtype),
        jax.ShapeDtypeStruct((B, T, K, head_dim), dtype),
    )


PROGRAMS = {
    f"{dtype}-H{head_dim}-n{num_queries}-G{group}": program(dtype, head_dim, num_queries, group)
    for dtype, head_dim, num_queries, group in [
        ("bfloat16", 128, 64, 4),
        ("float16", 128, 128, 4),
        ("bfloat16", 128, 64, 3),
        ("float16", 64, 64, 4),
        ("bfloat16", 64, 128, 1),
        ("float16", 64, 64, 1),
        ("bfloat16", 256, 128, 4),
        ("float16", 256, 64, 1),
    ]
}
