"""Facts of an antidiagonal scoring call, and the tiles that its Hopper kernels choose for it."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from sparseattn_jax.kernels import mosaic
from sparseattn_jax.kernels.antidiagonal_scores.tile_table import TABLES
from sparseattn_jax.kernels.backends import DeviceFacts, Model
from sparseattn_jax.kernels.tile_tables import measured_or


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallFacts:
    """What a backend needs to know to accept or refuse a call."""

    device: DeviceFacts
    dtype: jnp.dtype
    head_dim: int
    stride: int
    block_size: int
    has_segment_ids: bool


HEAD_DIMS, STRIDES, BLOCK_SIZES = (64, 128, 256), (4, 8, 16), (64, 128)
"""Those that the kernels take."""

KEYS = tuple((depth,) for depth in sorted({h * s for h in HEAD_DIMS for s in STRIDES}))
"""What the tiles depend on: stride * head_dim, the depth of the product."""

LOADING_REGISTERS = 24
"""Registers per thread of the loading warpgroup, the fewest that there can be."""

DEPTH = 64
"""Columns of both operands per step: one swizzled tile."""

_COMPUTING = 2  # warpgroups


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileConfig:
    """How the products of query groups and key groups are divided.

    A CTA multiplies tiles of 128 query groups, 64 per computing warpgroup.

    Attributes:
        columns: key groups per tile.
        stages: steps in flight.
        cluster: CTAs that share the key tiles they load: 1 or 2.
        lead: steps by which the first computing warpgroup runs ahead of the second, so that the
            end of a tile in one runs beside the products of the other; 0 for none.
        band: tiles of query groups that are worked on together, so that they find their keys in
            the L2 cache.
    """

    columns: int = 256
    stages: int = 4
    cluster: int = 2
    lead: int = 2
    band: int = 8

    def __post_init__(self):
        if self.columns not in (128, 256):
            raise ValueError(f"columns={self.columns} must be 128 or 256")
        if self.cluster not in (1, 2):
            raise ValueError(f"cluster={self.cluster} must be 1 or 2")
        if not 0 <= self.lead < self.stages:
            raise ValueError(f"lead={self.lead} must be less than stages={self.stages}")
        if min(self.stages, self.band) < 1:
            raise ValueError(f"{self}: every count must be at least 1")

    @property
    def rows(self) -> int:
        """Query groups per CTA and tile."""
        return _COMPUTING * mosaic.WARPGROUP_ROWS

    @property
    def threads(self) -> int:
        """Warpgroups per CTA; the loading one comes last."""
        return _COMPUTING + 1

    @property
    def computing_registers(self) -> int:
        """Registers per thread of a computing warpgroup."""
        return mosaic.computing_registers(
            computing=_COMPUTING, loading=1, loading_registers=LOADING_REGISTERS
        )


def tile_config(depth: int, model: Model | None = None) -> TileConfig:
    """The choice for a product of that depth on this model of device: measured, or the rule's."""
    return measured_or(tile_rule(depth), TABLES["antidiagonal_scores"], model, depth)


def tile_rule(depth: int) -> TileConfig:
    """The choice where nothing was measured: the same for every depth."""
    del depth
    return TileConfig()


def candidates(depth: int) -> list[TileConfig]:
    """The configs worth measuring, the rule's first; every one can be launched.

    Each differs from the rule's in one respect.
    """
    rule = tile_rule(depth)
    changes: tuple[dict[str, int], ...] = (
        {"lead": 0},
        {"band": 4},
        {"band": 16},
        {"cluster": 1},
        {"columns": 128, "stages": 6},
    )
    configs = (dataclasses.replace(rule, **change) for change in changes)
    return [rule, *(x for x in configs if can_launch(x, depth))]


