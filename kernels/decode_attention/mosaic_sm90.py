"""Decode attention on Hopper: every multiprocessor takes an equal share of the listed keys.

The tiles of all lists form one sequence, a list after the other, and every worker takes an equal
share of it, wherever lists begin and end. One CTA per multiprocessor stays for the whole call. A
worker's loading warpgroup does nothing but keep tiles of keys and values in flight, from the
share's first to its last, as memory bandwidth is what a decode costs. Its computing warpgroup
holds the queries of a kv head as the rows of one wgmma tile, most of them unused, and leaves a
partial output for each list that it meets. A second kernel merges a query's partial outputs.
(Flash-Decoding, Dao et al., 2023; equal shares are Stream-K's, arXiv:2301.03598.)
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.kernels import mosaic
from sparseattn_jax.kernels.backends import device_model, hopper_refusal, multiprocessors
from sparseattn_jax.kernels.decode_attention import tiling
from sparseattn_jax.kernels.mosaic import WARPGROUP_ROWS, Ring

_MATRIX = plgpu.Layout.WGMMA
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)

# The merge has a thread per column, and loads up to so many partial outputs at a time.
_MERGE_COLUMNS = 128
_MERGED_AT_ONCE = 20

# List lengths that are loaded and added at a time.
_SUMMED_AT_ONCE = 8


def refusal(facts: tiling.CallFacts) -> str | None:
    """Why this kernel cannot take a call with these facts; None if it can."""
    if reason := hopper_refusal(facts.device, facts.dtype):
        return reason
    if facts.head_dim not in (64, 128, 256):
        return f"needs head_dim 64, 128 or 256, got {facts.head_dim}"
    if facts.block_kv not in (None, 64, 128):
        return f"needs blocks of 64 or 128, got {facts.block_kv}"
    if facts.capacity % tiling.TILE_ROWS:
        return f"needs a cache capacity that is a multiple of 8, got {facts.capacity}"
    rows = facts.q_len * tiling.padded_group(facts.group)
    if rows > WARPGROUP_ROWS:
        return (
            f"takes {WARPGROUP_ROWS} rows of queries per kv head, got {rows}: {facts.q_len} tokens "
            f"of {facts.group} heads, in tiles of 8 rows"
        )
    return None


def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "R S K H"],
    v: Float[Array, "R S K H"],
    kv_lengths: Int32[Array, " B"],
    kv_positions: Int32[Array, "B S"] | None,
    kv_indices: Int32[Array, "B #K M"] | None,
    kv_num_blocks: Int32[Array, "B #K"] | None,
    *,
    block_kv: int | None,
    scale: float,
    kv_rows: Int32[Array, " B"] | None = None,
    config: tiling.TileConfig | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """The op of this folder, for calls that `refusal` lets through; by default tiles of its choice.

    Query heads that are no multiple of 8 cost a copy of q.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    config = config or tiling.tile_config(H, block_kv, device_model(q, k, v))
    call = _Call(
        batch=B,
        q_len=T,
        group=N // K,
        kv_heads=K,
        head_dim=H,
        capacity=S,
        listed_heads=0 if kv_indices is None else kv_indices.shape[1],
        width=0 if kv_indices is None else kv_indices.shape[2],
        block_kv=block_kv or config.kv_tile,
        has_positions=kv_positions is not None,
        scale=scale,
        max_ctas=multiprocessors(q, k, v),
        config=config,
    )
    given = kv_lengths, kv_rows, kv_positions, kv_indices, kv_num_blocks
    partials = _attend(call, _whole_tiles(q), k, v, *given)
    out, lse = _merge(call, q.dtype, kv_lengths, kv_num_blocks, *partials)
    return out[..., :H], lse


