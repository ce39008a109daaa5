"""Facts of a block-sparse attention call, and the tiles that its kernels choose for them."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparseattn_jax.kernels import mosaic
from sparseattn_jax.kernels.backends import DeviceFacts, Model
from sparseattn_jax.kernels.block_sparse_attention.tile_table import TABLES
from sparseattn_jax.kernels.tile_tables import measured_or


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallFacts:
    """What a backend needs to know to accept or refuse a call."""

    device: DeviceFacts
    dtype: jnp.dtype
    head_dim: int
    block_q: int
    block_kv: int
    has_segment_ids: bool


KEYS = tuple(itertools.product((64, 128, 256), (64, 128), (64, 128)))
"""What the forward's tiles depend on: head_dim, block_q and block_kv."""

VJP_KEYS = tuple(itertools.product((64, 128, 256), (64, 128)))
"""What the backward's tiles depend on: head_dim and block_kv."""

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
        queries_in_registers: computing warpgroups read their queries once, and the next ones load
            meanwhile. Else they stay in shared memory, by way of which the output leaves.
    """

    workers: int
    warpgroups: int
    kv_tile: int
    k_stages: int
    v_stages: int
    queries_in_registers: bool

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
        """Registers per thread of a computing warpgroup."""
        return mosaic.computing_registers(
            computing=self.workers * self.warpgroups,
            loading=self.workers,
            loading_registers=LOADING_REGISTERS,
        )


def tile_config(
    head_dim: int, block_q: int, block_kv: int, model: Model | None = None
) -> TileConfig:
    """The choice for a call on this model of device: measured, or else the rule's."""
    key = head_dim, block_q, block_kv
    return measured_or(tile_rule(*key), TABLES["block_sparse_attention"], model, *key)


