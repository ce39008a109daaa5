"""Suite two_arm_step: full and streaming attention of the same heads, against the full one alone.

    python -m benchmarks.run --suite two_arm_step --lengths 8K 32K

A timed call is forward and backward, with a gradient of each arm's output: what a training step of
gates between the arms does. The peer `full_arm` is our own attention over every block.
"""

import functools
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Array

from benchmarks import gate
from benchmarks.block_sparse_forward import random_operands
from benchmarks.block_sparse_forward_backward import (
    Gradients,
    gradients_over_blocks,
    random_output_gradient,
)
from benchmarks.gradient_gate import judge_gradients
from benchmarks.measure import Options, measured, on_rows
from benchmarks.records import Record
from benchmarks.shapes import format_length
from sparseattn_jax import BlockMask, Full, Streaming
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.kernels.two_arm_attention import two_arm_attention

SINK_BLOCKS, RECENT_BLOCKS = 1, 8


def run(options: Options, length: int) -> Iterator[Record | str]:
    """The record of one length, or a sentence about what could not be recorded."""
    shape, size = options.shape, options.shape.block_size
    q, k, v = random_operands(shape, length, seed=options.seed)
    d_full, d_streaming = (
        random_output_gradient(shape, length, seed=options.seed + arm) for arm in range(2)
    )
    window = Streaming(
        sink_size=SINK_BLOCKS * size, recent_size=RECENT_BLOCKS * size, block_size=size
    )
    full_blocks, streaming_blocks = (
        strategy.select(q, k).blocks for strategy in (Full(block_size=size), window)
    )

    full = jax.jit(functools.partial(gradients_over_blocks, backend=options.backend))
    both = jax.jit(functools.partial(_gradients_of_both, backend=options.backend))
    rows = gate.sample_rows(length, size, seed=options.seed)

    def keep(blocks: BlockMask) -> np.ndarray:
        dense = np.asarray(blocks.to_dense()[0])
        return np.broadcast_to(dense, (shape.num_heads, *dense.shape[1:]))

    judge = functools.partial(
        judge_gradients,
        operands=(q, k, v, d_full),
        rows=rows,
        keep=keep(full_blocks),
        block_size=size,
    )
    judge_both = functools.partial(judge, further_arms=[(d_streaming, keep(streaming_blocks))])
    d_arms = d_full, d_streaming
    operands = q, k, v, d_arms, full_blocks, streaming_blocks
    yield options.record(
        op="two_arm_step",
        case=f"{format_length(length)} sink={window.sink_size} recent={window.recent_size}",
        inputs=f"{shape}, causal, random normal q/k/v and gradients of both outputs",
        density=float(streaming_blocks.density().mean()),
        ours=measured(both, operands, on_rows(judge_both, rows), options),
        peer="full_arm",
        theirs=measured(full, (q, k, v, d_full, full_blocks), on_rows(judge, rows), options),
    )


def _gradients_of_both(
    q: Array,
    k: Array,
    v: Array,
    d_arms: tuple[Array, Array],
    outer: BlockMask,
    inner: BlockMask,
    *,
    backend: Backend | None,
) -> Gradients:
    """Forward and backward of both arms."""

    def arms(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        (out, _), (part, _) = two_arm_attention(
            *(q, k, v, outer.kv_indices, outer.kv_num_blocks),
            *(inner.kv_indices, inner.kv_num_blocks),
            block_q=outer.block_q,
            block_kv=outer.block_kv,
            is_causal=outer.is_causal,
            scale=q.shape[-1] ** -0.5,
            backend=backend,
        )
        return out, part

    _, backward = jax.vjp(arms, q, k, v)
    return backward(d_arms)
