"""What the Mosaic GPU kernels share: swizzled tiles in shared memory and rings of them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm, vector
from jaxtyping import Array, Float, Int32

WARPGROUP_ROWS = 64
"""Rows of the matrix that one wgmma instruction computes."""

WARPGROUP_THREADS = 128

SHARED_MEMORY_BYTES = 227 * 1024
"""Shared memory that one CTA of compute capability 9.0 can have."""

REGISTERS = 512
"""Registers of a multiprocessor, for each of the 128 threads of a warpgroup."""

L2_BYTES = 32 * 2**20
"""What is worked on together should fit here: about two thirds of the L2 cache of an H100."""

_SWIZZLE_BYTES = 128

# Beside its sums: the left operand, addresses. ptxas asks for 94 where the sums are 64.
_WGMMA_OTHERS = 30


def tiles(shape: tuple[int, ...], dtype: jnp.dtype, swizzle_bytes: int = _SWIZZLE_BYTES) -> Any:
    """Shared memory for matrices in the layout that TMA writes and wgmma reads.

    The operands of one product need equal swizzles. Columns are cut in whole swizzles.
    """
    columns = swizzle_bytes // jnp.dtype(dtype).itemsize
    if shape[-1] % columns:
        raise ValueError(f"shape={shape}: the last axis must be a multiple of {columns}")
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(swizzle_bytes)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def starting_registers(warpgroups: int) -> int:
    """Registers per thread that the warpgroups of a CTA start with: equal shares, in eights."""
    return REGISTERS // warpgroups // 8 * 8


def computing_registers(*, computing: int, loading: int, loading_registers: int) -> int:
    """Registers per thread of each computing warpgroup: what the loading ones leave.

    Only those that the warpgroups start with can be shared out again: a warpgroup that asks for
    more than is left waits for ever.
    """
    warpgroups = computing + loading
    shared = warpgroups * starting_registers(warpgroups)
    return min((shared - loading * loading_registers) // computing, 248) // 8 * 8


def product_registers(columns: int, itemsize: int = 4) -> int:
    """Registers per thread for 64 rows of so many columns, as one warpgroup holds them."""
    return WARPGROUP_ROWS * columns * itemsize // (4 * WARPGROUP_THREADS)


def can_multiply(columns: int, warpgroups: int) -> bool:
    """Whether warpgroups start with the registers of one wgmma that is so many columns wide.

    What they get later does not count: ptxas refuses the instruction (C7602).
    """
    return product_registers(columns) + _WGMMA_OTHERS <= starting_registers(warpgroups)


def accumulator(columns: int) -> Any:
    """Registers for the 64 rows of a product that one warpgroup computes."""
    shape = (WARPGROUP_ROWS, columns)
    return plgpu.ACC(shape, jnp.float32)  # pyright: ignore[reportPrivateImportUsage]


def row_vector(value: float) -> jax.Array:
    """One float32 per row of a product, all the same."""
    rows = jnp.full((WARPGROUP_ROWS,), value, jnp.float32)
    return plgpu.layout_cast(rows, plgpu.Layout.WGMMA.reduce(1))


def columns_before(shape: tuple[int, ...], end: jax.Array) -> jax.Array:
    """Which scores of a product stand before column `end`: one end for all, or one for each."""
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    # column < end. The columns in a thread's registers differ by multiples of 8: in this form few
    # values meet constants, where the compiler would hoist all the columns.
    within = jnp.bitwise_and(column, 7)
    return column - within < end - within


def divide(x: jax.Array, y: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of what is not negative."""
    return lax.div(x, jnp.int32(y)), lax.rem(x, jnp.int32(y))


