"""Vertical and slash scores on Hopper: two sweeps over the keys, the weights in shared memory.

The last queries of a head are one or two matrices of 64 rows. A CTA has those of two heads, or the
two of one, a computing warpgroup for each, and goes over a range of the keys of their kv head,
which TMA brings tile by tile. In the first sweep each range leaves a maximum and a sum per row.
With these merged, the second computes the weights again, normalised, and writes them to shared
memory, where every thread adds up one column and one diagonal. Behind the weights of the tile
before, whose last 64 columns are kept, every diagonal is whole: nothing is added across tiles, and
a range begins with the weights of the tile before it. So no sum depends on who is first.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.kernels import mosaic
from sparseattn_jax.kernels.backends import device_model, hopper_refusal, multiprocessors
from sparseattn_jax.kernels.last_queries import last_queries
from sparseattn_jax.kernels.mosaic import WARPGROUP_ROWS, Ring
from sparseattn_jax.kernels.vertical_slash_scores import tiling
from sparseattn_jax.kernels.vertical_slash_scores.tiling import KEYS, TAIL

_MATRIX = plgpu.Layout.WGMMA
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_ONE_PER_THREAD = plgpu.Layout.WG_STRIDED((KEYS,), 1)
_ROWS_AT_ONCE = 16  # whose weights are loaded before the sums go on
_STORED = 8  # columns of weights that are stored at a time
_LOG2_E = math.log2(math.e)


def refusal(facts: tiling.CallFacts) -> str | None:
    """Why these kernels cannot take a call with these facts; None if they can."""
    if reason := hopper_refusal(facts.device, facts.dtype):
        return reason
    if facts.head_dim not in (64, 128, 256):
        return f"needs head_dim 64, 128 or 256, got {facts.head_dim}"
    if facts.num_queries not in (64, 128):
        return f"needs num_queries 64 or 128, got {facts.num_queries}"
    return None


@functools.partial(jax.jit, static_argnames=("num_queries", "workspace_bytes", "config"))
def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    kv_lengths: Int32[Array, " B"] | None,
    *,
    num_queries: int,
    workspace_bytes: int,
    config: tiling.TileConfig | None = None,
) -> tuple[Float32[Array, "B N S"], Float32[Array, "B N S"]]:
    """Sums per key and per distance; the arguments are those of the op, and tiles.

    No part of P leaves a multiprocessor, so that any workspace suffices. Keys that are no multiple
    of 8 cost a copy of k.
    """
    del workspace_bytes
    kv_len, kv_heads = k.shape[1:3]
    group, head_dim = q.shape[2] // kv_heads, q.shape[3]
    row_tiles = group * num_queries // WARPGROUP_ROWS
    call = tiling.Call(
        batch=q.shape[0],
        kv_len=kv_len,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        num_queries=num_queries,
        multiprocessors=multiprocessors(q, k),
        config=config or tiling.tile_config(head_dim, row_tiles, device_model(q, k)),
    )
    queries, is_valid, stops = _rows(call, q, kv_lengths)
    k = mosaic.whole_tiles(k)
    statistics = (call.batch, kv_heads, call.row_tiles, call.ranges, WARPGROUP_ROWS)
    maxima, totals = _launch(call, _find_statistics, queries, k, stops, results=(statistics,) * 2)
    log_sums = _log_sums(maxima, totals, is_valid.reshape(call.batch, call.parts, -1))
    sums = (call.batch, kv_heads, call.row_tiles, call.tiles * KEYS)
    vertical, diagonals = _launch(
        call, _add_weights, queries, k, stops, log_sums, results=(sums,) * 2
    )
    return _vertical(call, vertical, stops), _slash(call, diagonals, stops)


def _rows(
    call: tiling.Call, q: Float[Array, "B T N H"], kv_lengths: Int32[Array, " B"] | None
) -> tuple[Float[Array, "B K rows H"], Bool[Array, "B n"], Int32[Array, " B"]]:
    """(the rows of each kv head, which rows of a head are queries, the position behind the last).

    A head's last row is the last valid query. Rows before the first are 0, and so is the position
    where there is no query.
    """
    queries, first, count = last_queries(
        q, kv_lengths, kv_len=call.kv_len, num_queries=call.num_queries
    )
    missing = call.num_queries - queries.shape[1]
    shift = queries.shape[1] - count
    queries = jnp.pad(queries, ((0, 0), (missing, 0), (0, 0), (0, 0)))
    queries = jax.vmap(lambda x, by: jnp.roll(x, by, axis=0))(queries, shift)
    is_valid = jnp.arange(call.num_queries)[None, :] >= (call.num_queries - count)[:, None]
    queries = jnp.where(is_valid[:, :, None, None], queries, jnp.zeros_like(queries))
    rows = jnp.swapaxes(queries, 1, 2)
    rows = rows.reshape(call.batch, call.kv_heads, -1, call.head_dim)
    return rows, is_valid, jnp.where(count > 0, first + count, 0)


def _log_sums(
    maxima: Float32[Array, "B K row_tiles ranges 64"],
    totals: Float32[Array, "B K row_tiles ranges 64"],
    is_valid: Bool[Array, "B parts 64"],
) -> Float32[Array, "B K row_tiles 64"]:
    """The logarithm, in base 2, of each row's sum over all ranges; inf for what is no query."""
    maximum = maxima.max(axis=-2, keepdims=True)
    maximum = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    total = jnp.sum(totals * jnp.exp2(maxima - maximum), axis=-2)
    log_sums = maximum[:, :, :, 0] + jnp.log2(total)
    is_valid = jnp.tile(is_valid, (1, log_sums.shape[2] // is_valid.shape[1], 1))
    return jnp.where(is_valid[:, None], log_sums, jnp.inf)


def _vertical(
    call: tiling.Call, sums: Float32[Array, "B K row_tiles keys"], stops: Int32[Array, " B"]
) -> Float32[Array, "B N S"]:
    sums = sums.reshape(call.batch, -1, call.parts, sums.shape[-1])[..., : call.kv_len]
    # What no query sees was not written.
    is_seen = jnp.arange(call.kv_len)[None, :] < stops[:, None]
    return jnp.where(is_seen[:, None], sums.sum(axis=2), 0.0)


def _slash(
    call: tiling.Call, sums: Float32[Array, "B K row_tiles keys"], stops: Int32[Array, " B"]
) -> Float32[Array, "B N S"]:
    """By distance what is there by the key of a part's first row, from -63 on."""
    sums = sums.reshape(call.batch, -1, call.parts, sums.shape[-1])
    by_distance = jnp.pad(jnp.flip(sums, axis=-1), ((0, 0), (0, 0), (0, 0), (0, call.kv_len)))
    distance = jnp.arange(call.kv_len)[None, :]
    slash = jnp.zeros((), jnp.float32)
    for part in range(call.parts):
        # The last row of the part stands before this position, its first one 63 keys earlier.
        end = stops - (call.parts - 1 - part) * WARPGROUP_ROWS
        of_part = jax.vmap(lambda x, at: lax.dynamic_slice_in_dim(x, at, call.kv_len, axis=-1))(
            by_distance[:, :, part], sums.shape[-1] - end
        )
        slash += jnp.where((distance < end[:, None])[:, None], of_part, 0.0)
    return slash


def _launch(
    call: tiling.Call, body: Any, *operands: Array, results: tuple[tuple[int, ...], ...]
) -> tuple[Array, ...]:
    """One sweep over the keys."""
    config = call.config
    has_weights = body is _add_weights
    return plgpu.kernel(
        functools.partial(_kernel, call, body),
        out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results),
        scratch_types=tiling.scratch(
            config, call.head_dim, operands[0].dtype, has_weights=has_weights
        ),
        grid=call.grid,
        grid_names=("kv_head", "range", "rows"),
        num_threads=config.threads,
        thread_name="warpgroup",
        kernel_name="vertical_slash_sums" if has_weights else "vertical_slash_statistics",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            # The stores of weights are many; what reads them waits explicitly.
            unsafe_no_auto_barriers=True,
        ),
    )(*operands)


