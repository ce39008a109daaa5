"""The second stage of antidiagonal scores on Hopper: partial sums become block scores.

A row's partial sums over key blocks are relative to the maximum of its column tile. A warpgroup
first goes over the tiles' maxima and totals of its rows, for the logarithm of each row's sum, then
rescales the partial sums tile by tile and adds up the rows of each query block.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Int32

from sparseattn_jax.kernels.antidiagonal_scores.tiling import Parts


def fold(
    parts: Parts,
    sums: Float32[Array, "B N rows columns"],
    maxima: Float32[Array, "B N tiles rows"],
    totals: Float32[Array, "B N tiles rows"],
    lengths: Int32[Array, " B"],
    window: Int32[Array, "2"],
) -> Float32[Array, "B N blocks columns"]:
    """Block scores, 0 where nothing is seen."""
    config = parts.call.fold
    batch, heads, rows, columns = sums.shape
    per_block = config.groups_per_block
    num_blocks = rows // per_block
    in_blocks = (batch, heads, num_blocks, per_block)
    return plgpu.kernel(
        functools.partial(_kernel, parts),
        out_type=jax.ShapeDtypeStruct((batch, heads, num_blocks, columns), jnp.float32),
        grid=(num_blocks // config.blocks, batch * heads),
        grid_names=("row_tile", "head"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="antidiagonal_fold",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(
        sums.reshape(*in_blocks, columns),
        maxima.reshape(batch, heads, -1, num_blocks, per_block),
        totals.reshape(batch, heads, -1, num_blocks, per_block),
        lengths,
        window,
    )


def _kernel(parts: Parts, *gmem: Any) -> None:
    call = parts.call
    tiles = parts.rows // call.fold.rows
    # The last rows see most: they come first.
    row_tile = tiles - 1 - lax.axis_index("row_tile")
    head = lax.axis_index("head")
    batch = lax.div(head, jnp.int32(call.q_heads))
    head = lax.rem(head, jnp.int32(call.q_heads))
    _Rows(parts, *gmem, batch=batch, head=head, row_tile=row_tile).fold()


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The query blocks of one warpgroup."""

    parts: Parts
    sums: Any
    maxima: Any
    totals: Any
    lengths: Any
    window: Any
    scores: Any
    batch: Any = dataclasses.field(kw_only=True)
    head: Any = dataclasses.field(kw_only=True)
    row_tile: Any = dataclasses.field(kw_only=True)

    def fold(self) -> None:
        config = self.parts.call.fold
        seen = self._seen_tiles()
        shape = (config.blocks, config.groups_per_block)
        layout = config.layout.reduce(2)

        limit = self._limits()

        def statistics(gmem: Any, tile: jax.Array, unseen: float) -> jax.Array:
            # What a row does not see may not have been written.
            source = gmem.at[self.batch, self.head, tile, self._blocks()]
            values = plgpu.load(source, layout=layout, optimized=False)
            return jnp.where(self._first_key(tile) < limit, values, unseen)

        def add_tile(tile: jax.Array, carry: tuple[jax.Array, jax.Array]):
            maximum, total = carry
            of_tile = statistics(self.maxima, tile, -jnp.inf)
            new = jnp.maximum(maximum, of_tile)
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            total = total * jnp.exp2(maximum - shift)
            return new, total + jnp.exp2(of_tile - shift) * statistics(self.totals, tile, 0.0)

        empty = plgpu.layout_cast(jnp.full(shape, -jnp.inf, jnp.float32), layout)
        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
        maximum, total = lax.fori_loop(0, seen, add_tile, (empty, zeros))
        log_sum = jnp.where(total > 0, maximum + jnp.log2(total), 0.0)

        @pl.loop(0, seen)
        def _rescale(tile: jax.Array) -> None:
            factor = jnp.exp2(statistics(self.maxima, tile, -jnp.inf) - log_sum)
            source = self.sums.at[self.batch, self.head, self._blocks(), :, self._columns(tile)]
            sums = plgpu.load(source, layout=config.layout, optimized=False)
            factor = lax.broadcast_in_dim(factor, sums.shape, [0, 1])
            self._store(tile, jnp.where(factor > 0, sums * factor, 0.0).sum(axis=1))

        @pl.loop(seen, self.parts.column_tiles)
        def _clear(tile: jax.Array) -> None:
            shape = (config.blocks, config.width)
            zeros = jnp.zeros(shape, jnp.float32)
            self._store(tile, plgpu.layout_cast(zeros, config.layout.reduce(1)))

    def _seen_tiles(self) -> jax.Array:
        """Column tiles that any of these rows sees: what its last valid query sees.

        The rows after the part's last see more, which is not there and which nobody asks for.
        """
        call = self.parts.call
        length = self.lengths[self.batch]
        first = self.window[0] + self.row_tile * call.fold.rows
        last = first + call.fold.rows - 1
        valid_end = jnp.int32(call.q_len)
        if call.is_causal:
            valid_end = jnp.minimum(valid_end, length - call.offset)
        last = jnp.minimum(last, lax.div(jnp.maximum(valid_end, 1) - 1, jnp.int32(call.stride)))
        limit = jnp.where(first <= last, call.key_limit(last, length), 0)
        keys = self._first_key(jnp.int32(1))
        return jnp.minimum(lax.div(limit + (keys - 1), keys), self.parts.column_tiles)

    def _limits(self) -> jax.Array:
        """Per row, the position that the first key of a column tile lies before if it is seen."""
        call = self.parts.call
        shape = (call.fold.blocks, call.fold.groups_per_block)
        layout = call.fold.layout.reduce(2)
        block = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
        row = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
        first = self.window[0] + self.row_tile * call.fold.rows
        row = row + block * call.fold.groups_per_block + first
        return call.key_limit(row, self.lengths[self.batch])

    def _first_key(self, tile: jax.Array) -> jax.Array:
        return tile * (self.parts.call.config.columns * self.parts.call.stride)

    def _store(self, tile: jax.Array, scores: jax.Array) -> None:
        self.scores[self.batch, self.head, self._blocks(), self._columns(tile)] = scores

    def _blocks(self) -> Any:
        blocks = self.parts.call.fold.blocks
        return pl.ds(pl.multiple_of(self.row_tile * blocks, blocks), blocks)

    def _columns(self, tile: jax.Array) -> Any:
        width = self.parts.call.fold.width
        return pl.ds(pl.multiple_of(tile * width, width), width)
