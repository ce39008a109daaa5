"""Suite block_sparse_forward_backward: gradients over random block lists, against the same peers.

A timed call is forward and backward: from q, k, v, the lists and the output's gradient to the
gradients of q, k and v. What our backward derives from the lists, as their transposes, is in the
time; FA4 gets its transposed lists ready-made.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.block_sparse_forward import Work, figures, random_operands
from benchmarks.gradient_gate import judge_gradients
from benchmarks.measure import Options, dense_peers
from benchmarks.records import Record
from benchmarks.shapes import Shape
from sparseattn_jax import BlockMask, block_sparse_attention
from sparseattn_jax.kernels.backends import Backend

PROBABILITIES = (0.05, 0.25, 1.0)

type Gradients = tuple[Array, Array, Array]


def run(options: Options, length: int) -> Iterator[Record | str]:
    """Records of one length, and sentences about what could not be recorded."""
    shape = options.shape
    operands = random_operands(shape, length, seed=options.seed)
    d_out = random_output_gradient(shape, length, seed=options.seed)

    work = Work(
        op="block_sparse_forward_backward",
        probabilities=PROBABILITIES,
        operands=(*operands, d_out),
        ours=functools.partial(gradients_over_blocks, backend=options.backend),
        dense={
            peer: jax.jit(functools.partial(gradients, attend))
            for peer, attend in dense_peers(options).items()
        },
        judge=functools.partial(
            judge_gradients, operands=(*operands, d_out), block_size=shape.block_size
        ),
        inputs=(
            f"{shape}, causal, random normal q/k/v and gradient of the output, "
            "random blocks + sink + diagonal"
        ),
    )
    return figures(work, options, length)


def random_output_gradient(shape: Shape, length: int, *, seed: int) -> Float[Array, "1 T N H"]:
    """Standard normal, independent of the operands of the same seed."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    size = (1, length, shape.num_heads, shape.head_dim)
    return jax.jit(lambda: jax.random.normal(key, size, jnp.dtype(shape.dtype)))()


def gradients_over_blocks(
    q: Array, k: Array, v: Array, d_out: Array, block_mask: BlockMask, *, backend: Backend | None
) -> Gradients:
    """Forward and backward of our attention over listed blocks."""
    attend = functools.partial(block_sparse_attention, block_mask=block_mask, backend=backend)
    return gradients(attend, q, k, v, d_out)


def gradients(
    attend: Callable[[Array, Array, Array], Array], q: Array, k: Array, v: Array, d_out: Array
) -> Gradients:
    """Forward and backward of an attention."""
    _, backward = jax.vjp(attend, q, k, v)
    return backward(d_out)
