"""Facts of a decode attention call, and the tiles that its kernels choose for them."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparseattn_jax.kernels import mosaic
from sparseattn_jax.kernels.backends import DeviceFacts, Model
from sparseattn_jax.kernels.decode_attention.tile_table import TABLES
from sparseattn_jax.kernels.tile_tables import measured_or


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallFacts:
    """What a backend needs to know to accept or refuse a call.

    Attributes:
        group: query heads per kv head.
        capacity: slots of the cache.
        block_kv: slots per block of the lists, None without lists.
    """

    device: DeviceFacts
    dtype: jnp.dtype
    head_dim: int
    q_len: int
    group: int
    capacity: int
    block_kv: int | None


KEYS = tuple(itertools.product((64, 128, 256), (None, 64, 128)))
"""What the tiles depend on: head_dim and block_kv, None without lists."""

LOADING_REGISTERS = 72
"""Registers per thread of a loading warpgroup; with 56 the search for its share spills."""

OUT_COLUMNS = 64
"""Columns of a partial output that leave at a time, by way of shared memory."""

TILE_ROWS = 8
"""TMA moves tiles of so many rows between matrices of rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileConfig:
    """How a CTA of the kernel is divided.

    Attributes:
        workers: workers per CTA, each a computing and a loading warpgroup with a share of the
            keys of its own.
        kv_tile: slots per step; divides block_kv.
        stages: tiles in flight per worker, of keys and values in turn.
    """

    workers: int
    kv_tile: int
    stages: int

    def __post_init__(self):
        if self.kv_tile % 8 or not 8 <= self.kv_tile <= 256:
            raise ValueError(f"kv_tile={self.kv_tile} must be a multiple of 8 up to 256")
        if self.workers < 1 or self.stages < 2:
            raise ValueError(f"{self}: at least 1 worker, and stages for a key and a value tile")

    @property
    def threads(self) -> int:
        """Warpgroups per CTA; the loading ones come last."""
        return 2 * self.workers

    @property
    def computing_registers(self) -> int:
        """Registers per thread of a computing warpgroup."""
        return mosaic.computing_registers(
            computing=self.workers, loading=self.workers, loading_registers=LOADING_REGISTERS
        )

    @property
    def position_stages(self) -> int:
        """Tiles of positions per worker: one more than there can be tiles of keys in flight."""
        return (self.stages + 1) // 2 + 1


def tile_config(head_dim: int, block_kv: int | None, model: Model | None = None) -> TileConfig:
    """The choice for a call on this model of device: measured, or else the rule's."""
    key = head_dim, block_kv
    return measured_or(tile_rule(*key), TABLES["decode_attention"], model, *key)


def tile_rule(head_dim: int, block_kv: int | None) -> TileConfig:
    """The choice for a call where nothing was measured: two workers, and tiles of 16 KiB.

    Two workers hide the products and softmax of one another. With head_dim 256 the registers
    suffice for one.
    """
    workers = 1 if head_dim == 256 else 2
    return _deepest(head_dim, workers, min(128, block_kv or 128) if head_dim == 64 else 64)


def candidates(head_dim: int, block_kv: int | None) -> list[TileConfig]:
    """The configs worth measuring for a call, the rule's first; every one can be launched."""
    configs = (
        _deepest(head_dim, workers, kv_tile)
        for workers, kv_tile in itertools.product((1, 2, 3), (64, 128))
        if (block_kv or 128) % kv_tile == 0
    )
    legal = (x for x in configs if can_launch(x, head_dim))
    return list(dict.fromkeys((tile_rule(head_dim, block_kv), *legal)))


def can_launch(config: TileConfig, head_dim: int) -> bool:
    """Whether shared memory and registers suffice."""
    return (
        shared_memory_bytes(config, head_dim) <= mosaic.SHARED_MEMORY_BYTES
        and registers(config, head_dim) <= config.computing_registers
        and mosaic.can_multiply(max(head_dim, config.kv_tile), config.threads)
    )


def registers(config: TileConfig, head_dim: int) -> int:
    """Those that a thread of a computing warpgroup needs, so that ptxas spills none.

    The values, the scores and their weights; and others, of which more with the tile.
    """
    tile = config.kv_tile
    held = mosaic.product_registers(head_dim) + mosaic.product_registers(tile)
    return held + mosaic.product_registers(tile, itemsize=2) + 32 + tile // 8


def _deepest(head_dim: int, workers: int, kv_tile: int) -> TileConfig:
    """As many tiles in flight as shared memory holds: bandwidth wants bytes in flight."""
    config = TileConfig(workers=workers, kv_tile=kv_tile, stages=2)
    while True:
        deeper = dataclasses.replace(config, stages=config.stages + 1)
        if shared_memory_bytes(deeper, head_dim) > mosaic.SHARED_MEMORY_BYTES:
            return config
        config = deeper


def padded_group(group: int) -> int:
    """Rows that hold the queries of a token and kv head, and their neighbours' for whole tiles."""
    return max(-(-(first_row(head, group) + group) // TILE_ROWS) * TILE_ROWS for head in range(8))


def first_row(kv_head: Any, group: int) -> Any:
    """Which of those rows holds the first query of the kv head."""
    return kv_head * group % TILE_ROWS


def scratch(
    config: TileConfig, head_dim: int, dtype: jnp.dtype, *, q_len: int, has_positions: bool
) -> dict[str, Any]:
    """The kernel's shared memory, by the names of its scratch arguments."""
    workers = config.workers
    kv_slots = workers * config.stages
    position_slots = workers * config.position_stages
    scratch = {
        "q_smem": mosaic.tiles((workers, mosaic.WARPGROUP_ROWS, head_dim), dtype),
        "q_barriers": plgpu.Barrier(num_barriers=workers, num_arrivals=q_len),
        "out_smem": mosaic.tiles(
            (workers, mosaic.WARPGROUP_ROWS, OUT_COLUMNS), jnp.dtype(jnp.float32)
        ),
        "kv_smem": mosaic.tiles((kv_slots, config.kv_tile, head_dim), dtype),
        "kv_barriers": mosaic.ring_barriers(kv_slots),
    }
    if has_positions:
        scratch["positions_smem"] = plgpu.SMEM((position_slots, config.kv_tile), jnp.int32)
        scratch["positions_barriers"] = mosaic.ring_barriers(position_slots)
    return scratch


def shared_memory_bytes(config: TileConfig, head_dim: int) -> int:
    """Shared memory that one CTA takes at most; every dtype of the kernel has 2 bytes."""
    dtype = jnp.dtype(jnp.bfloat16)
    return mosaic.bytes_of(scratch(config, head_dim, dtype, q_len=1, has_positions=True))
