"""Facts of a block-sparse attention call, and the tiles that its kernels choose for them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparseattn_jax.kernels import mosaic
from sparseattn_jax.kernels.backends import DeviceFacts


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallFacts:
    """What a backend needs to know to accept or refuse a call."""

    device: DeviceFacts
    dtype: jnp.dtype
    head_dim: int
    block_q: int
    block_kv: int
    has_segment_ids: bool


LOADING_REGISTERS = 24
"""Registers per thread of a loading warpgroup, the fewest that there can be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileConfig:
    """How a CTA of the forward kernel is divided.

    Attributes:
        workers: workers per CTA; each goes through the lists of query blocks on its own.
        warpgroups: computing warpgroups per worker, each on 64 rows of the query block; one more
            warpgroup per worker loads.
        kv_tile: keys per step; divides block_kv.
        k_stages: key tiles in flight per worker.
        v_stages: value tiles in flight per worker.
        separate_out: the output leaves through shared memory of its own, so that the next query
            tile loads meanwhile; else through that of the query tile.
    """

    workers: int
    warpgroups: int
    kv_tile: int
    k_stages: int
    v_stages: int
    separate_out: bool

    def __post_init__(self):
        if self.kv_tile % 8 or not 8 <= self.kv_tile <= 256:
            raise ValueError(f"kv_tile={self.kv_tile} must be a multiple of 8 up to 256")
        if min(self.workers, self.warpgroups, self.k_stages, self.v_stages) < 1:
            raise ValueError(f"{self}: every count must be at least 1")

    @property
    def threads(self) -> int:
        """Warpgroups per CTA; the loading ones come last."""
        return self.workers * (self.warpgroups + 1)

    @property
    def computing_registers(self) -> int:
        """Registers per thread of a computing warpgroup: what the loading ones leave of 512."""
        left = (512 - self.workers * LOADING_REGISTERS) // (self.workers * self.warpgroups)
        return min(left, 248) // 8 * 8


def tile_config(head_dim: int, block_q: int, block_kv: int) -> TileConfig:
    """The choice for a call.

    A query block of 128 is one worker with two warpgroups, which take turns at the tensor cores.
    Query blocks of 64 have lists of their own, so two workers of one warpgroup share a CTA; with
    head_dim 256 the registers suffice for one.
    """
    two_workers = block_q == 64 and head_dim < 256
    return TileConfig(
        workers=2 if two_workers else 1,
        warpgroups=block_q // mosaic.WARPGROUP_ROWS,
        kv_tile=64 if head_dim == 256 or (two_workers and head_dim == 128) else block_kv,
        k_stages=2,
        v_stages=2,
        separate_out=head_dim < 256,
    )


def scratch(config: TileConfig, head_dim: int, dtype: jnp.dtype) -> dict[str, Any]:
    """The kernel's shared memory, by the names of its scratch arguments."""
    workers, warpgroups = config.workers, config.warpgroups
    q_shape = (workers * warpgroups, mosaic.WARPGROUP_ROWS, head_dim)
    k_shape = (workers * config.k_stages, config.kv_tile, head_dim)
    v_shape = (workers * config.v_stages, config.kv_tile, head_dim)
    return {
        "q_smem": mosaic.tiles(q_shape, dtype),
        "k_smem": mosaic.tiles(k_shape, dtype),
        "v_smem": mosaic.tiles(v_shape, dtype),
        "out_smem": mosaic.tiles(q_shape, dtype) if config.separate_out else None,
        "q_barriers": _ring_barriers(q_shape[0], consumers=1),
        "k_barriers": _ring_barriers(k_shape[0], consumers=warpgroups),
        "v_barriers": _ring_barriers(v_shape[0], consumers=warpgroups),
        "turn_barriers": plgpu.Barrier(num_barriers=warpgroups),
    }


def shared_memory_bytes(config: TileConfig, head_dim: int, dtype: jnp.dtype) -> int:
    """Shared memory that one CTA takes."""
    return mosaic.bytes_of(scratch(config, head_dim, dtype))


def _ring_barriers(slots: int, *, consumers: int) -> tuple[plgpu.Barrier, plgpu.Barrier]:
    filled = plgpu.Barrier(num_barriers=slots)
    freed = plgpu.Barrier(num_barriers=slots, num_arrivals=consumers)
    return filled, freed
