"""What the Hopper backward needs beside its operands: transposed lists, and who does what."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.kernels import block_lists, mosaic
from sparseattn_jax.kernels.block_sparse_attention import tiling
from sparseattn_jax.kernels.mosaic import WARPGROUP_ROWS

_LOG2_E = math.log2(math.e)

# So many of the longest lists at most are cut, into so many pieces, each a CTA's: a key block that
# most queries list, as the first often is, would take one longer than all the others together.
LONG_LISTS = 32
PIECES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What is static in a call."""

    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mask_heads: int
    block_q: int
    block_kv: int
    is_causal: bool
    scale: float
    num_tiles: int
    max_ctas: int
    config: tiling.VjpConfig

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.q_heads // self.kv_heads

    @property
    def num_long(self) -> int:
        return min(LONG_LISTS, self.num_tiles)

    @property
    def num_q_blocks(self) -> int:
        return pl.cdiv(self.q_len, self.block_q)

    @property
    def num_kv_blocks(self) -> int:
        return pl.cdiv(self.kv_len, self.block_kv)

    @property
    def num_kv_tiles(self) -> int:
        return pl.cdiv(self.kv_len, self.config.kv_tile)

    @property
    def num_ctas(self) -> int:
        return min(self.max_ctas, self.num_tiles)

    @property
    def group_tiles(self) -> int:
        """Tiles of the key/value heads that are worked on together, in groups of equal size.

        Of a group's queries, all CTAs work on about a half at a time, which fits the L2 cache.
        """
        bytes_per_query = 2 * 2 + 4  # queries, their gradients and those of the output
        head_bytes = bytes_per_query * self.q_len * self.group * self.head_dim
        heads = self.num_tiles // self.num_kv_tiles
        groups = pl.cdiv(heads, max(2 * mosaic.L2_BYTES // head_bytes, 1))
        return pl.cdiv(heads, groups) * self.num_kv_tiles

    @property
    def q_parts(self) -> int:
        """Steps per listed query block."""
        return self.block_q // WARPGROUP_ROWS

    @property
    def kv_parts(self) -> int:
        """Key tiles per key block."""
        return self.block_kv // self.config.kv_tile


class Plan(NamedTuple):
    """Which CTA work there is.

    Attributes:
        order: what is drawn in turn: a flat index of a key tile [B, K, tiles]; or of a piece
            [lists, pieces] of a long list, added to the number of tiles.
        length: how much of the order counts.
        long_tiles: the flat indices of the tiles whose lists are cut; the number of tiles where
            there are no more.
    """

    order: Int32[Array, " units"]
    length: Int32[Array, " 1"]
    long_tiles: Int32[Array, " lists"]


def transposed_lists(
    kv_indices: Int32[Array, "B heads Tb M"],
    kv_num_blocks: Int32[Array, "B heads Tb"],
    call: Call,
) -> tuple[Int32[Array, "lists rows"], Int32[Array, "B kv_heads Sb"]]:
    """For each key block the rows that list and may see it: query blocks of the whole group.

    A row is a query block of a query head, the heads of the first block before those of the second;
    where all heads share their lists it is a query block.
    """
    B, heads, num_rows, _ = kv_indices.shape
    members = heads // call.mask_heads
    keep = block_lists.to_dense(kv_indices, kv_num_blocks, call.num_kv_blocks)
    if call.is_causal:
        keep = keep & _visible_blocks(call)[None, None]
    keep = keep.reshape(B, call.mask_heads, members, num_rows, call.num_kv_blocks)
    keep = jnp.transpose(keep, (0, 1, 4, 3, 2)).reshape(
        B, call.mask_heads, call.num_kv_blocks, num_rows * members
    )
    q_indices, q_counts = block_lists.from_dense(keep)
    return q_indices.reshape(-1, q_indices.shape[-1]), q_counts


def _visible_blocks(call: Call) -> Bool[Array, "Tb Sb"]:
    """Where some key is not behind some query."""
    last_query = (jnp.arange(call.num_q_blocks) + 1) * call.block_q - 1
    first_key = jnp.arange(call.num_kv_blocks) * call.block_kv
    return first_key[None] <= last_query[:, None] + (call.kv_len - call.q_len)


def plan(q_counts: Int32[Array, "B kv_heads Sb"], call: Call) -> Plan:
    """What the CTAs draw: first the pieces of long lists, then key/value heads in groups.

    A list is long that has more than twice the mean length. Within a group the longest come first.
    """
    per_tile = jnp.repeat(q_counts, call.kv_parts, axis=-1)[..., : call.num_kv_tiles]
    shape = (q_counts.shape[0], call.kv_heads, call.num_kv_tiles)
    work = jnp.broadcast_to(per_tile, shape).reshape(-1)
    by_length = mosaic.longest_first(work, call.num_tiles)[: call.num_long]
    is_long = work[by_length] * call.num_tiles > 2 * jnp.sum(work)
    long_tiles = jnp.where(is_long, by_length, call.num_tiles)
    is_cut = jnp.zeros(call.num_tiles, bool).at[long_tiles].set(True, mode="drop")

    group = jnp.arange(call.num_tiles, dtype=jnp.int32) // call.group_tiles
    last = call.num_tiles // call.group_tiles
    longest = call.group * call.num_q_blocks
    whole = jnp.where(is_cut, -1, (last - group) * (longest + 1) + work)
    pieces = jnp.where(is_long, (last + 1) * (longest + 1) + work[by_length], -1)
    urgency = jnp.concatenate((whole, jnp.repeat(pieces, PIECES)))
    order = mosaic.longest_first(urgency, urgency.size)
    return Plan(order, jnp.sum(urgency >= 0, dtype=jnp.int32).reshape(1), long_tiles)


def with_long_lists(
    d_k: Float[Array, "B S8 K H"],
    d_v: Float[Array, "B S8 K H"],
    pieces: Float32[Array, "lists pieces 2 keys H"],
    plan: Plan,
    call: Call,
) -> tuple[Float[Array, "B S8 K H"], Float[Array, "B S8 K H"]]:
    """dk and dv, with those of the tiles whose lists were cut."""
    sums = jnp.sum(pieces, axis=1)
    row, kv_tile = jnp.divmod(plan.long_tiles[:, None], call.num_kv_tiles)
    batch, kv_head = jnp.divmod(row, call.kv_heads)  # past the last where there is no list
    key = kv_tile * call.config.kv_tile + jnp.arange(call.config.kv_tile)[None]
    where = (batch, key, kv_head)
    d_k = d_k.at[where].set((sums[:, 0] * call.scale).astype(d_k.dtype), mode="drop")
    return d_k, d_v.at[where].set(sums[:, 1].astype(d_v.dtype), mode="drop")


def row_statistics(
    out: Float[Array, "B T N H"],
    lse: Float32[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    d_lse: Float32[Array, "B T N"],
    call: Call,
) -> Float32[Array, "B N tiles 2 64"]:
    """Per query tile the log-sum-exp in base 2 and delta, what dP loses before it meets P.

    An infinite log-sum-exp makes the weights of empty and of missing rows zero.
    """
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    # Summed before it is transposed: in one, XLA reads the operands at a sixth of their bandwidth.
    delta = lax.optimization_barrier(delta) - d_lse
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * _LOG2_E)
    padding = ((0, 0), (0, call.num_q_blocks * call.block_q - call.q_len), (0, 0))
    lse = jnp.pad(lse, padding, constant_values=jnp.inf)
    rows = jnp.stack((lse, jnp.pad(delta, padding)))
    rows = rows.reshape(2, rows.shape[1], -1, WARPGROUP_ROWS, call.q_heads)
    return jnp.transpose(rows, (1, 4, 2, 0, 3))