def _kernel(
    call: tiling.Call,
    body: Any,
    q: Any,
    k: Any,
    stops: Any,
    *gmem: Any,
    q_smem: Any,
    q_barriers: Any,
    weights_smem: Any = None,
    **rings: Any,
) -> None:
    config = call.config
    thread = lax.axis_index("warpgroup")
    range_ = _range(call, stops, halo=_HALO if body is _add_weights else 0)
    ring = Ring.of(rings, "k", config.stages)

    @pl.when(thread < config.workers)
    def _compute():
        plgpu.set_max_registers(config.computing_registers, action="increase")
        worker = _Worker(
            call=call,
            range_=range_,
            row_tile=lax.axis_index("rows") * config.workers + thread,
            q=q_smem.at[thread],
            k=ring,
            weights=None if weights_smem is None else weights_smem.at[thread],
        )
        worker.fetch_queries(q, q_barriers.at[thread])
        body(worker, *gmem)

    @pl.when(thread == config.workers)
    def _load():
        plgpu.set_max_registers(tiling.LOADING_REGISTERS, action="decrease")

        @pl.loop(range_.begin, range_.end)
        def _load_tile(tile: jax.Array) -> None:
            keys = pl.ds(pl.multiple_of(tile * KEYS, KEYS), KEYS)
            ring.fill(tile - range_.begin, k.at[range_.batch, keys, range_.kv_head])

        ring.drain(range_.end - range_.begin)