def tile_rule(head_dim: int, block_q: int, block_kv: int) -> TileConfig:
    """The choice for a call where nothing was measured.

    A query block of 128 is one worker with two warpgroups.
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
        queries_in_registers=head_dim < 256,
    )


def candidates(head_dim: int, block_q: int, block_kv: int) -> list[TileConfig]:
    """The configs worth measuring for a call, the rule's first; every one can be launched.

    Each differs from the rule's in one respect, or in two that share memory.
    """
    rule = tile_rule(head_dim, block_q, block_kv)
    changes: tuple[dict[str, int], ...] = (
        {"k_stages": 3},
        {"k_stages": 3, "v_stages": 3},
        {"queries_in_registers": not rule.queries_in_registers},
        {"kv_tile": 64},
        {"kv_tile": 64, "k_stages": 3, "v_stages": 3},
        {"kv_tile": 128},
        {"workers": 1},
        {"workers": 3},
    )
    configs = (dataclasses.replace(rule, **change) for change in changes)
    legal = (x for x in configs if block_kv % x.kv_tile == 0 and can_launch(x, head_dim))
    return list(dict.fromkeys((rule, *legal)))


def can_launch(config: TileConfig, head_dim: int) -> bool:
    """Whether shared memory and registers suffice."""
    used = shared_memory_bytes(config, head_dim, jnp.dtype(jnp.bfloat16))
    return (
        used <= mosaic.SHARED_MEMORY_BYTES
        and registers(config, head_dim) <= config.computing_registers
        and mosaic.can_multiply(max(head_dim, config.kv_tile), config.threads)
    )


def registers(config: TileConfig, head_dim: int) -> int:
    """Those that a thread of a computing warpgroup needs, so that ptxas spills none.

    The values, the scores, the weights of the tile before, perhaps the queries; and others, of
    which more with the tile, as ptxas has it of sizes that do and do not spill.
    """
    tile = config.kv_tile
    held = mosaic.product_registers(head_dim) + mosaic.product_registers(tile)
    held += mosaic.product_registers(tile, itemsize=2)
    if config.queries_in_registers:
        held += mosaic.product_registers(head_dim, itemsize=2)
    return held + 32 + tile // 8


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
        "out_smem": mosaic.tiles(q_shape, dtype) if config.queries_in_registers else None,
        "q_barriers": mosaic.ring_barriers(q_shape[0]),
        "k_barriers": mosaic.ring_barriers(k_shape[0], consumers=warpgroups),
        "v_barriers": mosaic.ring_barriers(v_shape[0], consumers=warpgroups),
    }


def shared_memory_bytes(config: TileConfig, head_dim: int, dtype: jnp.dtype) -> int:
    """Shared memory that one CTA takes."""
    return mosaic.bytes_of(scratch(config, head_dim, dtype))


VJP_WARPGROUPS = 2
"""Computing warpgroups of the backward kernel; one more loads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VjpConfig:
    """How a CTA of the backward kernel is divided. It takes 64 queries a step.

    Attributes:
        kv_tile: keys per CTA; divides block_kv. Of 128 each warpgroup has its own 64; of 64 the
            warpgroups have all, and each its own half of the queries and of the head's columns.
        q_stages: query tiles in flight. With more than one the scores of the next step are begun
            before this one is over.
        d_out_stages: tiles of output gradients in flight.
        swizzle_bytes: of the operands' tiles; the halves are cut in whole swizzles.
        loading_registers: registers per thread of the loading warpgroup.
    """

    kv_tile: int
    q_stages: int
    d_out_stages: int
    swizzle_bytes: int
    loading_registers: int

    def __post_init__(self):
        if self.kv_tile not in (64, 128):
            raise ValueError(f"kv_tile={self.kv_tile} must be 64 or 128")
        if min(self.q_stages, self.d_out_stages) < 1:
            raise ValueError(f"{self}: every count must be at least 1")

    @property
    def splits_keys(self) -> bool:
        """Whether each warpgroup has its own keys."""
        return self.kv_tile == VJP_WARPGROUPS * mosaic.WARPGROUP_ROWS

    @property
    def scores_ahead(self) -> bool:
        """Whether the scores of the next step are begun before this one is over."""
        return self.q_stages > 1

    @property
    def computing_registers(self) -> int:
        """Registers per thread of each computing warpgroup."""
        return mosaic.computing_registers(
            computing=VJP_WARPGROUPS, loading=1, loading_registers=self.loading_registers
        )


def vjp_config(head_dim: int, block_kv: int, model: Model | None = None) -> VjpConfig:
    """The choice for a call on this model of device: measured, or else the rule's."""
    key = head_dim, block_kv
    return measured_or(vjp_rule(*key), TABLES["block_sparse_attention_vjp"], model, *key)


def vjp_rule(head_dim: int, block_kv: int) -> VjpConfig:
    """The choice for a call where nothing was measured.

    With head_dim 256 the sums of 64 keys fill the registers of both warpgroups, and single stages
    the shared memory. Elsewhere queries are in use for two steps, so that a third stage loads; and
    with 8 registers less for computing, ptxas would wait for each product of head_dim 128 before it
    begins the next (C7512). Of head_dim 256 it is loading that would spill.
    """
    kv_tile = 64 if head_dim == 256 else block_kv
    return VjpConfig(
        kv_tile=kv_tile,
        q_stages=1 if head_dim == 256 else 3,
        d_out_stages=1 if head_dim == 256 else 2,
        swizzle_bytes=_vjp_swizzle_bytes(kv_tile, head_dim),
        loading_registers=40 if head_dim == 256 else LOADING_REGISTERS,
    )


