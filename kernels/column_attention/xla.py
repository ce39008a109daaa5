"""Column attention in plain XLA: the meaning of the op, on any device.

The columns' keys and values are gathered once, into a short sequence for each query head. Query
blocks go in chunks over all of it; memory holds the scores of one chunk at a time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.products import matmul
from sparseattn_jax.kernels.softmax import gradient_terms, softmax

_STATIC = ("block_q", "block_kv", "is_causal", "scale", "workspace_bytes")


@functools.partial(jax.jit, static_argnames=_STATIC)
def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    columns: Int32[Array, "B N C"],
    num_columns: Int32[Array, "B N"],
    kv_indices: Int32[Array, "B #N Tb M"],
    kv_num_blocks: Int32[Array, "B #N Tb"],
    kv_lengths: Int32[Array, " B"] | None,
    segment_ids: Int32[Array, "B S"] | None,
    *,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
    workspace_bytes: int,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Output and log-sum-exp; the arguments are those of the op."""
    chunks = _Chunks.of(q, columns, block_q, workspace_bytes)
    sees = _Visibility(
        columns, num_columns, kv_lengths, segment_ids, chunks, k.shape[1], block_kv, is_causal
    )
    keys, values = _gather(k, columns), _gather(v, columns)

    def attend(chunk: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        index, queries, *lists = chunk
        scores = _scores(queries, keys, sees.in_chunk(index, *lists), scale)
        weights, lse = softmax(scores)
        out = matmul("bnqc,bnch->bnqh", weights, values)
        return out.astype(q.dtype), lse

    rows = chunks.cut(q), chunks.cut_blocks(kv_indices), chunks.cut_blocks(kv_num_blocks)
    out, lse = lax.map(attend, (jnp.arange(chunks.count, dtype=jnp.int32), *rows))
    return chunks.join(out), chunks.join(lse)


@functools.partial(jax.jit, static_argnames=_STATIC)
def run_vjp(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    columns: Int32[Array, "B N C"],
    num_columns: Int32[Array, "B N"],
    kv_indices: Int32[Array, "B #N Tb M"],
    kv_num_blocks: Int32[Array, "B #N Tb"],
    kv_lengths: Int32[Array, " B"] | None,
    segment_ids: Int32[Array, "B S"] | None,
    out: Float[Array, "B T N H"],
    lse: Float32[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    d_lse: Float32[Array, "B T N"],
    *,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
    workspace_bytes: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of q, k and v, deterministic: chunks, then heads, add to keys one after another."""
    chunks = _Chunks.of(q, columns, block_q, workspace_bytes)
    sees = _Visibility(
        columns, num_columns, kv_lengths, segment_ids, chunks, k.shape[1], block_kv, is_causal
    )
    keys, values = _gather(k, columns), _gather(v, columns)
    finite_lse, delta = gradient_terms(out, lse, d_out, d_lse)

    def visit(
        sums: tuple[Array, Array], chunk: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        index, queries, d_rows, row_lse, row_delta, *lists = chunk
        scores = _scores(queries, keys, sees.in_chunk(index, *lists), scale)
        weights = jnp.exp(scores - row_lse[..., None])
        d_weights = matmul("bnqh,bnch->bnqc", d_rows, values)
        d_scores = weights * (d_weights - row_delta[..., None]) * scale
        d_keys = sums[0] + matmul("bnqc,bnqh->bnch", d_scores, queries)
        d_values = sums[1] + matmul("bnqc,bnqh->bnch", weights, d_rows)
        return (d_keys, d_values), matmul("bnqc,bnch->bnqh", d_scores, keys)

    rows = [chunks.cut(x) for x in (q, d_out, finite_lse, delta)]
    lists = chunks.cut_blocks(kv_indices), chunks.cut_blocks(kv_num_blocks)
    zeros = jnp.zeros(keys.shape, jnp.float32)
    indices = jnp.arange(chunks.count, dtype=jnp.int32)
    (d_keys, d_values), d_q = lax.scan(visit, (zeros, zeros), (indices, *rows, *lists))
    return (
        chunks.join(d_q).astype(q.dtype),
        _scatter(d_keys, columns, num_columns, k),
        _scatter(d_values, columns, num_columns, v),
    )


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """Queries cut into chunks of `blocks` query blocks each, zero-padded at the end."""

    q_len: int
    block_q: int
    blocks: int

    @classmethod
    def of(cls, q: Array, columns: Array, block_q: int, workspace_bytes: int) -> "_Chunks":
        num_blocks = -(-q.shape[1] // block_q)
        block_bytes = 4 * block_q * columns.size
        # Of equal chunks that fit the fewest, so that the last one holds little padding.
        most = min(num_blocks, max(1, workspace_bytes // max(1, block_bytes)))
        blocks = -(-num_blocks // -(-num_blocks // most))
        return cls(q_len=q.shape[1], block_q=block_q, blocks=blocks)

    @property
    def size(self) -> int:
        """Queries of a chunk."""
        return self.blocks * self.block_q

    @property
    def count(self) -> int:
        return -(-self.q_len // self.size)

    def cut(self, x: Float[Array, "B T N *rest"]) -> Float[Array, "chunks B N size *rest"]:
        batch, _, heads, *rest = x.shape
        padding = [(0, 0), (0, self.count * self.size - self.q_len)] + [(0, 0)] * (x.ndim - 2)
        parts = jnp.pad(x, padding).reshape(batch, self.count, self.size, heads, *rest)
        return jnp.moveaxis(parts, (1, 3), (0, 2))

    def cut_blocks(self, x: Int32[Array, "B #N Tb *M"]) -> Int32[Array, "chunks B #N blocks *M"]:
        """What there is per query block; blocks that are padding have empty lists."""
        batch, heads, num_blocks, *rest = x.shape
        missing = self.count * self.blocks - num_blocks
        padding = [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * len(rest)
        parts = jnp.pad(x, padding).reshape(batch, heads, self.count, self.blocks, *rest)
        return jnp.moveaxis(parts, 2, 0)

    def join(self, parts: Float[Array, "chunks B N size *rest"]) -> Float[Array, "B T N *rest"]:
        """The inverse of `cut`."""
        x = jnp.moveaxis(parts, (0, 2), (1, 3))
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.q_len]


@dataclasses.dataclass(frozen=True)
class _Visibility:
    """Which columns each query sees."""

    columns: Array
    num_columns: Array
    kv_lengths: Array | None
    segment_ids: Array | None
    chunks: _Chunks
    kv_len: int
    block_kv: int
    is_causal: bool

    def in_chunk(
        self,
        index: Int32[Array, ""],
        kv_indices: Int32[Array, "B #N blocks M"],
        kv_num_blocks: Int32[Array, "B #N blocks"],
    ) -> Bool[Array, "B N size C"]:
        """Of the queries of a chunk, whose lists these are."""
        batch, num_heads, width = self.columns.shape
        chunks = self.chunks
        # [B, N, blocks, block_q, C]
        columns = self.columns[:, :, None, None, :]
        counts = self.num_columns[:, :, None, None, None]
        visible = jnp.arange(width, dtype=jnp.int32)[None, None, None, None, :] < counts
        lengths = jnp.full((1,) * 5, self.kv_len, jnp.int32)
        if self.kv_lengths is not None:
            lengths = self.kv_lengths[:, None, None, None, None]
        visible = visible & (columns < lengths)
        rows = jnp.arange(chunks.size, dtype=jnp.int32) + index * chunks.size
        rows = (rows + self.kv_len - chunks.q_len).reshape(1, 1, chunks.blocks, chunks.block_q, 1)
        if self.is_causal:
            visible = visible & (columns <= rows) & (rows < lengths)
        if self.segment_ids is not None:
            # Positions of padding queries are past the end; nothing reads their results.
            of_rows = jnp.take(self.segment_ids, rows, axis=1, mode="clip")[:, 0]
            visible = visible & (of_rows == self._segments()[:, :, None, None, :])
        listed = self._listed(kv_indices, kv_num_blocks)[:, :, :, None, :]
        shape = (batch, num_heads, chunks.blocks, chunks.block_q, width)
        visible = jnp.broadcast_to(visible & ~listed, shape)
        return visible.reshape(batch, num_heads, chunks.size, width)

    def _segments(self) -> Int32[Array, "B N C"]:
        assert self.segment_ids is not None
        return jax.vmap(lambda ids, at: ids[at])(self.segment_ids, self.columns)

    def _listed(
        self, kv_indices: Int32[Array, "B #N blocks M"], kv_num_blocks: Int32[Array, "B #N blocks"]
    ) -> Bool[Array, "B N blocks C"]:
        """Whether the block of each column is listed for each query block."""
        num_kv_blocks = -(-self.kv_len // self.block_kv)
        dense = block_lists.to_dense(kv_indices, kv_num_blocks, num_kv_blocks)
        dense = jnp.broadcast_to(dense, (*self.columns.shape[:2], *dense.shape[2:]))
        blocks = self.columns // self.block_kv
        return jax.vmap(jax.vmap(lambda rows, at: rows[:, at]))(dense, blocks)


def _scores(
    queries: Float[Array, "B N size H"],
    keys: Float[Array, "B N C H"],
    visible: Bool[Array, "B N size C"],
    scale: float,
) -> Float32[Array, "B N size C"]:
    """Scaled logits, -inf where nothing may be seen."""
    logits = matmul("bnqh,bnch->bnqc", queries, keys)
    return jnp.where(visible, logits * scale, -jnp.inf)


def _gather(x: Float[Array, "B S K H"], columns: Int32[Array, "B N C"]) -> Float[Array, "B N C H"]:
    """Keys or values of each query head's columns."""
    batch, _, num_kv_heads, head_dim = x.shape
    by_kv_head = columns.reshape(batch, num_kv_heads, -1)
    parts = jax.vmap(jax.vmap(lambda keys, at: keys[at]))(jnp.swapaxes(x, 1, 2), by_kv_head)
    return parts.reshape(*columns.shape, head_dim)


def _scatter(
    parts: Float32[Array, "B N C H"],
    columns: Int32[Array, "B N C"],
    num_columns: Int32[Array, "B N"],
    like: Float[Array, "B S K H"],
) -> Float[Array, "B S K H"]:
    """Sums the parts at their columns, the query heads of a kv head one after another."""
    batch, kv_len, num_kv_heads, head_dim = like.shape
    slots = jnp.arange(columns.shape[-1], dtype=jnp.int32)[None, None, :]
    # Uncounted slots lie past the keys, where they are dropped.
    places = jnp.where(slots < num_columns[..., None], columns, kv_len + slots)

    def by_group(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, num_kv_heads, -1, *x.shape[2:]), 2, 0)

    def add(sums: Array, of_heads: tuple[Array, Array]) -> tuple[Array, None]:
        def at_columns(sums: Array, places: Array, parts: Array) -> Array:
            return sums.at[places].add(parts, mode="drop", unique_indices=True)

        return jax.vmap(jax.vmap(at_columns))(sums, *of_heads), None

    zeros = jnp.zeros((batch, num_kv_heads, kv_len, head_dim), jnp.float32)
    sums, _ = lax.scan(add, zeros, (by_group(places), by_group(parts)))
    return jnp.swapaxes(sums, 1, 2).astype(like.dtype)
