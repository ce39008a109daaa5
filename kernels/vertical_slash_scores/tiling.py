"""Facts of a vertical and slash scoring call, and the tiles that its Hopper kernels choose."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparseattn_jax.kernels import mosaic
from sparseattn_jax.kernels.backends import DeviceFacts, Model
from sparseattn_jax.kernels.tile_tables import measured_or
from sparseattn_jax.kernels.vertical_slash_scores.tile_table import TABLES


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallFacts:
    """What a backend needs to know to accept or refuse a call."""

    device: DeviceFacts
    dtype: jnp.dtype
    head_dim: int
    num_queries: int


TABLE_KEYS = tuple(itertools.product((64, 128, 256), (False, True)))
"""What the tiles depend on: head_dim, and whether a kv head's tiles of query rows are even."""

LOADING_REGISTERS = 24
"""Registers per thread of the loading warpgroup, the fewest that there can be."""

KEYS = 128
"""Keys per tile: a thread of a warpgroup sums one key's column, and one diagonal, of each."""

TAIL = mosaic.WARPGROUP_ROWS
"""Keys of the tile before that are kept: the diagonals that begin there end in this tile."""

_MOST_STAGES = 4

# From one row of weights to the next. Half a warp writes 8 columns of 4 rows at a time: 8 more than
# a multiple of 32 puts them in different banks.
_ROW_STRIDE = TAIL + KEYS + 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileConfig:
    """How a CTA is divided.

    Attributes:
        workers: computing warpgroups, each with 64 rows of queries of one head; they share the
            tiles of keys.
        stages: tiles of keys in flight.
    """

    workers: int
    stages: int

    def __post_init__(self):
        if min(self.workers, self.stages) < 1:
            raise ValueError(f"{self}: every count must be at least 1")

    @property
    def threads(self) -> int:
        """Warpgroups per CTA; the loading one comes last."""
        return self.workers + 1

    @property
    def computing_registers(self) -> int:
        """Registers per thread of a computing warpgroup."""
        return mosaic.computing_registers(
            computing=self.workers, loading=1, loading_registers=LOADING_REGISTERS
        )


def tile_config(head_dim: int, row_tiles: int, model: Model | None = None) -> TileConfig:
    """The choice for a call with so many tiles of query rows per kv head.

    It is that measured on this model of device, or else the rule's.
    """
    key = head_dim, row_tiles % 2 == 0
    return measured_or(tile_rule(*key), TABLES["vertical_slash_scores"], model, *key)


def tile_rule(head_dim: int, is_even: bool) -> TileConfig:
    """The choice for a call where nothing was measured.

    Two warpgroups hide the products and the sums of one another; with head_dim 256 shared memory
    suffices for one.
    """
    workers = 2 if is_even and head_dim < 256 else 1
    return next(x for x in _by_depth(workers) if can_launch(x, head_dim))


def candidates(head_dim: int, is_even: bool) -> list[TileConfig]:
    """The configs worth measuring for a call, the rule's first; every one can be launched."""
    rule = tile_rule(head_dim, is_even)
    configs = (*_by_depth(rule.workers), *_by_depth(1))
    legal = (x for x in configs if can_launch(x, head_dim))
    return list(dict.fromkeys((rule, *legal)))


def can_launch(config: TileConfig, head_dim: int) -> bool:
    """Whether shared memory suffices; registers do, for scores of one tile at a time."""
    return shared_memory_bytes(config, head_dim) <= mosaic.SHARED_MEMORY_BYTES


def _by_depth(workers: int) -> list[TileConfig]:
    return [TileConfig(workers=workers, stages=stages) for stages in range(_MOST_STAGES, 1, -1)]


def scratch(
    config: TileConfig, head_dim: int, dtype: jnp.dtype, *, has_weights: bool
) -> dict[str, Any]:
    """A kernel's shared memory, by the names of its scratch arguments."""
    workers, rows = config.workers, mosaic.WARPGROUP_ROWS
    scratch = {
        "q_smem": mosaic.tiles((workers, rows, head_dim), dtype),
        "q_barriers": plgpu.Barrier(num_barriers=workers),
        "k_smem": mosaic.tiles((config.stages, KEYS, head_dim), dtype),
        "k_barriers": mosaic.ring_barriers(config.stages, consumers=workers),
    }
    if has_weights:
        scratch["weights_smem"] = plgpu.SMEM((workers, rows, _ROW_STRIDE), jnp.float32)
    return scratch


def shared_memory_bytes(config: TileConfig, head_dim: int) -> int:
    """Shared memory that one CTA takes at most; every dtype of the kernels has 2 bytes."""
    return mosaic.bytes_of(scratch(config, head_dim, jnp.dtype(jnp.bfloat16), has_weights=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What is static in a call.

    Attributes:
        group: query heads per kv head.
    """

    batch: int
    kv_len: int
    kv_heads: int
    group: int
    head_dim: int
    num_queries: int
    multiprocessors: int
    config: TileConfig

    @property
    def parts(self) -> int:
        """Tiles of query rows per head."""
        return self.num_queries // mosaic.WARPGROUP_ROWS

    @property
    def row_tiles(self) -> int:
        """Tiles of query rows per kv head."""
        return self.group * self.parts

    @property
    def tiles(self) -> int:
        """Tiles of keys per kv head."""
        return pl.cdiv(self.kv_len, KEYS)

    @property
    def tiles_per_range(self) -> int:
        """Tiles of the keys that a CTA goes over.

        The ranges are such that the CTAs, in as many rounds as it takes, finish soonest. A CTA
        begins at some expense: it also goes over the tile before its range.
        """
        ctas_per_range = self.batch * self.kv_heads * self.row_tiles // self.config.workers

        def duration(ranges: int) -> int:
            rounds = pl.cdiv(ctas_per_range * ranges, self.multiprocessors)
            return rounds * (pl.cdiv(self.tiles, ranges) + _BEGINNING)

        most = max(1, _MOST_ROUNDS * self.multiprocessors // ctas_per_range)
        return pl.cdiv(self.tiles, min(range(1, min(most, self.tiles) + 1), key=duration))

    @property
    def ranges(self) -> int:
        return pl.cdiv(self.tiles, self.tiles_per_range)

    @property
    def grid(self) -> tuple[int, int, int]:
        """CTAs; neighbours read the same keys."""
        return (
            self.batch * self.kv_heads,
            self.ranges,
            self.row_tiles // self.config.workers,
        )


# What a CTA costs beyond the tiles of its range, in tiles; and the most rounds of CTAs.
_BEGINNING = 3
_MOST_ROUNDS = 4
