"""The Hopper kernels with every choice of tiles, to be compiled: no arrays, only their shapes."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sparseattn_jax.kernels.antidiagonal_scores import mosaic_sm90

type Program = tuple[Callable[..., Any], Sequence[jax.ShapeDtypeStruct]]

KERNELS = 2  # the products and the fold


def program(dtype: str, head_dim: int, stride: int, block_size: int, is_causal: bool) -> Program:
    """A prefill of 8192 tokens; causal with 4 query heads per key/value head, else with 3."""
    B, T, K = 1, 8192, 8
    N = K * (4 if is_causal else 3)
    run = functools.partial(
        mosaic_sm90.run,
        kv_lengths=None,
        stride=stride,
        block_size=block_size,
        is_causal=is_causal,
        q_blocks=(0, T // block_size),
        workspace_bytes=2**30,
    )
    return run, (
        jax.ShapeDtypeStruct((B, T, N, head_dim), dtype),
        jax.ShapeDtypeStruct((B, T, K, head_dim), dtype),
    )


_SHAPES = [
    *itertools.product((64, 128), (4, 8, 16), (64, 128)),
    (256, 16, 128),
]
_KINDS = (("bfloat16", True), ("float16", False))

PROGRAMS = {
    f"{dtype}-H{head_dim}-s{stride}-b{block_size}-{'causal' if is_causal else 'full'}": program(
        dtype, head_dim, stride, block_size, is_causal
    )
    for index, (head_dim, stride, block_size) in enumerate(_SHAPES)
    for dtype, is_causal in (_KINDS if head_dim == 128 else _KINDS[index % 2 :][:1])
}
