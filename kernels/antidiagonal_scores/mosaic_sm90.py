"""Antidiagonal block scores on Hopper: one matrix product per head, and what becomes of its tiles.

TMA reads groups of tokens from q and k through views [B, groups, stride * heads * H]: with the
tokens of a query group taken in reverse, the antidiagonal sums are one product of depth stride * H.
CTAs stay for the whole call and go from tile to tile of 128 query groups and 256 key groups; two
CTAs with different heads share the key tiles that they load. From each tile leave a maximum and a
sum per row, and the sums of exp2(logit - maximum) over each key block, which the tensor cores form
as a product with a 0/1 matrix. `fold_sm90.py` makes block scores of these. Both run over ranges of
query groups that are sized to the workspace.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float16, Float32, Int32

from sparseattn_jax.kernels.antidiagonal_scores import fold_sm90, tiling
from sparseattn_jax.kernels.backends import device_model, hopper_refusal, multiprocessors
from sparseattn_jax.kernels.mosaic import WARPGROUP_ROWS, Ring, accumulator, columns_before, divide

_ROWS = plgpu.Layout.WGMMA.reduce(1)
_LOG2_E = math.log2(math.e)

# exp2(logit - maximum) times this still fits float16, in whose range the small ones then stay.
_LARGEST_WEIGHT_LOG2 = 14.0

_CHUNK = 64  # columns whose weights exist at one time

# So many parts are written out; more are a loop, which costs another copy of the scores.
_UNROLLED = 8


def refusal(facts: tiling.CallFacts) -> str | None:
    """Why these kernels cannot take a call with these facts; None if they can."""
    if reason := hopper_refusal(facts.device, facts.dtype):
        return reason
    if facts.head_dim not in (64, 128, 256):
        return f"needs head_dim 64, 128 or 256, got {facts.head_dim}"
    if facts.stride not in (4, 8, 16) or facts.block_size not in (64, 128):
        found = f"stride {facts.stride} and blocks of {facts.block_size}"
        return f"needs stride 4, 8 or 16 and blocks of 64 or 128, got {found}"
    if facts.has_segment_ids:
        return "does not mask segments; pass one sequence per batch row, with kv_lengths"
    return None


@functools.partial(
    jax.jit,
    static_argnames=(
        "stride",
        "block_size",
        "is_causal",
        "q_blocks",
        "workspace_bytes",
        "config",
    ),
)
def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    kv_lengths: Int32[Array, " B"] | None,
    *,
    segment_ids: None = None,
    stride: int,
    block_size: int,
    is_causal: bool,
    q_blocks: tuple[int, int],
    workspace_bytes: int,
    config: tiling.TileConfig | None = None,
) -> Float32[Array, "B N rows Sb"]:
    """Block sums; the arguments are those of the op, and tiles if not those of its choice.

    Lengths that are no multiple of 8 * stride cost a copy of the arrays concerned, and so do
    kv_lengths: partial groups must hold zeros.
    """
    del segment_ids
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    call = tiling.Call(
        q_len=T,
        kv_len=S,
        q_heads=N,
        kv_heads=K,
        batch=B,
        head_dim=H,
        stride=stride,
        block_size=block_size,
        is_causal=is_causal,
        multiprocessors=multiprocessors(q, k),
        config=config or tiling.tile_config(stride * H, device_model(q, k)),
    )
    lengths = jnp.full((B,), S, jnp.int32) if kv_lengths is None else kv_lengths
    q_lengths = jnp.minimum(T, lengths - (S - T)) if is_causal else None
    q = _views(q, None if kv_lengths is None else q_lengths, stride)
    k = _views(k, kv_lengths, stride)
    parts = call.parts(q_blocks, workspace_bytes)
    items, counts = parts.items()

    early = q_blocks[0] - parts.first_row // call.fold.groups_per_block
    num_blocks = early + q_blocks[1] - q_blocks[0]
    of_part = parts.rows // call.fold.groups_per_block

    @jax.jit
    def score(
        index: Int32[Array, ""], items: Array, counts: Array
    ) -> Float32[Array, "B N blocks columns"]:
        window = jnp.stack([parts.first_row + index * parts.rows, counts[index]])
        sums, maxima, totals = _partial_sums(parts, q, k, lengths, items[index], window)
        return fold_sm90.fold(parts, sums, maxima, totals, lengths, window)

    def add(index: Int32[Array, ""], scores: Array) -> Array:
        new = score(index, items, counts)
        return lax.dynamic_update_slice_in_dim(scores, new, index * of_part, axis=2)

    if parts.number <= _UNROLLED:
        each = [score(jnp.int32(index), items, counts) for index in range(parts.number)]
        each[-1] = lax.slice_in_dim(each[-1], 0, num_blocks - (parts.number - 1) * of_part, axis=2)
        scores = each[0] if len(each) == 1 else jnp.concatenate(each, axis=2)
    else:
        shape = (B, N, parts.number * of_part, parts.column_tiles * call.fold.width)
        scores = lax.fori_loop(0, parts.number, add, jnp.zeros(shape, jnp.float32))
    scores = scores[:, :, early:num_blocks, : pl.cdiv(S, block_size)]
    unseen = pl.cdiv(S, block_size) - scores.shape[-1]
    return jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (0, unseen))) if unseen else scores


def _views(
    x: Float[Array, "B L heads H"], lengths: Int32[Array, " B"] | None, stride: int
) -> Float[Array, "B groups row"]:
    """Groups of tokens in rows; TMA moves 8 rows, and only whole such tiles lie in a sequence."""
    if lengths is not None:
        is_valid = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]
        x = jnp.where(is_valid[:, :, None, None], x, jnp.zeros_like(x))
    missing = -x.shape[1] % (8 * stride)
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x
    return x.reshape(x.shape[0], x.shape[1] // stride, -1)


def _partial_sums(
    parts: tiling.Parts,
    q: Float[Array, "B q_groups q_row"],
    k: Float[Array, "B k_groups k_row"],
    lengths: Int32[Array, " B"],
    items: Int32[Array, " items"],
    window: Int32[Array, "2"],
) -> tuple[Float32[Array, "B N rows columns"], ...]:
    """Per row and column tile: sums over key blocks, maximum, sum; unset where nothing is seen.

    `window` has the first row of the part and the number of its items.
    """
    call, config = parts.call, parts.call.config
    width = call.fold.width
    cluster: dict[str, Any] = {}
    if config.cluster > 1:
        cluster = {"cluster": (config.cluster,), "cluster_names": ("cta",)}
    of_heads = (call.batch, call.q_heads)
    sums = (*of_heads, parts.rows, parts.column_tiles * width)
    statistics = jax.ShapeDtypeStruct((*of_heads, parts.column_tiles, parts.rows), jnp.float32)
    return plgpu.kernel(
        functools.partial(_kernel, parts),
        out_type=(jax.ShapeDtypeStruct(sums, jnp.float32), statistics, statistics),
        scratch_types=tiling.scratch(config, width, q.dtype),
        grid=(call.workers,),
        grid_names=("worker",),
        **cluster,
        num_threads=config.threads,
        thread_name="warpgroup",
        kernel_name="antidiagonal_products",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(q, k, lengths, items, window, _selector(width, config.columns))


def _selector(width: int, columns: int) -> Float16[Array, "width columns"]:
    """The matrix that adds up the columns of each key block."""
    block = np.arange(columns)[None, :] // (columns // width)
    return jnp.asarray(block == np.arange(width)[:, None], jnp.float16)


class _Gmem(NamedTuple):
    """The kernel's arguments in global memory."""

    q: Any
    k: Any
    lengths: Any
    items: Any
    window: Any
    selector: Any
    sums: Any
    maxima: Any
    totals: Any


