"""Sinks and windows of recent keys: the blocks that hold them, and windows exact to the token."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from sparseattn_jax.block_mask import BlockMask, num_visible_blocks
from sparseattn_jax.checks import check_positive
from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.backends import UnsupportedError
from sparseattn_jax.kernels.segments import segment_bounds
from sparseattn_jax.pattern import HeadWindows, SparsePattern
from sparseattn_jax.selection import diagonal_blocks


def check_window(sink_size: int, recent_size: int, is_causal: bool) -> None:
    """Sizes of a window, which needs causality."""
    check_positive(recent_size=recent_size)
    if sink_size < 0:
        raise ValueError(f"sink_size={sink_size} must not be negative; 0 lists no sinks")
    if not is_causal:
        raise ValueError(
            "is_causal=False: a streaming window looks back from each query; "
            "pass is_causal=True, or select with Full"
        )


def block_windows(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    sink_size: int,
    recent_size: int,
    block_size: int,
    kv_lengths: Int32[Array, " B"] | None,
    segment_ids: Int32[Array, "B S"] | None,
) -> SparsePattern:
    """Windows of whole blocks: of each query block as many as the sizes need, rounded up.

    The recent ones end with the diagonal and are counted from the block that holds the query
    block's first query. Sinks are the first keys of each query's own segment.
    """
    num_others = -(-recent_size // block_size) - 1
    blocks = _blocks(
        *(q, k),
        sink_size=sink_size,
        reach=num_others * block_size,
        block_size=block_size,
        kv_lengths=kv_lengths,
        segment_ids=segment_ids,
    )
    return SparsePattern(blocks=blocks, num_dropped=jnp.zeros((len(q), 1), jnp.int32))


def token_windows(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    sink_size: int,
    recent_size: int,
    block_size: int,
    kv_lengths: Int32[Array, " B"] | None,
    segment_ids: Int32[Array, "B S"] | None,
) -> SparsePattern:
    """Windows exact to the token, in the blocks that hold one of their keys.

    Raises:
        UnsupportedError: there are segments and sinks.
    """
    if segment_ids is not None and sink_size > 0:
        raise UnsupportedError(
            f"segment_ids with sink_size={sink_size}: exact sinks are the first keys of a row, not "
            "of each packed sequence; pass sink_size=0, one sequence per batch row, or select with "
            "Streaming in whole blocks"
        )
    num_heads, kv_len = q.shape[2], k.shape[1]
    blocks = _blocks(
        *(q, k),
        sink_size=sink_size,
        reach=recent_size - 1,
        block_size=block_size,
        kv_lengths=kv_lengths,
        segment_ids=None,
    )
    return SparsePattern(
        blocks=blocks,
        num_dropped=jnp.zeros((len(q), 1), jnp.int32),
        windows=HeadWindows(
            sinks=jnp.full(num_heads, min(sink_size, kv_len), jnp.int32),
            recents=jnp.full(num_heads, min(recent_size, kv_len), jnp.int32),
        ),
    )


def _blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    sink_size: int,
    reach: int,
    block_size: int,
    kv_lengths: Int32[Array, " B"] | None,
    segment_ids: Int32[Array, "B S"] | None,
) -> BlockMask:
    """Blocks of sinks, and those from the one `reach` keys before each query block on."""
    batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
    ends = num_visible_blocks(
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_size,
        block_kv=block_size,
        is_causal=True,
        kv_lengths=kv_lengths,
    )
    ends = jnp.broadcast_to(ends, (batch, ends.shape[1]))
    # A query block starts `phase` keys into a key block, each the same.
    phase = (kv_len - q_len) % block_size
    num_before = -((phase - reach) // block_size)
    starts = diagonal_blocks(q_len, kv_len, block_size)[0] - num_before
    starts = jnp.minimum(jnp.maximum(starts, 0)[None, :], ends)
    if segment_ids is None:
        num_sinks = -(-sink_size // block_size)
        num_recent = num_before + 1 + (phase > 0)
        width = min(num_sinks + num_recent, -(-kv_len // block_size))
        indices, counts = _lists(num_sinks, starts, ends, width)
    else:
        columns = jnp.arange(-(-kv_len // block_size))[None, None, :]
        recent = (columns >= starts[..., None]) & (columns < ends[..., None])
        sinks = _segment_sinks(segment_ids, sink_size, block_size, q_len)
        indices, counts = block_lists.from_dense(recent | sinks & (columns < ends[..., None]))
    return BlockMask(
        kv_indices=indices[:, None],
        kv_num_blocks=counts[:, None],
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_size,
        block_kv=block_size,
        is_causal=True,
    )


def _lists(
    num_sinks: int, starts: Int32[Array, "B Tb"], ends: Int32[Array, "B Tb"], width: int
) -> tuple[Int32[Array, "B Tb M"], Int32[Array, "B Tb"]]:
    """Lists of the sink blocks, then of starts..ends."""
    sinks = jnp.minimum(num_sinks, starts)
    counts = sinks + ends - starts
    slots = jnp.arange(width, dtype=jnp.int32)[None, None, :]
    indices = slots + jnp.where(slots < sinks[..., None], 0, (starts - sinks)[..., None])
    return jnp.where(slots < counts[..., None], indices, indices[..., :1]), counts


def _segment_sinks(
    segment_ids: Int32[Array, "B S"], sink_size: int, block_size: int, q_len: int
) -> Bool[Array, "B Tb Sb"]:
    """The blocks that hold one of the first sink_size keys of a query's segment."""
    batch, kv_len = segment_ids.shape
    starts = segment_bounds(segment_ids)[0][:, kv_len - q_len :]
    starts = jnp.pad(starts, ((0, 0), (0, -q_len % block_size)), mode="edge")
    starts = starts.reshape(batch, -1, block_size, 1)
    first_keys = jnp.arange(0, kv_len, block_size, dtype=jnp.int32)[None, None, None, :]
    is_sink = (first_keys < starts + sink_size) & (first_keys + block_size > starts)
    return is_sink.any(axis=2)
