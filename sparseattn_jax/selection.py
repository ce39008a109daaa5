"""From block scores to a pattern: which blocks are visible, which are forced, in what chunks."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.block_mask import BlockMask
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.kernels.select_blocks import select_blocks
from sparseattn_jax.pattern import SparsePattern

type Scores = Callable[[Array, Array, Array | None], Float32[Array, "B N Tb Sb"]]
"""Block scores of queries at the end of the keys: `scores(q, k, kv_lengths)`."""


def num_visible_blocks(
    q_len: int,
    kv_len: int,
    block_size: int,
    *,
    is_causal: bool,
    kv_lengths: Int32[Array, " B"] | None,
) -> Int32[Array, "#B Tb"]:
    """How many of the first key blocks each query block sees.

    A block is visible iff it holds a valid key and, if causal, its first key is at or before the
    position of the query block's last valid query. A block of padding queries sees nothing.
    """
    starts = np.arange(0, q_len, block_size, dtype=np.int32)[None, :]
    if kv_lengths is None:
        kv_lengths = jnp.full(1, kv_len, jnp.int32)
    lengths = kv_lengths[:, None]
    if not is_causal:
        return jnp.broadcast_to(-(-lengths // block_size), (len(kv_lengths), starts.size))
    starts = starts + (kv_len - q_len)
    ends = jnp.minimum(np.minimum(starts + block_size, kv_len), lengths)
    return jnp.where(ends > starts, -(-ends // block_size), 0)


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
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    threshold: Float32[Array, " N"],
    *,
    block_size: int,
    is_causal: bool,
    kv_lengths: Int32[Array, " B"] | None,
    max_blocks: int | None,
    backend: Backend | None,
    workspace_bytes: int = 2**29,
) -> SparsePattern:
    """The blocks whose scores reach `threshold` of each row's sum; see `kernels/select_blocks`.

    Causal rows keep the first block and their diagonal in any case. Scores exist for a range of
    query blocks at one time; causal ranges only score the keys up to their end.
    """
    (batch, q_len, num_heads), kv_len = q.shape[:3], k.shape[1]
    num_kv_blocks = -(-kv_len // block_size)
    width = num_kv_blocks if max_blocks is None else min(max_blocks, num_kv_blocks)
    indices, counts, num_dropped = [], [], jnp.zeros((batch, num_heads), jnp.int32)
    for start, stop in _query_ranges(
        q.shape, kv_len, block_size, is_causal=is_causal, workspace_bytes=workspace_bytes
    ):
        # The range's queries stand at the end of the keys it gets, as the whole call's do. Scores
        # may read whole key blocks, so more queries come along until the keys end with a block.
        end = stop
        if is_causal:
            end = min(stop + -(kv_len - q_len + stop) % block_size, q_len)
        queries, keys = q[:, start:end], k[:, : kv_len - q_len + end] if is_causal else k
        lengths = None if kv_lengths is None else jnp.minimum(kv_lengths, keys.shape[1])
        visible, forced = _visible_and_forced(
            queries.shape[1], keys.shape[1], block_size, is_causal=is_causal, kv_lengths=lengths
        )
        rows = slice(0, -(-(stop - start) // block_size))
        range_indices, range_counts, range_dropped = select_blocks(
            scores(queries, keys, lengths)[:, :, rows],
            threshold,
            forced[:, None, rows],
            visible[:, None, rows],
            max_blocks=max_blocks,
            backend=backend,
        )
        indices.append(_widen(range_indices, width))
        counts.append(range_counts)
        num_dropped += range_dropped
    blocks = BlockMask(
        kv_indices=jnp.concatenate(indices, axis=2),
        kv_num_blocks=jnp.concatenate(counts, axis=2),
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_size,
        block_kv=block_size,
        is_causal=is_causal,
    )
    return SparsePattern(blocks=blocks, num_dropped=num_dropped)


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
        q_len, kv_len, block_size, is_causal=is_causal, kv_lengths=kv_lengths
    )
    visible = columns < num_visible[..., None]
    if not is_causal:
        return visible, jnp.zeros_like(visible)
    diagonals = first_diagonal_blocks(q_len, kv_len, block_size)[None, :, None]
    return visible, visible & ((columns >= diagonals) | (columns == 0))


def _query_ranges(
    q_shape: tuple[int, ...],
    kv_len: int,
    block_size: int,
    *,
    is_causal: bool,
    workspace_bytes: int,
) -> list[tuple[int, int]]:
    """Ranges of whole query blocks whose scores fit the workspace.

    Causal calls have up to 8 ranges of at least 32 blocks: each one scores no key behind its end,
    which with 8 saves 7/16 of the work.
    """
    batch, q_len, num_heads = q_shape[:3]
    num_q_blocks, num_kv_blocks = -(-q_len // block_size), -(-kv_len // block_size)
    num_ranges = -(-4 * batch * num_heads * num_q_blocks * num_kv_blocks // workspace_bytes)
    if is_causal:
        num_ranges = max(num_ranges, min(8, num_q_blocks // 32))
    step = -(-num_q_blocks // max(num_ranges, 1)) * block_size
    return [(start, min(start + step, q_len)) for start in range(0, q_len, step)]


def _widen(indices: Int32[Array, "B N Tb M"], width: int) -> Int32[Array, "B N Tb width"]:
    """Pads lists with their first index, as `kernels/block_lists.py` has it."""
    shape = (*indices.shape[:-1], width - indices.shape[-1])
    return jnp.concatenate([indices, jnp.broadcast_to(indices[..., :1], shape)], axis=-1)