def vjp_candidates(head_dim: int, block_kv: int) -> list[VjpConfig]:
    """The configs worth measuring for a call, the rule's first; every one can be launched."""
    rule = vjp_rule(head_dim, block_kv)
    changes: tuple[dict[str, int], ...] = (
        {"q_stages": 2},
        {"q_stages": 2, "d_out_stages": 3},
        {"d_out_stages": 3},
        {"kv_tile": 64, "swizzle_bytes": _vjp_swizzle_bytes(64, head_dim)},
    )
    configs = (dataclasses.replace(rule, **change) for change in changes)
    legal = (x for x in configs if block_kv % x.kv_tile == 0 and vjp_can_launch(x, head_dim))
    return list(dict.fromkeys((rule, *legal)))


def vjp_can_launch(config: VjpConfig, head_dim: int) -> bool:
    """Whether shared memory and registers suffice."""
    used = vjp_shared_memory_bytes(config, head_dim, jnp.dtype(jnp.bfloat16))
    return (
        used <= mosaic.SHARED_MEMORY_BYTES
        and vjp_registers(config, head_dim) <= config.computing_registers
    )


def vjp_registers(config: VjpConfig, head_dim: int) -> int:
    """Those that a thread of a computing warpgroup needs, so that ptxas spills none.

    The sums of its part of dk and dv, its part of the weights and of their gradients; and others.
    """
    threads = VJP_WARPGROUPS * mosaic.WARPGROUP_THREADS
    held = 2 * config.kv_tile * (head_dim + mosaic.WARPGROUP_ROWS) // threads
    return held + 48


def _vjp_swizzle_bytes(kv_tile: int, head_dim: int) -> int:
    return 128 if kv_tile == 128 and head_dim == 128 else 64


def vjp_scratch(config: VjpConfig, head_dim: int, dtype: jnp.dtype) -> dict[str, Any]:
    """The backward kernel's shared memory, by the names of its scratch arguments."""
    rows, swizzle = mosaic.WARPGROUP_ROWS, config.swizzle_bytes
    kv_shape = (1, config.kv_tile, head_dim)
    scores_shape = (2, config.kv_tile, rows)
    d_q_shape = (VJP_WARPGROUPS, rows, head_dim // VJP_WARPGROUPS)
    statistics_shape = (config.d_out_stages, 2, rows)

    def barriers(slots: int, *, tiles: int = 1) -> tuple[plgpu.Barrier, plgpu.Barrier]:
        filled = plgpu.Barrier(num_barriers=slots, num_arrivals=tiles)
        return filled, plgpu.Barrier(num_barriers=slots, num_arrivals=VJP_WARPGROUPS)

    return {
        "number_smem": plgpu.SMEM((2, 1), jnp.dtype(jnp.int32)),
        "kv_smem": (mosaic.tiles(kv_shape, dtype, swizzle), mosaic.tiles(kv_shape, dtype, swizzle)),
        "q_smem": mosaic.tiles((config.q_stages, rows, head_dim), dtype, swizzle),
        "d_out_smem": (
            mosaic.tiles((config.d_out_stages, rows, head_dim), dtype, swizzle),
            plgpu.SMEM(statistics_shape, jnp.dtype(jnp.float32)),
        ),
        "weights_smem": None if config.splits_keys else mosaic.tiles(scores_shape, dtype, swizzle),
        "d_scores_smem": mosaic.tiles(scores_shape, dtype, swizzle),
        "d_q_smem": mosaic.tiles(d_q_shape, jnp.dtype(jnp.float32)),
        # The loading warpgroup reads the numbers too.
        "number_barriers": mosaic.ring_barriers(2, consumers=VJP_WARPGROUPS + 1),
        "kv_barriers": barriers(1, tiles=2),
        "q_barriers": barriers(config.q_stages),
        "d_out_barriers": barriers(config.d_out_stages, tiles=2),
        "exchange_barrier": plgpu.Barrier(num_arrivals=VJP_WARPGROUPS),
    }


def vjp_shared_memory_bytes(config: VjpConfig, head_dim: int, dtype: jnp.dtype) -> int:
    """Shared memory that one CTA of the backward kernel takes."""
    return mosaic.bytes_of(vjp_scratch(config, head_dim, dtype))