def _attend(call: "_Call", q: Array, *operands: Array | None) -> "_Partials":
    config = call.config
    kernel = plgpu.kernel(
        functools.partial(_attention_kernel, call),
        out_type=call.partials(),
        scratch_types=tiling.scratch(
            config,
            call.head_dim,
            q.dtype,
            q_len=call.q_len,
            has_positions=call.has_positions,
        ),
        grid=(call.num_ctas,),
        grid_names=("cta",),
        num_threads=config.threads,
        thread_name="warpgroup",
        kernel_name="decode_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
    return _Partials(*kernel(q, *operands))


def _merge(call: "_Call", dtype: jnp.dtype, *operands: Array | None) -> tuple[Array, Array]:
    rows = call.batch, call.q_len, call.kv_heads * call.group
    kernel = plgpu.kernel(
        functools.partial(_merge_kernel, call),
        out_type=(
            jax.ShapeDtypeStruct((*rows, call.merged_columns), dtype),
            jax.ShapeDtypeStruct(rows, jnp.float32),
        ),
        grid=(math.prod(rows),),
        grid_names=("query",),
        kernel_name="decode_attention_merge",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
    return kernel(*operands)


def _whole_tiles(q: Float[Array, "B T N H"]) -> Float[Array, "B T N8 H"]:
    """TMA moves tiles of 8 rows, and only whole ones lie within a token."""
    missing = -q.shape[2] % tiling.TILE_ROWS
    return jnp.pad(q, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else q


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static in a call.

    Attributes:
        listed_heads: kv heads with lists of their own: all, or 1 if they share them; 0 without.
        width: entries of a list, 0 without lists.
        block_kv: slots per listed block, those of a tile without lists.
    """

    batch: int
    q_len: int
    group: int
    kv_heads: int
    head_dim: int
    capacity: int
    listed_heads: int
    width: int
    block_kv: int
    has_positions: bool
    scale: float
    max_ctas: int
    config: tiling.TileConfig

    @property
    def rows(self) -> int:
        """Pairs of a sequence and a kv head, each with a list of tiles."""
        return self.batch * self.kv_heads

    @property
    def parts(self) -> int:
        """Steps per listed block."""
        return self.block_kv // self.config.kv_tile

    @property
    def max_tiles(self) -> int:
        """Tiles of the longest list that there can be."""
        return self.width * self.parts or pl.cdiv(self.capacity, self.config.kv_tile)

    @property
    def num_ctas(self) -> int:
        return min(self.max_ctas, pl.cdiv(self.rows * self.max_tiles, self.config.workers))

    @property
    def shares(self) -> int:
        return self.num_ctas * self.config.workers

    @property
    def groups(self) -> int:
        """Groups of consecutive rows; the lists of a group have the same length."""
        if self.listed_heads > 1:
            return self.rows
        return 1 if self.listed_heads == 0 and self.has_positions else self.batch

    @property
    def group_rows(self) -> int:
        return self.rows // self.groups

    @property
    def q_rows(self) -> int:
        """Rows of a tile of queries that hold some."""
        return self.q_len * self.padded_group

    @property
    def padded_group(self) -> int:
        return tiling.padded_group(self.group)

    @property
    def merged_columns(self) -> int:
        return max(self.head_dim, _MERGE_COLUMNS)

    @property
    def merged_at_once(self) -> int:
        """Partial outputs per round of the merge: what lists of equal length need, evenly."""
        parts = pl.cdiv(self.shares, self.rows) + 1
        return pl.cdiv(parts, pl.cdiv(parts, _MERGED_AT_ONCE))

    def partials(self) -> "_Partials":
        # The share and the row both grow along the sequence of tiles, and at a new segment at
        # least one of them does: their sum is a place of its own for each.
        slots = self.shares + self.rows - 1
        return _Partials(
            out=jax.ShapeDtypeStruct((slots, self.q_rows, self.merged_columns), jnp.float32),
            lse=jax.ShapeDtypeStruct((slots, WARPGROUP_ROWS), jnp.float32),
            first=jax.ShapeDtypeStruct((self.rows,), jnp.int32),
            last=jax.ShapeDtypeStruct((self.rows,), jnp.int32),
        )


class _Partials(NamedTuple):
    """What the shares leave: a partial output for each segment of a list, and where they stand.

    Attributes:
        out: normalised by the segment's own sum of weights.
        lse: log-sum-exp in base 2.
        first: the first partial output of each row.
        last: its last one. Those of a row without tiles are undefined.
    """

    out: Any
    lse: Any
    first: Any
    last: Any


class _Gmem(NamedTuple):
    """The kernel's arguments in global memory; `partials` are its results."""

    q: Any
    k: Any
    v: Any
    lengths: Any
    cache_rows: Any
    positions: Any
    indices: Any
    counts: Any
    partials: _Partials


class _Segment(NamedTuple):
    """Consecutive tiles of one list within a share.

    Attributes:
        row: which list.
        first: the first tile, within the list.
        steps: how many there are; none if the list is empty.
        is_last: whether the list ends here.
    """

    row: jax.Array
    batch: jax.Array
    kv_head: jax.Array
    first: jax.Array
    steps: jax.Array
    is_last: jax.Array


@dataclasses.dataclass(frozen=True)
class _Lists:
    """The lists of all rows, one after the other, as one sequence of tiles."""

    call: _Call
    lengths: Any
    counts: Any

    def tiles(self, row: jax.Array) -> jax.Array:
        """Tiles of a row's list."""
        return self._units(lax.div(row, jnp.int32(self.call.group_rows))) * self._tiles_per_unit

    def total(self) -> jax.Array:
        """Tiles of the whole sequence."""

        def add(chunk: jax.Array, units: jax.Array) -> jax.Array:
            return units + sum(self._chunk(chunk))

        units = lax.fori_loop(0, self._num_chunks, add, jnp.int32(0))
        return units * (self.call.group_rows * self._tiles_per_unit)

    def locate(self, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The row of a tile of the sequence, and the tile's place in the row's list."""
        call = self.call
        tiles_per_unit = call.group_rows * self._tiles_per_unit
        wanted = lax.div(tile, jnp.int32(tiles_per_unit))

        def is_further(carry: Any) -> jax.Array:
            chunk, start, units = carry
            return (chunk < self._num_chunks - 1) & (start + units <= wanted)

        def advance(carry: Any) -> Any:
            chunk, start, units = carry
            return chunk + 1, start + units, sum(self._chunk(chunk + 1))

        zero = jnp.int32(0)
        begin = (zero, zero, sum(self._chunk(zero)))
        chunk, start, _ = lax.while_loop(is_further, advance, begin)
        group, end = chunk * self._chunk_size, start
        for units in self._chunk(chunk):
            end = end + units
            start = jnp.where(end <= wanted, end, start)
            group = group + (end <= wanted).astype(jnp.int32)
        # A share without tiles may begin behind the last list.
        units = jnp.maximum(self._units(jnp.minimum(group, call.groups - 1)), 1)
        in_group, length = tile - start * tiles_per_unit, units * self._tiles_per_unit
        row = group * call.group_rows + lax.div(in_group, length)
        return row, lax.rem(in_group, length)

    @property
    def _tiles_per_unit(self) -> int:
        return self.call.parts if self.call.listed_heads else 1

    @property
    def _chunk_size(self) -> int:
        return min(self.call.groups, _SUMMED_AT_ONCE)

    @property
    def _num_chunks(self) -> int:
        return pl.cdiv(self.call.groups, self._chunk_size)

    def _chunk(self, chunk: jax.Array) -> list[jax.Array]:
        """Units of each group of a chunk."""
        groups, size = self.call.groups, self._chunk_size
        members = [chunk * size + j for j in range(size)]
        if groups % size == 0:
            return [self._units(group) for group in members]
        return [
            jnp.where(group < groups, self._units(jnp.minimum(group, groups - 1)), 0)
            for group in members
        ]

    def _units(self, group: jax.Array) -> jax.Array:
        """Listed blocks, or without lists tiles, of each row of a group."""
        call = self.call
        if call.listed_heads:
            batch, head = mosaic.divide(group, call.listed_heads)
            return self.counts[batch, head]
        if call.has_positions:
            return jnp.int32(call.max_tiles)
        used = jnp.clip(self.lengths[group], 0, call.capacity)
        return lax.div(used + call.config.kv_tile - 1, jnp.int32(call.config.kv_tile))


class _Softmax(NamedTuple):
    """A row's running maximum of the scores, in base 2, and sum of the weights."""

    maximum: jax.Array
    total: jax.Array


def _attention_kernel(
    call: _Call, *gmem: Any, q_smem: Any, q_barriers: Any, out_smem: Any, **rings: Any
) -> None:
    config = call.config
    thread = lax.axis_index("warpgroup")
    loads = thread >= config.workers
    in_cta = jnp.where(loads, thread - config.workers, thread)
    worker = functools.partial(
        _Worker,
        call=call,
        gmem=_Gmem(*gmem[:8], partials=_Partials(*gmem[8:])),
        share=lax.axis_index("cta") * config.workers + in_cta,
        q=q_smem.at[in_cta],
        q_arrived=q_barriers.at[in_cta],
        out=out_smem.at[in_cta],
        kv=Ring.of(rings, "kv", config.stages, in_cta),
        positions=Ring.of(rings, "positions", config.position_stages, in_cta)
        if call.has_positions
        else None,
    )

    @pl.when(thread < config.workers)
    def _compute():
        plgpu.set_max_registers(config.computing_registers, action="increase")
        worker().compute()

    @pl.when(loads)
    def _load():
        plgpu.set_max_registers(tiling.LOADING_REGISTERS, action="decrease")
        worker().load()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Worker:
    """A loading and a computing warpgroup, which go through the segments of one share.

    Both count the same steps. Step i has its keys in step 2 i of the ring `kv` and its values in
    step 2 i + 1. The computing warpgroup fetches the queries itself, so that the loading one never
    waits for a segment to end.
    """

    call: _Call
    gmem: _Gmem
    share: jax.Array
    q: Any
    q_arrived: Any
    out: Any
    kv: Ring
    positions: Ring | None

    @property
    def lists(self) -> _Lists:
        return _Lists(self.call, self.gmem.lengths, self.gmem.counts)

    def load(self) -> None:
        """Fills the rings with what the computing warpgroup will ask for, in that order."""
        kv_tile = self.call.config.kv_tile

        def load_segment(segment: _Segment, step: jax.Array) -> None:
            cache_rows = self.gmem.cache_rows
            cache_row = segment.batch if cache_rows is None else cache_rows[segment.batch]

            def load_step(j: jax.Array, start: jax.Array) -> jax.Array:
                following = self._kv_start(segment, j + 1)
                slots = pl.ds(pl.multiple_of(start, kv_tile), kv_tile)
                if self.positions is not None:
                    self.positions.fill(step + j, self.gmem.positions.at[segment.batch, slots])
                where = cache_row, slots, segment.kv_head
                self.kv.fill(2 * (step + j), self.gmem.k.at[where])
                self.kv.fill(2 * (step + j) + 1, self.gmem.v.at[where])
                return following

            lax.fori_loop(0, segment.steps, load_step, self._kv_start(segment, jnp.int32(0)))

        steps = self._for_each_segment(load_segment)
        self.kv.drain(2 * steps)
        if self.positions is not None:
            self.positions.drain(steps)

    def compute(self) -> None:
        """Leaves the partial output of every segment."""

        def compute_segment(segment: _Segment, step: jax.Array) -> None:
            self._fetch_queries(segment)
            values, softmax = self._attend(segment, step)
            self._store(segment, values, softmax)

        self._for_each_segment(compute_segment)
        plgpu.wait_smem_to_gmem(0)

    def _for_each_segment(self, visit: Callable[[_Segment, jax.Array], None]) -> jax.Array:
        """The step after the last; `visit` gets a segment and its first step."""
        is_pool = self.gmem.cache_rows is not None

        def body(carry: Any) -> Any:
            tile, row, first, step = carry
            segment = self._segment(row, first, end - tile)
            following = tile + segment.steps, row + 1, jnp.int32(0)
            # Half of the rows of a pool may be empty; those need no queries.
            pl.when(segment.steps > 0 if is_pool else True)(lambda: visit(segment, step))
            return *following, step + segment.steps

        total = self.lists.total()
        size, larger = mosaic.divide(total, self.call.shares)
        begin = self.share * size + jnp.minimum(self.share, larger)
        end = begin + size + (self.share < larger).astype(jnp.int32)
        carry = (begin, *self.lists.locate(begin), jnp.int32(0))
        return lax.while_loop(lambda carry: carry[0] < end, body, carry)[-1]

    def _segment(self, row: jax.Array, first: jax.Array, left: jax.Array) -> _Segment:
        """The segment that begins at a tile of a list, in a share that has so many tiles left."""
        rest = self.lists.tiles(row) - first
        steps = jnp.minimum(rest, left)
        batch, kv_head = mosaic.divide(row, self.call.kv_heads)
        return _Segment(row, batch, kv_head, first, steps, steps == rest)

    def _kv_start(self, segment: _Segment, j: jax.Array) -> jax.Array:
        """The first slot of step j of a segment; of any step where the list is over."""
        call = self.call
        tile = segment.first + j
        if not call.listed_heads:
            return tile * call.config.kv_tile
        listed, part = mosaic.divide(tile, call.parts)
        head = segment.kv_head if call.listed_heads > 1 else jnp.int32(0)
        block = self.gmem.indices[segment.batch, head, jnp.minimum(listed, call.width - 1)]
        return block * call.block_kv + part * call.config.kv_tile

    def _fetch_queries(self, segment: _Segment) -> None:
        """Copies the queries of the segment's kv head, and their neighbours' for whole tiles."""
        call = self.call
        head = segment.kv_head * call.group
        head = head - lax.rem(head, jnp.int32(tiling.TILE_ROWS))
        heads = pl.ds(pl.multiple_of(head, tiling.TILE_ROWS), call.padded_group)
        for t in range(call.q_len):
            rows = pl.ds(t * call.padded_group, call.padded_group)
            source = self.gmem.q.at[segment.batch, t, heads]
            plgpu.copy_gmem_to_smem(source, self.q.at[rows], self.q_arrived)
        plgpu.barrier_wait(self.q_arrived)

    def _attend(self, segment: _Segment, step: jax.Array) -> tuple[jax.Array, _Softmax]:
        """(unnormalised output, softmax state) of a segment, from this step of the rings on."""
        zeros = jnp.zeros((WARPGROUP_ROWS, self.call.head_dim), jnp.float32)
        values = plgpu.layout_cast(zeros, _MATRIX)
        softmax = _Softmax(mosaic.row_vector(-jnp.inf), mosaic.row_vector(0.0))
        limit = self._position_limit(segment)

        def advance(j: jax.Array, carry: Any) -> Any:
            start, values, softmax = carry
            following = self._kv_start(segment, j + 1)
            scores = self._scores(2 * (step + j))
            scores = self._mask(scores, step + j, start, limit)
            softmax, weights, decay = self._softmax(softmax, scores)
            values = values * lax.broadcast_in_dim(decay, values.shape, [0])
            return following, self._add_values(2 * (step + j) + 1, values, weights), softmax

        carry = (self._kv_start(segment, jnp.int32(0)), values, softmax)
        return lax.fori_loop(0, segment.steps, advance, carry)[1:]

    def _scores(self, step: jax.Array) -> jax.Array:
        def product(acc: Any) -> jax.Array:
            self.kv.wait(step)
            plgpu.wgmma(acc, self.q, self.kv.tile(step).T)
            return acc[...]

        scores = pl.run_scoped(product, mosaic.accumulator(self.call.config.kv_tile))
        self.kv.free(step)
        return scores

    def _add_values(self, step: jax.Array, values: jax.Array, weights: jax.Array) -> jax.Array:
        def product(acc: Any) -> jax.Array:
            acc[...] = values
            self.kv.wait(step)
            plgpu.wgmma(acc, weights.astype(self.gmem.v.dtype), self.kv.tile(step))
            return acc[...]

        values = pl.run_scoped(product, mosaic.accumulator(self.call.head_dim))
        self.kv.free(step)
        return values

    def _softmax(
        self, softmax: _Softmax, scores: jax.Array
    ) -> tuple[_Softmax, jax.Array, jax.Array]:
        """(new state, weights, what earlier weights shrink by) of the online softmax."""
        factor = self.call.scale * _LOG2_E
        maximum = jnp.maximum(softmax.maximum, scores.max(axis=1) * factor)
        shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(shift, scores.shape, [0]))
        decay = jnp.exp2(softmax.maximum - shift)
        total = softmax.total * decay + weights.sum(axis=1)
        return _Softmax(maximum, total), weights, decay

    def _position_limit(self, segment: _Segment) -> jax.Array:
        """Positions below it are visible to a row of queries."""
        call = self.call
        limit = self.gmem.lengths[segment.batch] - (call.q_len - 1)
        row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=_ROWS)
        limit = limit + lax.div(row, jnp.int32(call.padded_group))
        return limit if call.has_positions else jnp.minimum(limit, call.capacity)

    def _mask(
        self, scores: jax.Array, step: jax.Array, start: jax.Array, limit: jax.Array
    ) -> jax.Array:
        """`scores`, -inf at the slots that a row does not see."""
        limit = lax.broadcast_in_dim(limit, scores.shape, [0])
        if self.positions is not None:
            return jnp.where(self._positions(step, start, scores.shape) < limit, scores, -jnp.inf)
        return jnp.where(mosaic.columns_before(scores.shape, limit - start), scores, -jnp.inf)

    def _positions(self, step: jax.Array, start: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The positions of a tile's slots; the highest there is for empty and absent ones."""
        assert self.positions is not None
        self.positions.wait(step)
        tile = self.positions.tile(step)
        positions = plgpu.load(tile, layout=_COLUMNS, optimized=False)
        plgpu.commit_smem()  # the next copy to the slot is not to pass this load
        self.positions.free(step)
        slot = plgpu.broadcasted_iota(jnp.int32, positions.shape, 0, layout=_COLUMNS)
        is_token = (positions >= 0) & (slot < self.call.capacity - start)
        positions = jnp.where(is_token, positions, jnp.iinfo(jnp.int32).max)
        return lax.broadcast_in_dim(positions, shape, [1])

    def _store(self, segment: _Segment, values: jax.Array, softmax: _Softmax) -> None:
        """Writes the segment's partial output, by way of shared memory, and log-sum-exp."""
        maximum, total = softmax
        inverse = jnp.where(total > 0, 1 / total, 0.0)
        out = values * lax.broadcast_in_dim(inverse, values.shape, [0])
        place = self.share + segment.row
        partials = self.gmem.partials
        rows = pl.ds(0, self.call.q_rows)
        for column in range(0, self.call.head_dim, tiling.OUT_COLUMNS):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.out[...] = out[:, column : column + tiling.OUT_COLUMNS]
            plgpu.commit_smem()
            columns = pl.ds(column, tiling.OUT_COLUMNS)
            plgpu.copy_smem_to_gmem(self.out.at[rows], partials.out.at[place, :, columns])
        partials.lse[place] = maximum + jnp.log(total) * _LOG2_E

        @pl.when(segment.first == 0)
        def _begin():
            partials.first[segment.row] = place

        @pl.when(segment.is_last)
        def _end():
            partials.last[segment.row] = place


def _merge_kernel(call: _Call, *gmem: Any) -> None:
    """out = sum_i 2^lse_i out_i / sum_i 2^lse_i over the partial outputs i of one query."""
    lengths, counts, *partials, out_gmem, lse_gmem = gmem
    partials = _Partials(*partials)
    token, head = mosaic.divide(lax.axis_index("query"), call.kv_heads * call.group)
    batch, t = mosaic.divide(token, call.q_len)
    kv_head, in_group = mosaic.divide(head, call.group)
    row = batch * call.kv_heads + kv_head
    q_row = t * call.padded_group + tiling.first_row(kv_head, call.group) + in_group
    first, last = partials.first[row], partials.last[row]
    is_empty = _Lists(call, lengths, counts).tiles(row) == 0
    layout = plgpu.Layout.WG_STRIDED((call.merged_columns,), call.merged_columns // _MERGE_COLUMNS)
    at_once = call.merged_at_once

    def add(i: jax.Array, carry: Any) -> Any:
        acc, softmax = carry
        places = [first + i * at_once + j for j in range(at_once)]
        clamped = [jnp.minimum(place, last) for place in places]
        outs = [partials.out.at[place, q_row][...] for place in clamped]
        lses = [partials.lse[place, q_row] for place in clamped]
        lses = [jnp.where(p <= last, x, -jnp.inf) for p, x in zip(places, lses, strict=True)]
        maximum = functools.reduce(jnp.maximum, lses, softmax.maximum)
        shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        decay = jnp.exp2(softmax.maximum - shift)
        acc, total = acc * decay, softmax.total * decay
        for out, lse in zip(outs, lses, strict=True):
            weight = jnp.exp2(lse - shift)
            acc, total = acc + out * weight, total + weight
        return acc, _Softmax(maximum, total)

    zeros = plgpu.layout_cast(jnp.zeros((call.merged_columns,), jnp.float32), layout)
    empty = _Softmax(jnp.float32(-jnp.inf), jnp.float32(0.0))
    rounds = jnp.where(is_empty, 0, lax.div(last - first + at_once, jnp.int32(at_once)))
    acc, (maximum, total) = lax.fori_loop(0, rounds, add, (zeros, empty))
    out = acc * jnp.where(total > 0, 1 / total, 0.0)
    out_gmem[batch, t, head] = out.astype(out_gmem.dtype)
    lse_gmem[batch, t, head] = maximum * _LN_2 + jnp.log(total)
