"""Block-sparse attention in plain XLA: the meaning of the op, on any device.

Every query block visits its listed key blocks with an online softmax (FlashAttention-2,
arXiv:2307.08691 algorithms 1 and 2). Time follows the longest list over the heads of each row,
memory holds one key block per head at a time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.products import matmul
from sparseattn_jax.kernels.softmax import gradient_terms


@functools.partial(jax.jit, static_argnames=("block_q", "block_kv", "is_causal", "scale"))
def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    kv_indices: Int32[Array, "B #N Tb M"],
    kv_num_blocks: Int32[Array, "B #N Tb"],
    kv_lengths: Int32[Array, " B"] | None,
    segment_ids: Int32[Array, "B S"] | None,
    windows: Int32[Array, "2 N"] | None,
    *,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Output and log-sum-exp; the arguments are those of the op."""
    tiles = _Tiles.of(
        q, k, v, kv_lengths, segment_ids, windows, block_q, block_kv, is_causal, scale
    )
    indices, counts = _per_head(kv_indices, kv_num_blocks, q.shape[2])

    def attend(q_block: Array) -> tuple[Array, Array]:
        num_listed = counts[:, :, q_block]

        def visit(
            slot: Array | int, carry: tuple[Array, Array, Array]
        ) -> tuple[Array, Array, Array]:
            accumulator, row_max, row_sum = carry
            kv_block = indices[:, :, q_block, slot]
            scores = tiles.scores(q_block, kv_block, slot < num_listed)
            new_max = jnp.maximum(row_max, jnp.max(scores, axis=-1))
            shift = jnp.where(jnp.isneginf(new_max), 0.0, new_max)
            weights = jnp.exp(scores - shift[..., None])
            decay = jnp.exp(row_max - shift)
            values = tiles.kv_tile(tiles.v, kv_block)
            return (
                accumulator * decay[..., None] + matmul("bnqk,bnkh->bnqh", weights, values),
                new_max,
                row_sum * decay + jnp.sum(weights, axis=-1),
            )

        accumulator = jnp.zeros(tiles.q[:, :, 0].shape, jnp.float32)
        row_sum = jnp.zeros(accumulator.shape[:-1], jnp.float32)
        accumulator, row_max, row_sum = lax.fori_loop(
            0, jnp.max(num_listed), visit, (accumulator, row_sum - jnp.inf, row_sum)
        )
        divisor = jnp.where(row_sum == 0.0, 1.0, row_sum)
        lse = jnp.where(row_sum == 0.0, -jnp.inf, row_max + jnp.log(divisor))
        return (accumulator / divisor[..., None]).astype(q.dtype), lse

    out, lse = lax.map(attend, jnp.arange(tiles.q.shape[2]))
    return _from_blocks(out, q.shape[1]), _from_blocks(lse, q.shape[1])


