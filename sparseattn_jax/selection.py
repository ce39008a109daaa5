"""From block scores to a pattern: which blocks are visible, which are forced, in what ranges."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.block_mask import BlockMask, num_visible_blocks
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.kernels.segments import segment_bounds
from sparseattn_jax.kernels.select_blocks import select_blocks
from sparseattn_jax.pattern import SparsePattern

type Operands = tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]]
type Scores = Callable[[Operands, tuple[int, int]], Float32[Array, "B N rows Sb"]]
"""Block scores of a range of query blocks, from the first to the one to stop before."""


def diagonal_blocks(
    q_len: int, kv_len: int, block_q: int, block_kv: int | None = None
) -> Int32[np.ndarray, "2 Tb"]:
    """The key blocks that hold the positions of each query block's first and last query.

    The diagonal runs from one to the other: where blocks are square, one block, or two if the
    offset of the queries is no multiple of it.
    """
    firsts = np.arange(0, q_len, block_q, dtype=np.int32)
    lasts = np.minimum(firsts + block_q, q_len) - 1
    return (np.stack([firsts, lasts]) + (kv_len - q_len)) // (block_kv or block_q)


def num_forced_blocks(
    q_len: int,
    kv_len: int,
    block_size: int,
    *,
    is_causal: bool,
    keep_sink: bool = False,
    keep_recent: bool = False,
) -> int:
    """The most blocks that any query block must keep; see `select_cumulative`."""
    diagonal = 1 if (kv_len - q_len) % block_size == 0 else 2
    forced = (is_causal or keep_sink) + diagonal * (is_causal or keep_recent)
    return min(forced, -(-kv_len // block_size))


def select_cumulative(
    scores: Scores,
    operands: Operands,
    threshold: Float32[Array, " N"],
    *,
    block_size: int,
    is_causal: bool,
    kv_lengths: Int32[Array, " B"] | None,
    max_blocks: int | None,
    backend: Backend | None,
    segment_ids: Int32[Array, "B S"] | None = None,
    keep_sink: bool = False,
    keep_recent: bool = False,
    workspace_bytes: int = 2**29,
) -> SparsePattern:
    """The blocks whose scores reach `threshold` of each row's sum; see `kernels/select_blocks`.

    Causal rows keep the first block that they see and their diagonal in any case. Scores, and what
    else has a number per block, exist for a range of query blocks at one time.

    Args:
        scores: of a range of query blocks, from the operands.
        operands: queries, at the end of the keys if causal, and keys.
        threshold: share of each row's sum to keep, per query head.
        block_size: queries and keys per block.
        is_causal: whether a query sees keys up to its own position only.
        kv_lengths: valid keys of each sequence, by default all.
        max_blocks: capacity of a row's list, by default no limit; what it drops is counted.
        backend: of `kernels/select_blocks`.
        segment_ids: sequences packed in one row, of a causal call. A row sees from the start of its
            first query's segment on.
        keep_sink: whether rows that are not causal keep the first block too,
        keep_recent: and the blocks that hold a query's position.
        workspace_bytes: memory for the scores of a range, of at least one query block.
    """
    (batch, q_len), kv_len = operands[0].shape[:2], operands[1].shape[1]
    num_q_blocks, num_kv_blocks = -(-q_len // block_size), -(-kv_len // block_size)
    num_visible = num_visible_blocks(
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_size,
        block_kv=block_size,
        is_causal=is_causal,
        kv_lengths=kv_lengths,
    )
    diagonals = jnp.asarray(diagonal_blocks(q_len, kv_len, block_size))
    first_seen = None
    if segment_ids is not None:
        starts = segment_bounds(segment_ids)[0][:, kv_len - q_len :: block_size]
        first_seen = starts // block_size

    def lists_of(inputs: tuple, first: int, stop: int) -> tuple[Array, Array, Array]:
        operands, num_visible, diagonals, first_seen = inputs
        visible, forced = visible_and_forced(
            num_visible[:, first:stop],
            diagonals[:, first:stop],
            num_kv_blocks,
            None if first_seen is None else first_seen[:, first:stop],
            keep_sink=is_causal or keep_sink,
            keep_recent=is_causal or keep_recent,
        )
        return select_blocks(
            scores(operands, (first, stop)),
            threshold,
            forced[:, None],
            visible[:, None],
            max_blocks=max_blocks,
            backend=backend,
        )

    row_bytes = 4 * batch * len(threshold) * num_kv_blocks
    step = min(max(1, workspace_bytes // row_bytes), num_q_blocks)
    inputs = operands, num_visible, diagonals, first_seen
    indices, counts, num_dropped = lists_of(inputs, 0, step)
    if step < num_q_blocks:
        # Ranges are written into the whole: joined at the end, the lists would exist twice.
        later = ((0, 0), (0, 0), (0, num_q_blocks - step))
        indices, counts = jnp.pad(indices, (*later, (0, 0))), jnp.pad(counts, later)
    for first in range(step, num_q_blocks, step):
        # No range is begun before the one before it is over: XLA would keep the scores of all.
        inputs, indices = lax.optimization_barrier((inputs, indices))
        new = lists_of(inputs, first, min(first + step, num_q_blocks))
        indices = lax.dynamic_update_slice_in_dim(indices, new[0], first, axis=2)
        counts = lax.dynamic_update_slice_in_dim(counts, new[1], first, axis=2)
        num_dropped += new[2]
    blocks = BlockMask(
        kv_indices=indices,
        kv_num_blocks=counts,
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_size,
        block_kv=block_size,
        is_causal=is_causal,
    )
    return SparsePattern(blocks=blocks, num_dropped=num_dropped)


def visible_and_forced(
    num_visible: Int32[Array, "#B rows"],
    diagonals: Int32[Array, "2 rows"],
    num_kv_blocks: int,
    first_seen: Int32[Array, "B rows"] | None = None,
    *,
    keep_sink: bool = True,
    keep_recent: bool = True,
) -> tuple[Bool[Array, "#B rows Sb"], Bool[Array, "#B rows Sb"]]:
    """Of each row, from the first block that it sees on; forced are that one and the diagonal."""
    columns = jnp.arange(num_kv_blocks, dtype=jnp.int32)[None, None, :]
    first = jnp.zeros((1, 1, 1), jnp.int32) if first_seen is None else first_seen[..., None]
    visible = (columns < num_visible[..., None]) & (columns >= first)
    is_recent = (columns >= diagonals[0][None, :, None]) & (columns <= diagonals[1][None, :, None])
    return visible, visible & ((is_recent & keep_recent) | ((columns == first) & keep_sink))