def can_launch(config: TileConfig, depth: int) -> bool:
    """Whether tiles of key blocks are whole, and shared memory and registers suffice.

    In all calls of that depth; beside its sums a thread holds the weights of some columns only.
    """
    strides = [depth // head_dim for head_dim in HEAD_DIMS if depth // head_dim in STRIDES]
    widths = [config.columns * s // block for s in strides for block in BLOCK_SIZES]
    dtype = jnp.dtype(jnp.bfloat16)
    return (
        all(width % 8 == 0 for width in widths)
        and shared_memory_bytes(config, max(widths), dtype) <= mosaic.SHARED_MEMORY_BYTES
        and mosaic.product_registers(config.columns) + 96 <= config.computing_registers
        and mosaic.can_multiply(config.columns, config.threads)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldConfig:
    """How one warpgroup folds the rows of query groups into rows of query blocks.

    It loads a tile [blocks, groups_per_block, key blocks of a column tile] at a time. Four
    neighbouring columns are a thread's, so are up to 8 query groups of one block.

    Attributes:
        groups_per_block: query groups per query block.
        width: key blocks per column tile.
    """

    groups_per_block: int
    width: int

    @property
    def column_lanes(self) -> int:
        return self.width // 4

    @property
    def row_lanes(self) -> int:
        return max(1, self.groups_per_block // 8)

    @property
    def blocks(self) -> int:
        """Query blocks per warpgroup."""
        return 128 // (self.column_lanes * self.row_lanes)

    @property
    def rows(self) -> int:
        """Query groups per warpgroup."""
        return self.blocks * self.groups_per_block

    @property
    def layout(self) -> Any:
        """Where the entries of the tile [blocks, groups_per_block, width] live."""
        blocks, rows = self.blocks, self.groups_per_block
        whole, warp = (blocks, rows, self.width), (blocks // 4, rows, self.width)
        thread = (rows // self.row_lanes, 4)
        # From the end: a thread's columns and rows, how many threads share a block's columns and
        # rows, a warp's blocks, 1, 1, the warps. Dimensions of size 1 must not be named.
        row_lanes = (-4,) if self.row_lanes > 1 else ()
        return plgpu.Layout.TILED(
            plgpu.Tiling((whole, warp, thread)),
            warp_dims=(-8,),
            lane_dims=(-5, *row_lanes, -3),
            vector_dim=-1,
        )


def scratch(config: TileConfig, width: int, dtype: jnp.dtype) -> dict[str, Any]:
    """The scoring kernel's shared memory, by the names of its scratch arguments."""
    stages, shared = config.stages, config.cluster > 1
    freed: Any = plgpu.Barrier(num_barriers=stages, num_arrivals=_COMPUTING)
    if shared:
        freed = plgpu.ClusterBarrier(
            collective_axes=("cta",), num_barriers=stages, num_arrivals=_COMPUTING
        )
    return {
        "q_smem": mosaic.tiles((stages, config.rows, DEPTH), dtype),
        "k_smem": mosaic.tiles((stages, config.columns, DEPTH), dtype),
        "selector_smem": mosaic.tiles((width, config.columns), jnp.dtype(jnp.float16)),
        "filled": plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        "freed": freed,
        "selector_barrier": plgpu.Barrier(),
        "lead_barrier": plgpu.Barrier() if config.lead else None,
    }


def shared_memory_bytes(config: TileConfig, width: int, dtype: jnp.dtype) -> int:
    """Shared memory that one CTA of the scoring kernel takes."""
    alone = dataclasses.replace(config, cluster=1)  # barriers of a cluster are no larger
    return mosaic.bytes_of(scratch(alone, width, dtype))


def row_unit(config: TileConfig, fold: FoldConfig, *, pairs_rows: bool) -> int:
    """Both kernels work on multiples of so many query groups."""
    return math.lcm(config.rows * (config.cluster if pairs_rows else 1), fold.rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What is static in a call."""

    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    batch: int
    head_dim: int
    stride: int
    block_size: int
    is_causal: bool
    multiprocessors: int
    config: TileConfig

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.q_heads // self.kv_heads

    @property
    def pairs_heads(self) -> bool:
        """Whether the CTAs of a cluster have different heads of a group, not different rows."""
        return self.group % self.config.cluster == 0

    @property
    def item_rows(self) -> int:
        """Query groups per tile of a whole cluster."""
        return self.config.rows * (1 if self.pairs_heads else self.config.cluster)

    @property
    def workers(self) -> int:
        """Clusters, all of which are there at once."""
        return self.multiprocessors // self.config.cluster

    @property
    def heads_per_item(self) -> int:
        """How many times the CTAs of a cluster go over an item for all heads of a group."""
        return self.group // (self.config.cluster if self.pairs_heads else 1)

    @property
    def steps(self) -> int:
        """Steps per tile."""
        return self.stride * self.head_dim // DEPTH

    @property
    def lead(self) -> int:
        """As configured, where a tile has so many steps that no completion can be missed."""
        return self.config.lead if self.steps >= self.config.stages else 0

    @property
    def fold(self) -> FoldConfig:
        per_block = self.block_size // self.stride
        return FoldConfig(groups_per_block=per_block, width=self.config.columns // per_block)

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.kv_len - self.q_len

    def column_tiles(self, stop: int) -> int:
        """Column tiles that query groups before `stop` can see."""
        keys = self.kv_len
        if self.is_causal:
            keys = min(keys, self.offset + stop * self.stride)
        return pl.cdiv(pl.cdiv(keys, self.stride), self.config.columns)

    def parts(self, q_blocks: tuple[int, int], workspace_bytes: int) -> "Parts":
        """Equal ranges of rows whose partial sums fit the workspace.

        They start at a whole tile of rows, so perhaps before the first block that is asked for.
        """
        per_block = self.fold.groups_per_block
        unit = row_unit(self.config, self.fold, pairs_rows=not self.pairs_heads)
        first_row = q_blocks[0] * per_block // unit * unit
        units = pl.cdiv(q_blocks[1] * per_block - first_row, unit)
        column_tiles = max(1, self.column_tiles(q_blocks[1] * per_block))
        unit_bytes = 4 * self.batch * self.q_heads * unit * column_tiles * (self.fold.width + 2)
        number = pl.cdiv(units, max(1, workspace_bytes // unit_bytes))
        return Parts(
            call=self,
            first_row=first_row,
            num_rows=q_blocks[1] * per_block - first_row,
            number=number,
            rows=pl.cdiv(units, number) * unit,
            column_tiles=column_tiles,
        )

    def key_limit(self, row: Any, length: Any) -> Any:
        """The position that the first key of a group lies before if query group `row` sees it."""
        first = row * self.stride
        if not self.is_causal:
            return jnp.where(first < self.q_len, length, 0)
        end = jnp.minimum(self.q_len, length - self.offset)
        return jnp.where(
            first < end, jnp.minimum(first + self.stride, end) + self.offset, jnp.zeros_like(first)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The work on `num_rows` query groups from `first_row` on, in equal ranges of `rows`."""

    call: Call
    first_row: int
    num_rows: int
    number: int
    rows: int
    column_tiles: int

    def items(self) -> tuple[Int32[Array, "parts items"], Int32[Array, " parts"]]:
        """For each part its visible tiles of a head, and their number.

        An item is row tile * column_tiles + column tile; they go by columns through bands of rows.
        """
        call = self.call
        lists = []
        for start in range(self.first_row, self.first_row + self.number * self.rows, self.rows):
            end = min(start + self.rows, self.first_row + self.num_rows)
            stops = np.arange(start, end, call.item_rows) + call.item_rows
            visible = np.array([call.column_tiles(int(stop)) for stop in stops], np.int32)
            row, column = np.nonzero(np.arange(self.column_tiles)[None, :] < visible[:, None])
            order = np.lexsort((row, column, row // call.config.band))
            lists.append((row[order] * self.column_tiles + column[order]).astype(np.int32))
        counts = np.array([len(items) for items in lists], np.int32)
        items = np.zeros((len(lists), max(1, *counts)), np.int32)
        for row, of_part in zip(items, lists, strict=True):
            row[: len(of_part)] = of_part
        return jnp.asarray(items), jnp.asarray(counts)