@functools.partial(jax.jit, static_argnames=("block_q", "block_kv", "is_causal", "scale"))
def run_vjp(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    kv_indices: Int32[Array, "B #N Tb M"],
    kv_num_blocks: Int32[Array, "B #N Tb"],
    kv_lengths: Int32[Array, " B"] | None,
    segment_ids: Int32[Array, "B S"] | None,
    windows: Int32[Array, "2 N"] | None,
    out: Float[Array, "B T N H"],
    lse: Float32[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    d_lse: Float32[Array, "B T N"],
    *,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of q, k and v, deterministic: no two rows ever add to the same place."""
    tiles = _Tiles.of(
        q, k, v, kv_lengths, segment_ids, windows, block_q, block_kv, is_causal, scale
    )
    indices, counts = _per_head(kv_indices, kv_num_blocks, q.shape[2])
    num_q_blocks, num_kv_blocks = tiles.q.shape[2], tiles.k.shape[2]
    q_indices, q_counts = block_lists.transpose(indices, counts, num_kv_blocks)

    d_out_tiles = _to_blocks(d_out, block_q)
    terms = gradient_terms(out, lse, d_out, d_lse)
    lse_tiles, delta_tiles = (_to_blocks(x, block_q) for x in terms)

    def gradients_of_tile(q_block: Array, kv_block: Array, is_listed: Array) -> tuple[Array, Array]:
        """P and dS of one tile per head."""
        scores = tiles.scores(q_block, kv_block, is_listed)
        weights = jnp.exp(scores - _q_tile(lse_tiles, q_block)[..., None])
        d_weights = matmul(
            "bnqh,bnkh->bnqk", _q_tile(d_out_tiles, q_block), tiles.kv_tile(tiles.v, kv_block)
        )
        return weights, weights * (d_weights - _q_tile(delta_tiles, q_block)[..., None])

    def d_query(q_block: Array) -> Array:
        num_listed = counts[:, :, q_block]

        def visit(slot: Array, d_q: Array) -> Array:
            kv_block = indices[:, :, q_block, slot]
            _, d_scores = gradients_of_tile(q_block, kv_block, slot < num_listed)
            return d_q + matmul("bnqk,bnkh->bnqh", d_scores, tiles.kv_tile(tiles.k, kv_block))

        d_q = jnp.zeros(tiles.q[:, :, 0].shape, jnp.float32)
        return lax.fori_loop(0, jnp.max(num_listed), visit, d_q) * scale

    def d_key_value(kv_block: Array) -> tuple[Array, Array]:
        num_listed = q_counts[:, :, kv_block]

        def visit(slot: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            d_k, d_v = carry
            q_block = q_indices[:, :, kv_block, slot]
            weights, d_scores = gradients_of_tile(q_block, kv_block, slot < num_listed)
            d_k += matmul("bnqk,bnqh->bnkh", d_scores, _q_tile(tiles.q, q_block))
            d_v += matmul("bnqk,bnqh->bnkh", weights, _q_tile(d_out_tiles, q_block))
            return d_k, d_v

        zeros = jnp.zeros((*q_counts.shape[:2], block_kv, q.shape[3]), jnp.float32)
        d_k, d_v = lax.fori_loop(0, jnp.max(num_listed), visit, (zeros, zeros))
        return tiles.sum_over_group(d_k) * scale, tiles.sum_over_group(d_v)

    d_q = lax.map(d_query, jnp.arange(num_q_blocks))
    d_k, d_v = lax.map(d_key_value, jnp.arange(num_kv_blocks))
    return (
        _from_blocks(d_q, q.shape[1]).astype(q.dtype),
        _from_blocks(d_k, k.shape[1]).astype(k.dtype),
        _from_blocks(d_v, v.shape[1]).astype(v.dtype),
    )


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """q, k and v cut into blocks, [B, heads, blocks, block, H], and what each row may see.

    A block index is either a scalar, the same for every head, or an Int32[B, N].
    """

    q: Array
    k: Array
    v: Array
    kv_lengths: Array | None
    segment_ids: Array | None
    windows: Array | None
    kv_len: int
    offset: int
    is_causal: bool
    scale: float

    @classmethod
    def of(
        cls,
        q: Array,
        k: Array,
        v: Array,
        kv_lengths: Array | None,
        segment_ids: Array | None,
        windows: Array | None,
        block_q: int,
        block_kv: int,
        is_causal: bool,
        scale: float,
    ) -> "_Tiles":
        return cls(
            q=_to_blocks(q, block_q),
            k=_to_blocks(k, block_kv),
            v=_to_blocks(v, block_kv),
            kv_lengths=kv_lengths,
            segment_ids=segment_ids,
            windows=windows,
            kv_len=k.shape[1],
            offset=k.shape[1] - q.shape[1],
            is_causal=is_causal,
            scale=scale,
        )

    def kv_tile(self, blocks: Array, kv_block: Array) -> Array:
        """The given key or value block for each query head."""
        batch, num_kv_heads = blocks.shape[:2]
        group = self.q.shape[1] // num_kv_heads
        if kv_block.ndim == 0:
            return jnp.repeat(blocks[:, :, kv_block], group, axis=1)
        by_group = kv_block.reshape(batch, num_kv_heads, group)
        tiles = jax.vmap(jax.vmap(lambda row, i: row[i]))(blocks, by_group)
        return tiles.reshape(batch, num_kv_heads * group, *tiles.shape[3:])

    def sum_over_group(self, per_query_head: Array) -> Array:
        """Sums [B, N, ...] over the query heads of each kv head, to [B, K, ...]."""
        batch, num_heads = per_query_head.shape[:2]
        num_kv_heads = self.k.shape[1]
        shape = (batch, num_kv_heads, num_heads // num_kv_heads, *per_query_head.shape[2:])
        return jnp.sum(per_query_head.reshape(shape), axis=2)

    def scores(self, q_block: Array, kv_block: Array, is_listed: Bool[Array, "B N"]) -> Array:
        """Scaled logits of one tile per head, -inf where nothing may be seen."""
        logits = matmul("bnqh,bnkh->bnqk", _q_tile(self.q, q_block), self.kv_tile(self.k, kv_block))
        visible = self._visible(q_block, kv_block) & is_listed[:, :, None, None]
        return jnp.where(visible, logits * self.scale, -jnp.inf)

    def _visible(self, q_block: Array, kv_block: Array) -> Bool[Array, "B #N bq bk"]:
        rows = _positions(q_block, self.q.shape[3])[:, :, :, None] + self.offset
        columns = _positions(kv_block, self.k.shape[3])[:, :, None, :]
        if self.kv_lengths is None:
            lengths = jnp.full((1, 1, 1, 1), self.kv_len, jnp.int32)
        else:
            lengths = self.kv_lengths[:, None, None, None]
        visible = columns < lengths
        if self.is_causal:
            visible = visible & (columns <= rows) & (rows < lengths)
        if self.segment_ids is not None:
            visible = visible & (self._segments(rows) == self._segments(columns))
        if self.windows is not None:
            sink, recent = self.windows[:, None, :, None, None]
            visible = visible & ((columns < sink) | (columns > rows - recent))
        return visible

    def _segments(self, positions: Int32[Array, "#B #N q k"]) -> Int32[Array, "B #N q k"]:
        # Clipped positions are past the end, which the lengths hide already.
        assert self.segment_ids is not None
        batch = self.segment_ids.shape[0]
        clipped = jnp.clip(positions, 0, self.kv_len - 1)
        clipped = jnp.broadcast_to(clipped, (batch, *positions.shape[1:]))
        return jax.vmap(lambda ids, at: ids[at])(self.segment_ids, clipped)


def _q_tile(blocks: Array, q_block: Array) -> Array:
    """The given query block of each head."""
    if q_block.ndim == 0:
        return blocks[:, :, q_block]
    return jax.vmap(jax.vmap(lambda row, i: row[i]))(blocks, q_block)


def _positions(block: Array, size: int) -> Int32[Array, "#B #N size"]:
    """Token positions within a block that is a scalar or one index per head."""
    block = block.reshape((1, 1, 1)) if block.ndim == 0 else block[:, :, None]
    return block * size + lax.broadcasted_iota(jnp.int32, (1, 1, size), 2)


def _per_head(indices: Array, counts: Array, num_heads: int) -> tuple[Array, Array]:
    """Lists that are the same for all heads, repeated for each."""
    batch, _, rows, width = indices.shape
    return (
        jnp.broadcast_to(indices, (batch, num_heads, rows, width)),
        jnp.broadcast_to(counts, (batch, num_heads, rows)),
    )


def _to_blocks(x: Array, size: int) -> Array:
    """[B, length, heads, ...] to [B, heads, blocks, size, ...], zero-padded at the end."""
    batch, length, heads, *rest = x.shape
    num_blocks = -(-length // size)
    padding = [(0, 0), (0, num_blocks * size - length)] + [(0, 0)] * (x.ndim - 2)
    blocks = jnp.pad(x, padding).reshape(batch, num_blocks, size, heads, *rest)
    return jnp.moveaxis(blocks, 3, 1)


def _from_blocks(blocks: Array, length: int) -> Array:
    """[blocks, B, heads, size, ...], as lax.map stacks them, to [B, length, heads, ...]."""
    num_blocks, batch, heads, size, *rest = blocks.shape
    x = jnp.moveaxis(blocks, (0, 3), (1, 2))
    return x.reshape(batch, num_blocks * size, heads, *rest)[:, :length]