# Tiles before its range that a CTA computes the weights of.
_HALO = 1


class _Range(NamedTuple):
    """Tiles of keys of a kv head.

    Attributes:
        number: which range of the keys.
        begin: the first tile that is loaded, `first` or one before.
        first: the first tile of the range.
        end: the tile behind the last that a query sees.
        stop: the position behind the last query.
    """

    batch: jax.Array
    kv_head: jax.Array
    number: jax.Array
    begin: jax.Array
    first: jax.Array
    end: jax.Array
    stop: jax.Array


def _range(call: tiling.Call, stops: Any, *, halo: int) -> _Range:
    batch, kv_head = mosaic.divide(lax.axis_index("kv_head"), call.kv_heads)
    number = lax.axis_index("range")
    stop = stops[batch]
    first = number * call.tiles_per_range
    seen = lax.div(stop + (KEYS - 1), jnp.int32(KEYS))
    end = jnp.maximum(first, jnp.minimum(first + call.tiles_per_range, seen))
    begin = jnp.where(first < end, jnp.maximum(first - halo, 0), first)
    return _Range(batch, kv_head, number, begin, first, end, stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Worker:
    """A computing warpgroup: 64 rows of queries against a range of keys."""

    call: tiling.Call
    range_: _Range
    row_tile: jax.Array
    q: Any
    k: Ring
    weights: Any

    def fetch_queries(self, q: Any, arrived: Any) -> None:
        rows = pl.ds(pl.multiple_of(self.row_tile * WARPGROUP_ROWS, WARPGROUP_ROWS), WARPGROUP_ROWS)
        plgpu.copy_gmem_to_smem(q.at[self.range_.batch, self.range_.kv_head, rows], self.q, arrived)
        plgpu.barrier_wait(arrived)

    def logits(self, tile: jax.Array) -> jax.Array:
        """Scaled products in base 2 with a tile of keys, -inf where a row does not see a key."""
        step = tile - self.range_.begin

        def multiply(acc: Any) -> jax.Array:
            self.k.wait(step)
            plgpu.wgmma(acc, self.q, self.k.tile(step).T)
            return acc[...]

        logits = pl.run_scoped(multiply, mosaic.accumulator(KEYS))
        self.k.free(step)
        # How many keys of the tile the first row sees; every row sees one more than the one before.
        parts = self.call.parts
        part = lax.rem(self.row_tile, jnp.int32(parts))
        first_row = self.range_.stop - (parts - part) * WARPGROUP_ROWS
        seen = first_row + 1 - tile * KEYS

        def mask(logits: jax.Array) -> jax.Array:
            row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=_ROWS)
            end = lax.broadcast_in_dim(row + seen, logits.shape, [0])
            return jnp.where(mosaic.columns_before(logits.shape, end), logits, -jnp.inf)

        logits = lax.cond(seen < KEYS, mask, lambda logits: logits, logits)
        return logits * (self.call.head_dim**-0.5 * _LOG2_E)