def whole_tiles(x: Float[Array, "B L heads H"]) -> Float[Array, "B L8 heads H"]:
    """TMA moves tiles of 8 rows, and only whole ones lie within a sequence."""
    missing = -x.shape[1] % 8
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def longest_first(work: Int32[Array, " tiles"], group: int) -> Int32[Array, " tiles"]:
    """Indices of the tiles in groups of so many, and within a group by falling work.

    A tile's place is counted by comparison with its group: XLA's sort takes several times as long.
    """
    group = min(group, work.size)
    missing = -work.size % group
    by_group = jnp.pad(work, (0, missing), constant_values=-1).reshape(-1, group)
    index = jnp.arange(group)
    this, other = by_group[:, :, None], by_group[:, None, :]
    earlier = (index[None, :] < index[:, None])[None]
    is_before = (other > this) | ((other == this) & earlier)
    place = jnp.sum(is_before, axis=-1, dtype=jnp.int32)
    place += jnp.arange(len(by_group), dtype=jnp.int32)[:, None] * group
    tiles = jnp.arange(work.size + missing, dtype=jnp.int32)
    order = jnp.zeros_like(tiles).at[place.reshape(-1)].set(tiles, unique_indices=True)
    return order[: work.size]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """Slots in shared memory that a producer fills by TMA and consumers read, in turn.

    Both sides count the same steps; step i uses slot i % stages. A producer waits until the
    consumers have freed the slot, a consumer until it is filled.

    Attributes:
        slots: one tile per slot; or a tuple of such arrays, of tiles that are filled together.
        filled: one barrier per slot, completed by the arrival of its tiles.
        freed: one barrier per slot, completed when every consumer has freed it.
        stages: how many slots the ring has.
        first: its first slot; several rings may share the arrays.
    """

    slots: Any
    filled: Any
    freed: Any
    stages: int
    first: jax.Array | int = 0

    @classmethod
    def of(cls, refs: dict[str, Any], name: str, stages: int, index: jax.Array | int = 0) -> "Ring":
        """The ring of this name among scratch arguments, of several the one with this index."""
        filled, freed = refs[f"{name}_barriers"]
        slots = refs[f"{name}_smem"]
        return cls(slots=slots, filled=filled, freed=freed, stages=stages, first=index * stages)

    def fill(self, step: jax.Array, source: Any) -> None:
        """Begins to copy `source` in global memory, once the slot of this step is free."""
        self.claim(step)
        for one, tile in zip(_tuple(source), _tuple(self.tile(step)), strict=True):
            plgpu.copy_gmem_to_smem(one, tile, self.filled.at[self._slot(step)])

    def claim(self, step: jax.Array) -> None:
        """Waits until the slot of this step is free."""

        @pl.when(step >= self.stages)
        def _wait_until_free():
            plgpu.barrier_wait(self.freed.at[self._slot(step)])

    def announce(self, step: jax.Array) -> None:
        """Says that the slot of this step was filled by the producer itself, not by a copy."""
        plgpu.barrier_arrive(self.filled.at[self._slot(step)])

    def wait(self, step: jax.Array) -> None:
        """Waits until the tile of this step is there."""
        plgpu.barrier_wait(self.filled.at[self._slot(step)])

    def tile(self, step: jax.Array) -> Any:
        """The tile of a step that has been waited for and is not yet freed; or the tuple."""
        tiles = tuple(slots.at[self._slot(step)] for slots in _tuple(self.slots))
        return tiles if isinstance(self.slots, tuple) else tiles[0]

    def free(self, step: jax.Array) -> None:
        """Ends this consumer's use of the tile of this step."""
        plgpu.barrier_arrive(self.freed.at[self._slot(step)])

    def drain(self, steps: jax.Array) -> None:
        """Waits, after `steps` fills, until every slot is free: no completion may be missed."""

        @pl.loop(jnp.maximum(steps - self.stages, 0), steps)
        def _wait(step: jax.Array) -> None:
            plgpu.barrier_wait(self.freed.at[self._slot(step)])

    def _slot(self, step: jax.Array) -> jax.Array:
        return self.first + lax.rem(step, jnp.int32(self.stages))


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


@plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA.reduce(1),),
    return_type=plgpu.ShapeDtypeStruct((), jnp.bool_, layout=plgpu.Layout.WG_SPLAT(())),
)
def warp_any(_: Any, rows: Any) -> Any:
    """Whether any float32 of a warp's rows is not 0. It branches each warp for itself.

    All warps of a warpgroup must not wait for one another under that branch.
    """
    i1, i32 = ir.IntegerType.get_signless(1), ir.IntegerType.get_signless(32)
    found = arith.constant(i1, 0)
    for register in rows.registers.flat:
        value = vector.extract(register, dynamic_position=[], static_position=[0])
        is_set = arith.cmpf(arith.CmpFPredicate.UNE, value, arith.constant(value.type, 0.0))
        found = arith.ori(found, is_set)
    every_lane = arith.constant(i32, -1)
    found = nvvm.vote_sync(every_lane, found, nvvm.VoteSyncKind.any)
    return mgpu.FragmentedArray.splat(found, (), is_signed=False)


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def take_number(_: Any, counter: Any, place: Any) -> None:
    """Writes the value of a counter in global memory to shared memory, and counts on.

    One thread does; what it wrote is announced by its arrival at a barrier.
    """
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    with mgpu.when(mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP)):
        address = mgpu.utils.memref_ptr(counter)
        code = "atom.global.add.u32 $0, [$1], 1;"
        number = llvm.inline_asm(i32, [address], code, "=r,l", has_side_effects=True)
        memref.store(number, place, [arith.constant(index, 0)])


def ring_barriers(slots: int, *, consumers: int = 1) -> tuple[plgpu.Barrier, plgpu.Barrier]:
    """Those that say of each slot of a ring that it is filled, and that all consumers freed it."""
    filled = plgpu.Barrier(num_barriers=slots)
    freed = plgpu.Barrier(num_barriers=slots, num_arrivals=consumers)
    return filled, freed


def bytes_of(scratch: object) -> int:
    """Shared memory that a pytree of scratch types takes; arrays take whole KiB."""
    leaves = jax.tree.leaves(scratch, is_leaf=lambda x: isinstance(x, plgpu.Barrier))
    return sum(_bytes(leaf) for leaf in leaves)


def _bytes(leaf: Any) -> int:
    if isinstance(leaf, plgpu.Barrier):
        return 8 * math.prod(leaf.get_ref_aval().shape)
    return pl.cdiv(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize, 1024) * 1024
