"""The Hopper kernels with every candidate for their tables of tiles, to be compiled."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks.tuned_kernels import KERNELS, TunedKernel

type Program = tuple[Callable[..., Any], Sequence[jax.ShapeDtypeStruct]]


def programs(name: str, kernel: TunedKernel) -> dict[str, Program]:
    """Those that `benchmarks/autotune.py` would measure, by key and index of the candidate."""
    found: dict[str, Program] = {}
    for values in kernel.keys:
        problem = kernel.problem(*values)
        shapes = next(iter(jax.eval_shape(problem.draw).values()))
        for index, config in enumerate(kernel.candidates(*values)):
            run = functools.partial(problem.run, config=config)
            found[f"{name}-{'-'.join(map(str, values))}-{index}"] = run, shapes
    return found


PROGRAMS = {
    program: entry
    for name, kernel in KERNELS.items()
    for program, entry in programs(name, kernel).items()
}

BY_DEFAULT = (
    "block_sparse_attention-64-64-128-4",
    "decode_attention-64-64-1",
    "antidiagonal_scores-2048-5",
    "vertical_slash_scores-128-True-2",
)
"""One of each kernel whose config is not the rule's."""