def _find_statistics(worker: _Worker, maxima: Any, totals: Any) -> None:
    """Leaves the maximum of the rows' logits, and the sum of exp2(logit - maximum)."""
    range_ = worker.range_

    def add_tile(tile: jax.Array, carry: tuple[jax.Array, jax.Array]):
        maximum, total = carry
        logits = worker.logits(tile)
        new = jnp.maximum(maximum, logits.max(axis=1))
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        weights = jnp.exp2(logits - lax.broadcast_in_dim(shift, logits.shape, [0]))
        return new, total * jnp.exp2(maximum - shift) + weights.sum(axis=1)

    empty = mosaic.row_vector(-jnp.inf), mosaic.row_vector(0.0)
    maximum, total = lax.fori_loop(range_.begin, range_.end, add_tile, empty)
    place = range_.batch, range_.kv_head, worker.row_tile, range_.number
    maxima[place] = maximum
    totals[place] = total


def _add_weights(worker: _Worker, log_sums: Any, vertical: Any, diagonals: Any) -> None:
    """Leaves the sums of the columns and of the diagonals of the weights.

    Diagonals count by the key of the first row: the sum of tile j's thread t is that of
    key j * 128 + t - 63 in row 0.
    """
    range_, smem = worker.range_, worker.weights
    place = range_.batch, range_.kv_head, worker.row_tile
    log_sum = plgpu.load(log_sums.at[place], layout=_ROWS, optimized=False)
    nothing = jnp.zeros((WARPGROUP_ROWS, TAIL), jnp.float32)
    _store(smem, 0, plgpu.layout_cast(nothing, _MATRIX))

    @pl.loop(range_.begin, range_.end)
    def _add_tile(tile: jax.Array) -> None:
        logits = worker.logits(tile)
        weights = jnp.exp2(logits - lax.broadcast_in_dim(log_sum, logits.shape, [0]))
        _store(smem, TAIL, weights)
        plgpu.commit_smem()

        @pl.when(tile >= range_.first)
        def _sum():
            keys = pl.ds(pl.multiple_of(tile * KEYS, KEYS), KEYS)
            vertical[*place, keys], diagonals[*place, keys] = _sums(smem)

        plgpu.commit_smem()  # the sums have been read
        _store(smem, 0, weights[:, KEYS - TAIL :])


def _store(smem: Any, first: int, weights: jax.Array) -> None:
    # A store may be no wider than what the distance between the rows is a multiple of.
    for column in range(0, weights.shape[1], _STORED):
        columns = pl.ds(first + column, _STORED)
        smem[:, columns] = weights[:, column : column + _STORED]


def _sums(smem: Any) -> tuple[jax.Array, jax.Array]:
    """Sums over the rows at each key of the tile, and along the diagonals that end in it."""

    def add_rows(i: jax.Array, carry: tuple[jax.Array, jax.Array]):
        columns, diagonals = carry
        for row in [i * _ROWS_AT_ONCE + j for j in range(_ROWS_AT_ONCE)]:
            columns += _load(smem, row, TAIL)
            diagonals += _load(smem, row, row + 1)
        return columns, diagonals

    zeros = plgpu.layout_cast(jnp.zeros((KEYS,), jnp.float32), _ONE_PER_THREAD)
    return lax.fori_loop(0, WARPGROUP_ROWS // _ROWS_AT_ONCE, add_rows, (zeros, zeros))


def _load(smem: Any, row: jax.Array, first: jax.Array | int) -> jax.Array:
    return plgpu.load(smem.at[row, pl.ds(first, KEYS)], layout=_ONE_PER_THREAD, optimized=False)
