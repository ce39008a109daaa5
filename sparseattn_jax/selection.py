"""From block scores to a pattern: which blocks are visible, which are forced, in what ranges."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from sparseattn_jax.block_mask import BlockMask, num_visible_blocks
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.kernels.select_blocks import select_blocks
from sparseattn_jax.pattern import SparsePattern

type Scores = Callable[[tuple[int, int]], Float32[Array, "B N rows Sb"]]
"""Block scores of a range of query blocks, from the first to the one to stop before."""


def first_diagonal_blocks(q_len: int, kv_len: int, block_size: int) -> Int32[np.ndarray, " Tb"]:
    """The key block that holds the position of each query block's first query.

    The diagonal of a query block runs from here to its last visible block: one block, or two
    where the offset of the queries is no multiple of the block.
    """
    starts = np.arange(0, q_len, block_size, dtype=np.int32)
    return (starts + (kv_len - q_len)) // block_size


def num_forced_blocks(q_len: int, kv_len: int, block_size: int, *, is_causal: bool) -> int:
    """The most blocks that any query block must keep: the first one and its diagonal."""
    if not is_causal:
        return 0
    diagonal = 1 if (kv_len - q_len) % block_size == 0 else 2
    return min(1 + diagonal, -(-kv_len // block_size))


def select_cumulative(
    scores: Scores,
    threshold: Float32[Array, " N"],
    *,
    batch: int,
    q_len: int,
    kv_len: int,
    block_size: int,
    is_causal: bool,
    kv_lengths: Int32[Array, " B"] | None,
    max_blocks: int | None,
    backend: Backend | None,
    workspace_bytes: int = 2**29,
) -> SparsePattern:
    """The blocks whose scores reach `threshold` of each row's sum; see `kernels/select_blocks`.

    Causal rows keep the first block and their diagonal in any case. Scores exist for a range of
    query blocks at one time.
    """
    visible, forced = _visible_and_forced(
        q_len, kv_len, block_size, is_causal=is_causal, kv_lengths=kv_lengths
    )
    num_q_blocks, num_kv_blocks = visible.shape[1:]
    row_bytes = 4 * batch * len(threshold) * num_kv_blocks
    step = min(max(1, workspace_bytes // row_bytes), num_q_blocks)
    lists = [
        select_blocks(
            scores((first, min(first + step, num_q_blocks))),
            threshold,
            forced[:, None, first : first + step],
            visible[:, None, first : first + step],
            max_blocks=max_blocks,
            backend=backend,
        )
        for first in range(0, num_q_blocks, step)
    ]
    indices, counts, num_dropped = zip(*lists, strict=True)
    blocks = BlockMask(
        kv_indices=_joined(indices),
        kv_num_blocks=_joined(counts),
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_size,
        block_kv=block_size,
        is_causal=is_causal,
    )
    return SparsePattern(blocks=blocks, num_dropped=jnp.sum(jnp.stack(num_dropped), axis=0))


def _joined(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)


def _visible_and_forced(
    q_len: int,
    kv_len: int,
    block_size: int,
    *,
    is_causal: bool,
    kv_lengths: Int32[Array, " B"] | None,
) -> tuple[Bool[Array, "#B Tb Sb"], Bool[Array, "#B Tb Sb"]]:
    columns = jnp.arange(-(-kv_len // block_size), dtype=jnp.int32)[None, None, :]
    num_visible = num_visible_blocks(
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_size,
        block_kv=block_size,
        is_causal=is_causal,
        kv_lengths=kv_lengths,
    )
    visible = columns < num_visible[..., None]
    if not is_causal:
        return visible, jnp.zeros_like(visible)
    diagonals = first_diagonal_blocks(q_len, kv_len, block_size)[None, :, None]
    return visible, visible & ((columns >= diagonals) | (columns == 0))