class _Unit(NamedTuple):
    """One tile of a CTA. Rows count from the first query, or from the first of the part."""

    batch: jax.Array
    kv_head: jax.Array
    head: jax.Array
    row: jax.Array
    row_of_part: jax.Array
    column_tile: jax.Array
    steps: jax.Array
    kv_length: jax.Array


class _SharedRing(Ring):
    """A ring of query and key tiles whose keys the CTAs of a cluster copy for each other."""

    def fill(self, step: jax.Array, source: Any) -> None:
        """Begins to copy both tiles, once the slot of this step is free in all CTAs."""
        self.claim(step)
        queries, keys = self.tile(step)
        filled = self.filled.at[self._slot(step)]
        plgpu.copy_gmem_to_smem(source[0], queries, filled)
        plgpu.copy_gmem_to_smem(source[1], keys, filled, collective_axes="cta")


def _ring(config: tiling.TileConfig, slots: tuple[Any, Any], filled: Any, freed: Any) -> Ring:
    ring = _SharedRing if config.cluster > 1 else Ring
    return ring(slots=slots, filled=filled, freed=freed, stages=config.stages)


def _kernel(
    parts: tiling.Parts,
    *gmem: Any,
    q_smem: Any,
    k_smem: Any,
    filled: Any,
    freed: Any,
    **smem: Any,
) -> None:
    config = parts.call.config
    thread = lax.axis_index("warpgroup")
    worker = _Worker(
        parts=parts,
        gmem=_Gmem(*gmem),
        ring=_ring(config, (q_smem, k_smem), filled, freed),
        **smem,
    )

    @pl.when(thread < config.threads - 1)
    def _compute():
        plgpu.set_max_registers(config.computing_registers, action="increase")
        worker.compute(thread)

    @pl.when(thread == config.threads - 1)
    def _load():
        plgpu.set_max_registers(tiling.LOADING_REGISTERS, action="decrease")
        worker.load()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Worker:
    """One CTA's way through its tiles."""

    parts: tiling.Parts
    gmem: _Gmem
    ring: Ring
    selector_smem: Any
    selector_barrier: Any
    lead_barrier: Any

    @property
    def call(self) -> tiling.Call:
        return self.parts.call

    @property
    def config(self) -> tiling.TileConfig:
        return self.parts.call.config

    def load(self) -> None:
        """Fills the slots with what the computing warpgroups will ask for, in that order."""
        plgpu.copy_gmem_to_smem(self.gmem.selector, self.selector_smem, self.selector_barrier)

        def load_unit(round_: jax.Array, step: jax.Array) -> jax.Array:
            unit = self._unit(round_)

            @pl.loop(0, unit.steps)
            def _load_step(j: jax.Array) -> None:
                self.ring.fill(step + j, self._sources(unit, j))

            return step + unit.steps

        self.ring.drain(lax.fori_loop(0, self._rounds(), load_unit, jnp.int32(0)))

    def _sources(self, unit: _Unit, j: jax.Array) -> tuple[Any, Any]:
        """The columns of step j: a part of one token of every query group and key group."""
        call, config = self.call, self.config
        token, part = divide(j, call.head_dim // tiling.DEPTH)
        reverse = call.stride - 1 - token
        q_column = (reverse * call.q_heads + unit.head) * call.head_dim + part * tiling.DEPTH
        k_column = (token * call.kv_heads + unit.kv_head) * call.head_dim + part * tiling.DEPTH
        q_rows = pl.ds(pl.multiple_of(unit.row, config.rows), config.rows)
        k_row = unit.column_tile * config.columns
        k_rows = pl.ds(pl.multiple_of(k_row, config.columns), config.columns)
        q_columns, k_columns = (
            pl.ds(pl.multiple_of(column, tiling.DEPTH), tiling.DEPTH)
            for column in (q_column, k_column)
        )
        return (
            self.gmem.q.at[unit.batch, q_rows, q_columns],
            self.gmem.k.at[unit.batch, k_rows, k_columns],
        )

    def compute(self, warpgroup: jax.Array) -> None:
        """Works on 64 rows of every tile."""
        plgpu.barrier_wait(self.selector_barrier)

        def compute_unit(round_: jax.Array, step: jax.Array) -> jax.Array:
            unit = self._unit(round_)

            @pl.when(unit.steps > 0)
            def _some():
                first = warpgroup * WARPGROUP_ROWS
                logits = self._logits(unit, step, warpgroup, first)
                self._store(unit, first, *self._block_sums(unit, first, logits))

            return step + unit.steps

        lax.fori_loop(0, self._rounds(), compute_unit, jnp.int32(0))

    def _logits(
        self, unit: _Unit, step: jax.Array, warpgroup: jax.Array, first: jax.Array
    ) -> jax.Array:
        """The products of 64 query groups and the tile's key groups."""
        config, ring, lead = self.config, self.ring, self.call.lead

        def products(acc: Any) -> jax.Array:
            if lead:

                @pl.when(warpgroup == 1)
                def _follow():
                    plgpu.barrier_wait(self.lead_barrier)

            @pl.loop(0, unit.steps)
            def _multiply(j: jax.Array) -> None:
                ring.wait(step + j)
                queries, keys = ring.tile(step + j)
                plgpu.wgmma(acc, queries.at[pl.ds(first, WARPGROUP_ROWS)], keys.T)
                if lead:

                    @pl.when((warpgroup == 0) & (j == lead - 1))
                    def _lead():
                        plgpu.barrier_arrive(self.lead_barrier)

                # One product stays in flight; the one before has read its slot.
                plgpu.wgmma_accumulator_load(acc, wait_n=1)

                @pl.when(j > 0)
                def _free():
                    ring.free(step + j - 1)

            return acc[...]

        logits = pl.run_scoped(products, accumulator(config.columns))
        ring.free(step + unit.steps - 1)
        return logits

    def _block_sums(
        self, unit: _Unit, first: jax.Array, logits: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(sums over the columns of each key block of exp2(logit - maximum), maximum)."""
        call, config = self.call, self.config
        column = unit.column_tile * config.columns
        limits = functools.partial(call.key_limit, length=unit.kv_length)
        last_limit = limits(unit.row + first + WARPGROUP_ROWS - 1)
        # Causal limits ascend until they are 0.
        least = jnp.where(last_limit > 0, limits(unit.row + first), 0)
        is_partial = (column + config.columns - 1) * call.stride >= least

        def mask(logits: jax.Array) -> jax.Array:
            row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=_ROWS)
            limit = limits(row + (unit.row + first))
            # Visible are the columns below this; limits and columns are not negative.
            end = lax.div(limit + (call.stride - 1), jnp.full_like(limit, call.stride)) - column
            end = lax.broadcast_in_dim(end, logits.shape, [0])
            return jnp.where(columns_before(logits.shape, end), logits, -jnp.inf)

        logits = lax.cond(is_partial, mask, lambda logits: logits, logits)
        factor = call.head_dim**-0.5 / call.stride * _LOG2_E
        maximum = logits.max(axis=1) * factor
        shift = jnp.where(maximum == -jnp.inf, 0.0, maximum) - _LARGEST_WEIGHT_LOG2

        def sums(acc: Any) -> jax.Array:
            for start in range(0, config.columns, _CHUNK):
                chunk = lax.slice(logits, (0, start), (WARPGROUP_ROWS, start + _CHUNK))
                weights = jnp.exp2(chunk * factor - lax.broadcast_in_dim(shift, chunk.shape, [0]))
                selector = self.selector_smem.at[:, pl.ds(start, _CHUNK)]
                plgpu.wgmma(acc, weights.astype(jnp.float16), selector.T)
            return acc[...]

        return pl.run_scoped(sums, accumulator(call.fold.width)), maximum

    def _store(self, unit: _Unit, first: jax.Array, sums: jax.Array, maximum: jax.Array) -> None:
        gmem, width = self.gmem, self.call.fold.width
        rows = pl.ds(pl.multiple_of(unit.row_of_part + first, WARPGROUP_ROWS), WARPGROUP_ROWS)
        columns = pl.ds(pl.multiple_of(unit.column_tile * width, width), width)
        gmem.sums[unit.batch, unit.head, rows, columns] = sums
        gmem.maxima[unit.batch, unit.head, unit.column_tile, rows] = maximum
        gmem.totals[unit.batch, unit.head, unit.column_tile, rows] = sums.sum(axis=1)

    def _rounds(self) -> jax.Array:
        """How many tiles this cluster has."""
        call = self.call
        units = self.gmem.window[1] * (call.batch * call.kv_heads * call.heads_per_item)
        left = units - lax.axis_index("worker")
        return lax.div(left + (call.workers - 1), jnp.int32(call.workers))

    def _unit(self, round_: jax.Array) -> _Unit:
        """The query heads of a key/value head are neighbours, and share its keys in the caches."""
        parts, call, config = self.parts, self.call, self.config
        in_cluster = lax.axis_index("cta") if config.cluster > 1 else jnp.int32(0)
        first_row, num_items = self.gmem.window[0], self.gmem.window[1]
        place = round_ * call.workers + lax.axis_index("worker")
        rest, head = divide(place, call.heads_per_item)
        rest, item = lax.div(rest, num_items), lax.rem(rest, num_items)
        batch, kv_head = divide(rest, call.kv_heads)
        row_tile, column_tile = divide(self.gmem.items[item], parts.column_tiles)
        row_of_part = row_tile * call.item_rows
        kv_length = self.gmem.lengths[batch]
        steps = self._steps(row_of_part + first_row, column_tile, kv_length)
        if call.pairs_heads:
            head = head * config.cluster + in_cluster
        else:
            row_of_part = row_of_part + in_cluster * config.rows
        return _Unit(
            batch=batch,
            kv_head=kv_head,
            head=kv_head * call.group + head,
            row=row_of_part + first_row,
            row_of_part=row_of_part,
            column_tile=column_tile,
            steps=steps,
            kv_length=kv_length,
        )

    def _steps(self, row: jax.Array, column_tile: jax.Array, kv_length: jax.Array) -> jax.Array:
        """The same for all CTAs of a cluster: none if no row of theirs sees the tile."""
        call = self.call
        last = row + call.item_rows - 1
        if call.is_causal:
            valid_end = jnp.minimum(call.q_len, kv_length - call.offset)
        else:
            valid_end = jnp.int32(call.q_len)
        # The last row with a valid query sees most.
        last = jnp.minimum(last, lax.div(jnp.maximum(valid_end, 1) - 1, jnp.int32(call.stride)))
        limit = jnp.where(row <= last, call.key_limit(last, kv_length), 0)
        is_seen = column_tile * self.config.columns * call.stride < limit
        return jnp.where(is_seen, call.steps, 0)
