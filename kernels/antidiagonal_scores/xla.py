"""Antidiagonal block scores in plain XLA: the meaning of the op, on any device.

Reversing the queries inside their groups turns the antidiagonal sums into one matrix product of
the groups' concatenated tokens, [rows, stride * H] times [columns, stride * H] transposed. It runs
over tiles of query blocks, kv heads and sequences that are sized to the workspace.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.kernels.segments import segment_bounds


@functools.partial(
    jax.jit, static_argnames=("stride", "block_size", "is_causal", "q_blocks", "workspace_bytes")
)
def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    kv_lengths: Int32[Array, " B"] | None,
    *,
    segment_ids: Int32[Array, "B S"] | None = None,
    stride: int,
    block_size: int,
    is_causal: bool,
    q_blocks: tuple[int, int],
    workspace_bytes: int,
) -> Float32[Array, "B N rows Sb"]:
    """Block sums; the arguments are those of the op."""
    q_len, kv_len = q.shape[1], k.shape[1]
    num_kv_blocks = -(-kv_len // block_size)
    scores = []
    for first, stop in _block_ranges(q_blocks, is_causal=is_causal):
        # The range's queries stand at the end of the keys it gets, as the whole call's do. Key
        # groups are read whole, so more queries come along until the keys end with a block.
        end = min(stop * block_size, q_len)
        if is_causal:
            end = min(end + -(kv_len - q_len + end) % block_size, q_len)
        queries = q[:, first * block_size : end]
        keys = k[:, : kv_len - q_len + end] if is_causal else k
        lengths = None if kv_lengths is None else jnp.minimum(kv_lengths, keys.shape[1])
        new = _score_all(
            queries,
            keys,
            lengths,
            None if segment_ids is None else segment_ids[:, : keys.shape[1]],
            stride=stride,
            block_size=block_size,
            is_causal=is_causal,
            workspace_bytes=workspace_bytes,
        )[:, :, : stop - first]
        unseen = num_kv_blocks - new.shape[-1]
        scores.append(jnp.pad(new, ((0, 0), (0, 0), (0, 0), (0, unseen))) if unseen else new)
    return scores[0] if len(scores) == 1 else jnp.concatenate(scores, axis=2)


def _block_ranges(q_blocks: tuple[int, int], *, is_causal: bool) -> list[tuple[int, int]]:
    """Causal calls have up to 8 ranges of at least 32 query blocks.

    Each one scores no key behind its end, which with 8 saves 7/16 of the work.
    """
    first, stop = q_blocks
    num_ranges = max(1, min(8, (stop - first) // 32)) if is_causal else 1
    step = max(1, -(-(stop - first) // num_ranges))
    return [(start, min(start + step, stop)) for start in range(first, stop, step)]


def _score_all(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    kv_lengths: Int32[Array, " B"] | None,
    segment_ids: Int32[Array, "B S"] | None,
    *,
    stride: int,
    block_size: int,
    is_causal: bool,
    workspace_bytes: int,
) -> Float32[Array, "B N Tb Sb"]:
    """Block sums of all query blocks and all key blocks."""
    batch, q_len, num_heads, head_dim = q.shape
    kv_len, num_kv_heads = k.shape[1:3]
    group, groups_per_block = num_heads // num_kv_heads, block_size // stride
    num_q_blocks, num_kv_blocks = -(-q_len // block_size), -(-kv_len // block_size)
    if kv_lengths is None:
        kv_lengths = jnp.full(batch, kv_len, jnp.int32)
    offset = kv_len - q_len if is_causal else None
    q_lengths = jnp.full_like(kv_lengths, q_len)
    if offset is not None:
        q_lengths = jnp.minimum(q_lengths, kv_lengths - offset)
    num_rows, num_columns = (n * groups_per_block for n in (num_q_blocks, num_kv_blocks))
    limits = _key_limits(q_lengths, kv_lengths, num_rows, stride, offset)
    is_key = jnp.arange(kv_len)[None, :] < kv_lengths[:, None]
    segments = None
    if segment_ids is not None:
        segments = _Segments.of(
            segment_ids,
            q_lengths + (kv_len - q_len),
            kv_lengths,
            q_len,
            num_rows,
            num_columns,
            stride,
        )
        is_key = is_key & segments.keys
    tile = _Tile.fit(q, k, stride, block_size, workspace_bytes)

    def score_heads(index: Int32[Array, ""] | int) -> Float32[Array, "b n Tb Sb"]:
        sequence, kv_head = divmod(index * tile.kv_heads, num_kv_heads)
        keys = lax.dynamic_slice(
            k, (sequence, 0, kv_head, 0), (tile.batch, kv_len, tile.kv_heads, head_dim)
        )
        is_valid = lax.dynamic_slice_in_dim(is_key, sequence, tile.batch)
        keys = _key_groups(keys, is_valid, stride, num_kv_blocks * block_size)

        def add_rows(scores: Array, first_block: Int32[Array, ""] | int, num_queries: int) -> Array:
            first = first_block * block_size
            queries = lax.dynamic_slice(
                q,
                (sequence, first, kv_head * group, 0),
                (tile.batch, num_queries, tile.kv_heads * group, head_dim),
            )
            num_rows = -(-num_queries // block_size) * groups_per_block
            rows = (sequence, first // stride), (tile.batch, num_rows)
            lengths = lax.dynamic_slice(q_lengths, (sequence,), (tile.batch,)) - first
            queries = _query_groups(queries, lengths, stride, num_rows, tile.kv_heads)
            row_limits = lax.dynamic_slice(limits, *rows)
            sees = jnp.arange(num_columns)[None, None, :] * stride < row_limits[:, :, None]
            if segments is not None:
                sees = sees & segments.share(*rows)
            new = _block_sums(queries, keys, sees, stride, groups_per_block)
            return lax.dynamic_update_slice(scores, new, (0, 0, first_block, 0))

        shape = (tile.batch, tile.kv_heads * group, num_q_blocks, num_kv_blocks)
        return _over_q_blocks(
            add_rows, jnp.zeros(shape, jnp.float32), q_len, block_size, tile.q_blocks
        )

    num_tiles = (batch // tile.batch) * (num_kv_heads // tile.kv_heads)
    scores = score_heads(0) if num_tiles == 1 else lax.map(score_heads, jnp.arange(num_tiles))
    return scores.reshape(batch, num_heads, num_q_blocks, num_kv_blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tile:
    """What is scored at one time: one sequence or all, some kv heads, some query blocks."""

    batch: int
    kv_heads: int
    q_blocks: int

    @classmethod
    def fit(cls, q: Array, k: Array, stride: int, block_size: int, workspace_bytes: int) -> "_Tile":
        batch, q_len, num_heads, head_dim = q.shape
        kv_len, num_kv_heads = k.shape[1:3]
        columns = -(-kv_len // block_size) * (block_size // stride)
        logits = 4 * columns * (block_size // stride) * (num_heads // num_kv_heads)
        keys = columns * stride * head_dim * k.dtype.itemsize
        heads_that_fit = max(1, workspace_bytes // (logits + keys))
        if heads_that_fit >= batch * num_kv_heads:
            sequences, kv_heads = batch, num_kv_heads
        else:
            sequences = 1
            kv_heads = max(
                heads
                for heads in range(1, min(heads_that_fit, num_kv_heads) + 1)
                if num_kv_heads % heads == 0
            )
        room = workspace_bytes // (sequences * kv_heads) - keys
        q_blocks = min(max(1, room // logits), max(1, q_len // block_size))
        return cls(batch=sequences, kv_heads=kv_heads, q_blocks=q_blocks)


def _key_limits(
    q_lengths: Int32[Array, " B"],
    kv_lengths: Int32[Array, " B"],
    num_groups: int,
    stride: int,
    offset: int | None,
) -> Int32[Array, "B rows"]:
    """For each query group, the position that the first key of a visible key group lies before.

    `offset` is the first query's position, or None if queries see all keys.
    """
    first = jnp.arange(num_groups, dtype=jnp.int32)[None, :] * stride
    ends = q_lengths[:, None]
    limits = kv_lengths[:, None] if offset is None else jnp.minimum(first + stride, ends) + offset
    return jnp.where(first < ends, limits, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Segments:
    """Which groups share a segment.

    Attributes:
        keys: whether a key is of the segment that its group belongs to.
        starts: where the segment of a query group's first query starts,
        ends: and the position that the one of its last valid query ends before.
        group_ends: the position behind a key group's last valid key.
    """

    keys: Bool[Array, "B S"]
    starts: Int32[Array, "B rows"]
    ends: Int32[Array, "B rows"]
    group_ends: Int32[Array, "B columns"]

    @classmethod
    def of(
        cls,
        segment_ids: Int32[Array, "B S"],
        query_ends: Int32[Array, " B"],
        kv_lengths: Int32[Array, " B"],
        q_len: int,
        num_rows: int,
        num_columns: int,
        stride: int,
    ) -> "_Segments":
        kv_len = segment_ids.shape[1]
        starts, ends = segment_bounds(segment_ids)
        group_ends = (jnp.arange(num_columns, dtype=jnp.int32) + 1)[None, :] * stride
        group_ends = jnp.minimum(group_ends, kv_lengths[:, None])
        start_of_group = _at(starts, group_ends - 1)
        start_of_key = jnp.repeat(start_of_group, stride, axis=1)[:, :kv_len]
        first = jnp.arange(num_rows, dtype=jnp.int32)[None, :] * stride + (kv_len - q_len)
        last = jnp.minimum(first + stride, query_ends[:, None]) - 1
        return cls(
            keys=jnp.arange(kv_len)[None, :] >= start_of_key,
            starts=_at(starts, jnp.broadcast_to(first, last.shape)),
            ends=_at(ends, last),
            group_ends=group_ends,
        )

    def share(self, start: tuple, shape: tuple[int, int]) -> Bool[Array, "b rows columns"]:
        """For a part of the query groups, whether each key group is of a segment of theirs."""
        starts, ends = (
            lax.dynamic_slice(x, start, shape)[:, :, None] for x in (self.starts, self.ends)
        )
        group_ends = lax.dynamic_slice_in_dim(self.group_ends, start[0], shape[0])[:, None, :]
        return (group_ends > starts) & (group_ends <= ends)


def _at(x: Int32[Array, "B S"], positions: Int32[Array, "B n"]) -> Int32[Array, "B n"]:
    return jnp.take_along_axis(x, jnp.clip(positions, 0, x.shape[1] - 1), axis=1)


def _key_groups(
    keys: Float[Array, "b S k H"], is_valid: Bool[Array, "b S"], stride: int, padded_len: int
) -> Float[Array, "b k columns sH"]:
    """Concatenates each key group's tokens; those that are not valid become zeros."""
    batch, kv_len, heads, head_dim = keys.shape
    keys = jnp.where(is_valid[:, :, None, None], keys, jnp.zeros_like(keys))
    keys = jnp.pad(keys, ((0, 0), (0, padded_len - kv_len), (0, 0), (0, 0)))
    keys = keys.reshape(batch, padded_len // stride, stride, heads, head_dim)
    return keys.transpose(0, 3, 1, 2, 4).reshape(batch, heads, padded_len // stride, -1)


def _query_groups(
    queries: Float[Array, "b t n H"],
    lengths: Int32[Array, " b"],
    stride: int,
    num_rows: int,
    kv_heads: int,
) -> Float[Array, "b k g rows sH"]:
    """Concatenates each query group's tokens, last one first; padding becomes zeros."""
    batch, q_len, heads, head_dim = queries.shape
    is_valid = jnp.arange(q_len)[None, :] < lengths[:, None]
    queries = jnp.where(is_valid[:, :, None, None], queries, jnp.zeros_like(queries))
    queries = jnp.pad(queries, ((0, 0), (0, num_rows * stride - q_len), (0, 0), (0, 0)))
    queries = queries.reshape(batch, num_rows, stride, kv_heads, heads // kv_heads, head_dim)
    queries = jnp.flip(queries, axis=2).transpose(0, 3, 4, 1, 2, 5)
    return queries.reshape(batch, kv_heads, heads // kv_heads, num_rows, -1)


def _block_sums(
    queries: Float[Array, "b k g rows sH"],
    keys: Float[Array, "b k columns sH"],
    sees: Bool[Array, "b rows columns"],
    stride: int,
    groups_per_block: int,
) -> Float32[Array, "b n q_blocks Sb"]:
    """Softmax over the visible key groups of each row, summed over blocks."""
    batch, kv_heads, group, num_rows, width = queries.shape
    head_dim = width // stride
    # float32 operands must not be rounded to tf32; narrower ones multiply exactly as they are.
    precision = lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None
    logits = jnp.einsum(
        "bkgrd,bkcd->bkgrc",
        queries,
        keys,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    logits = jnp.where(sees[:, None, None], logits * (head_dim**-0.5 / stride), -jnp.inf)
    row_max = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(row_max), 0.0, row_max))
    weights = weights.reshape(*weights.shape[:-1], -1, groups_per_block).sum(axis=-1)
    totals = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(totals == 0.0, 1.0, totals)
    num_q_blocks = num_rows // groups_per_block
    return weights.reshape(
        batch, kv_heads * group, num_q_blocks, groups_per_block, weights.shape[-1]
    ).sum(axis=3)


def _over_q_blocks(
    add_rows,
    scores: Float32[Array, "b n Tb Sb"],
    q_len: int,
    block_size: int,
    blocks_per_step: int,
) -> Float32[Array, "b n Tb Sb"]:
    """Fills the scores of all query blocks: the whole ones in equal steps, then a partial one."""
    whole = q_len // block_size
    if whole:
        num_steps = -(-whole // blocks_per_step)
        size = -(-whole // num_steps)

        def step(index: Int32[Array, ""] | int, scores: Array) -> Array:
            # The last step moves back to end at the last whole block: it rewrites equal values.
            first_block = jnp.minimum(index * size, whole - size)
            return add_rows(scores, first_block, size * block_size)

        scores = lax.fori_loop(0, num_steps, step, scores)
    if q_len % block_size:
        scores = add_rows(scores, whole, q_len % block_size)
    return scores
