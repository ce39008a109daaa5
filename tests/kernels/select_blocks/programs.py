"""The Hopper kernel with every kind of rows, to be compiled: no arrays, only their shapes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparseattn_jax.kernels.select_blocks import mosaic_sm90

type Program = tuple[Callable[..., Any], Sequence[jax.ShapeDtypeStruct]]

KERNELS = 1


def program(num_columns: int, max_blocks: int | None, num_rows: int = 64) -> Program:
    """32 heads with so many rows each."""
    blocks = jax.ShapeDtypeStruct((1, 1, num_rows, num_columns), jnp.bool_)
    return functools.partial(mosaic_sm90.run, max_blocks=max_blocks), (
        jax.ShapeDtypeStruct((1, 32, num_rows, num_columns), jnp.float32),
        jax.ShapeDtypeStruct((32,), jnp.float32),
        blocks,
        blocks,
    )


PROGRAMS = {
    f"{num_columns}-max{max_blocks}": program(num_columns, max_blocks)
    for num_columns, max_blocks in [
        (64, None),
        (64, 10),
        (1024, None),
        (1024, 100),
        (1100, None),
        (8192, None),
        (8192, 1000),
    ]
} | {"1-row-1024-max100": program(1024, 100, num_rows=1)}
