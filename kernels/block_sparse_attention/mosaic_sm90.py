"""Block-sparse attention on Hopper: FlashAttention-3's shape over block lists.

One CTA per multiprocessor stays for the whole call; its workers go from query tile to query tile.
A worker's last warpgroup loads: it reads the block lists and copies query, key and value tiles into
rings in shared memory, running ahead into the next query tile. The others compute, each on 64 query
rows. A step issues the scores of its key tile and the weighted values of the tile before, then does
its softmax while the tensor cores are busy with those values, or with the other warpgroup's
products. (Shah et al., arXiv:2407.08608, section 3.2; the taking of turns of section 3.1 was
measured to cost more than it brings.)
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
from sparseattn_jax.kernels.block_sparse_attention import tiling
from sparseattn_jax.kernels.mosaic import WARPGROUP_ROWS, Ring

_MATRIX = plgpu.Layout.WGMMA
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)

# Rows keep the reference of their softmax while no score exceeds it by more than this, in base 2:
# weights up to 256 lose no accuracy, and the output is rescaled seldom.
_SLACK = 8.0

# Of the scores of a tile.
type _Mask = Callable[[jax.Array], jax.Array]


def refusal(facts: tiling.CallFacts) -> str | None:
    """Why this kernel cannot take a call with these facts; None if it can."""
    if reason := hopper_refusal(facts.device, facts.dtype):
        return reason
    if facts.head_dim not in (64, 128, 256):
        return f"needs head_dim 64, 128 or 256, got {facts.head_dim}"
    if facts.block_q not in (64, 128) or facts.block_kv not in (64, 128):
        return f"needs blocks of 64 or 128, got {facts.block_q}x{facts.block_kv}"
    if facts.has_segment_ids:
        return "takes no segment_ids yet"
    return None


def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    kv_indices: Int32[Array, "B #N Tb M"],
    kv_num_blocks: Int32[Array, "B #N Tb"],
    kv_lengths: Int32[Array, " B"] | None,
    segment_ids: None,
    windows: Int32[Array, "2 N"] | None,
    *,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
    config: tiling.TileConfig | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """The op of this folder, for calls that `refusal` lets through; by default tiles of its choice.

    Lengths that are no multiple of 8 cost a copy of the arrays concerned.
    """
    del segment_ids
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    config = config or tiling.tile_config(H, block_q, block_kv, device_model(q, k, v))
    call = _Call(
        q_len=T,
        kv_len=S,
        q_heads=N,
        kv_heads=K,
        head_dim=H,
        mask_heads=kv_indices.shape[1],
        width=kv_indices.shape[-1],
        block_q=block_q,
        block_kv=block_kv,
        is_causal=is_causal,
        scale=scale,
        num_tiles=B * N * pl.cdiv(T, block_q),
        max_ctas=multiprocessors(q, k, v),
        config=config,
    )
    order = _tile_order(kv_num_blocks, N, K, kv_head_bytes=2 * S * H * k.dtype.itemsize)
    lengths = jnp.full((B,), S, jnp.int32) if kv_lengths is None else kv_lengths
    q, k, v = (mosaic.whole_tiles(x) for x in (q, k, v))
    out, lse = plgpu.kernel(
        functools.partial(_kernel, call),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, call.num_blocks * block_q), jnp.float32),
        ),
        scratch_types=tiling.scratch(config, H, q.dtype),
        grid=(call.num_ctas,),
        grid_names=("cta",),
        num_threads=config.threads,
        thread_name="warpgroup",
        kernel_name="block_sparse_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(q, k, v, kv_indices, kv_num_blocks, lengths, windows, order)
    return out[:, :T], jnp.swapaxes(lse, 1, 2)[:, :T]


def _tile_order(
    kv_num_blocks: Int32[Array, "B #N Tb"], q_heads: int, kv_heads: int, *, kv_head_bytes: int
) -> Int32[Array, " tiles"]:
    """Flat indices of the query tiles [B, N, Tb] in the order in which they are begun.

    Key/value heads come in groups that fit the L2 cache together; within a group the longest
    lists come first.
    """
    batch, _, num_blocks = kv_num_blocks.shape
    counts = jnp.broadcast_to(kv_num_blocks, (batch, q_heads, num_blocks)).reshape(-1)
    group = max(1, mosaic.L2_BYTES // kv_head_bytes) * (q_heads // kv_heads) * num_blocks
    return mosaic.longest_first(counts, group)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static in a call."""

    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mask_heads: int
    width: int
    block_q: int
    block_kv: int
    is_causal: bool
    scale: float
    num_tiles: int
    max_ctas: int
    config: tiling.TileConfig

    @property
    def num_blocks(self) -> int:
        return pl.cdiv(self.q_len, self.block_q)

    @property
    def num_ctas(self) -> int:
        return min(self.max_ctas, pl.cdiv(self.num_tiles, self.config.workers))

    @property
    def num_workers(self) -> int:
        return self.num_ctas * self.config.workers

    @property
    def parts(self) -> int:
        """Steps per listed block."""
        return self.block_kv // self.config.kv_tile


class _Gmem(NamedTuple):
    """The kernel's arguments in global memory."""

    q: Any
    k: Any
    v: Any
    indices: Any
    counts: Any
    lengths: Any
    windows: Any
    order: Any
    out: Any
    lse: Any


class _Facts(NamedTuple):
    """What is read ahead of a query tile; few, as they take registers meanwhile.

    Attributes:
        flat: the tile's flat index.
        steps: the length of its list.
        kv_length: of its sequence.
        first: the first key of the list's first step.
        second: of its second step.
    """

    flat: jax.Array
    steps: jax.Array
    kv_length: jax.Array
    first: jax.Array
    second: jax.Array


class _Tile(NamedTuple):
    """One query tile and its list; see `_Facts`."""

    batch: jax.Array
    head: jax.Array
    mask_head: jax.Array
    block: jax.Array
    steps: jax.Array
    kv_length: jax.Array
    first: jax.Array
    second: jax.Array


class Window(NamedTuple):
    """What a head's queries see of the listed keys: see the op's `windows`."""

    sink: jax.Array
    recent: jax.Array

    @classmethod
    def of(cls, windows_gmem: Any, head: jax.Array) -> "Window | None":
        """The window of a head; None where the call has none."""
        return None if windows_gmem is None else cls(windows_gmem[0, head], windows_gmem[1, head])


class _Softmax(NamedTuple):
    """The score, in base 2, that a row's weights are relative to, and the sum of the weights.

    The reference is the maximum so far or up to `_SLACK` below it.
    """

    reference: jax.Array
    total: jax.Array


def _kernel(call: _Call, *gmem: Any, out_smem: Any, **rings: Any) -> None:
    config = call.config
    thread = lax.axis_index("warpgroup")
    num_computing = config.workers * config.warpgroups
    loads = thread >= num_computing
    in_cta = jnp.where(loads, thread - num_computing, thread // config.warpgroups)
    worker = functools.partial(
        _Worker,
        call=call,
        gmem=_Gmem(*gmem),
        index=lax.axis_index("cta") * config.workers + in_cta,
        in_cta=in_cta,
        q=Ring.of(rings, "q", config.warpgroups, in_cta),
        k=Ring.of(rings, "k", config.k_stages, in_cta),
        v=Ring.of(rings, "v", config.v_stages, in_cta),
    )

    @pl.when(thread < num_computing)
    def _compute():
        plgpu.set_max_registers(config.computing_registers, action="increase")
        warpgroup = lax.rem(thread, jnp.int32(config.warpgroups))
        worker().compute(warpgroup, out_smem)

    @pl.when(loads)
    def _load():
        plgpu.set_max_registers(tiling.LOADING_REGISTERS, action="decrease")
        worker().load()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Worker:
    """A loading warpgroup and the computing ones that it serves.

    The ring of queries has one slot per computing warpgroup, each with its own rows.
    """

    call: _Call
    gmem: _Gmem
    index: jax.Array
    in_cta: jax.Array
    q: Ring
    k: Ring
    v: Ring

    def load(self) -> None:
        """Fills the rings with what the computing warpgroups will ask for, in that order."""
        warpgroups = self.call.config.warpgroups

        def load_tile(round_: jax.Array, tile: _Tile, step: jax.Array) -> jax.Array:
            for part in range(warpgroups):
                rows = self._rows(tile, part)
                source = self.gmem.q.at[tile.batch, rows, tile.head]
                self.q.fill(round_ * warpgroups + part, source)
            return self._load_list(tile, step)

        rounds, steps = self._for_each_tile(load_tile)
        self.q.drain(rounds * warpgroups)
        self.k.drain(steps)
        self.v.drain(steps)

    def _load_list(self, tile: _Tile, step: jax.Array) -> jax.Array:
        """Loads keys one step ahead of values; returns the step after the list's last."""
        call = self.call
        kv_head = lax.div(tile.head, jnp.int32(call.q_heads // call.kv_heads))
        visible_end = self._visible_end(tile)

        def source(gmem: Any, start: jax.Array) -> Any:
            keys = pl.ds(pl.multiple_of(start, call.config.kv_tile), call.config.kv_tile)
            return gmem.at[tile.batch, keys, kv_head]

        def load_step(carry):
            j, start, previous = carry
            following = self._kv_start(tile, j + 1)
            self.k.fill(step + j, source(self.gmem.k, start))

            @pl.when(j > 0)
            def _load_values():
                self.v.fill(step + j - 1, source(self.gmem.v, previous))

            return j + 1, following, start

        def more(carry):
            return (carry[0] < tile.steps) & (carry[1] < visible_end)

        begin = (jnp.int32(0), tile.first, jnp.int32(0))
        steps, _, last = lax.while_loop(more, load_step, begin)

        @pl.when(steps > 0)
        def _load_last_values():
            self.v.fill(step + steps - 1, source(self.gmem.v, last))

        return step + steps

    def compute(self, warpgroup: jax.Array, out_smem: Any) -> None:
        """Works on the rows of one computing warpgroup."""
        config = self.call.config

        def compute_tile(round_: jax.Array, tile: _Tile, step: jax.Array) -> jax.Array:
            q_step = round_ * config.warpgroups + warpgroup
            window = Window.of(self.gmem.windows, tile.head)
            self.q.wait(q_step)
            row0 = tile.block * self.call.block_q + warpgroup * WARPGROUP_ROWS
            if config.queries_in_registers:
                queries = plgpu.load(self.q.tile(q_step), layout=_MATRIX)
                plgpu.commit_smem()  # or the next copy there could overtake this read
                self.q.free(q_step)
                rows = _Rows(self, tile, window, row0, lambda: queries)
                out_tile = out_smem.at[self.in_cta * config.warpgroups + warpgroup]
            else:
                # Opaque, or the compiler keeps the addresses of all 16 parts in registers.
                rows = _Rows(
                    self, tile, window, row0, lambda: self.q.tile(lax.optimization_barrier(q_step))
                )
                out_tile = self.q.tile(q_step)
            acc, state, steps = rows.attend(step)
            rows.store(acc, state, out_tile)
            if not config.queries_in_registers:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                self.q.free(q_step)
            return step + steps

        self._for_each_tile(compute_tile)
        plgpu.wait_smem_to_gmem(0)

    def _for_each_tile(
        self, work: Callable[[jax.Array, _Tile, jax.Array], jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Calls `work(round, tile, step)`, which returns the next step; (rounds, steps) in the end.

        Where a tile stands is read two rounds ahead and the tile's facts one, so that nobody waits
        for either; but not where queries have no room in registers: then these have none.
        """
        call, zero = self.call, jnp.int32(0)
        whole = jnp.int32(call.num_tiles // call.num_workers)
        rounds = whole + (self._place(whole) < call.num_tiles).astype(jnp.int32)

        def turn(round_: jax.Array, step: jax.Array) -> jax.Array:
            return work(round_, self._tile(self._facts(self._flat_tile(round_))), step)

        def turn_ahead(round_: jax.Array, carry: tuple[jax.Array, _Facts, jax.Array]):
            step, facts, following = carry
            ahead = self._facts(following), self._flat_tile(round_ + 2)
            return work(round_, self._tile(facts), step), *ahead

        if not call.config.queries_in_registers:
            return rounds, lax.fori_loop(0, rounds, turn, zero)
        begin = (zero, self._facts(self._flat_tile(zero)), self._flat_tile(zero + 1))
        steps, *_ = lax.fori_loop(0, rounds, turn_ahead, begin)
        return rounds, steps

    def _place(self, round_: jax.Array) -> jax.Array:
        """Where in the order this worker's tile of a round stands: back and forth, for balance."""
        last = self.call.num_workers - 1
        within = jnp.where(lax.rem(round_, jnp.int32(2)) == 0, self.index, last - self.index)
        return round_ * self.call.num_workers + within

    def _flat_tile(self, round_: jax.Array) -> jax.Array:
        """The flat index of a round's tile; that of any tile past the last round."""
        return self.gmem.order[jnp.minimum(self._place(round_), self.call.num_tiles - 1)]

    def _facts(self, flat: jax.Array) -> _Facts:
        tile = self._tile(_Facts(flat, flat, flat, flat, flat))
        steps = self.gmem.counts[tile.batch, tile.mask_head, tile.block] * self.call.parts
        first, second = (self._kv_start(tile, jnp.int32(j)) for j in range(2))
        return _Facts(flat, steps, self.gmem.lengths[tile.batch], first, second)

    def _tile(self, facts: _Facts) -> _Tile:
        call = self.call
        row, block = mosaic.divide(facts.flat, call.num_blocks)
        batch, head = mosaic.divide(row, call.q_heads)
        mask_head = head if call.mask_heads > 1 else jnp.int32(0)
        return _Tile(batch, head, mask_head, block, *facts[1:])

    def _rows(self, tile: _Tile, part: int) -> Any:
        return pl.ds(tile.block * self.call.block_q + part * WARPGROUP_ROWS, WARPGROUP_ROWS)

    def _visible_end(self, tile: _Tile) -> jax.Array:
        """No query of the tile sees a key from there on."""
        if not self.call.is_causal:
            return tile.kv_length
        first = tile.block * self.call.block_q + self.call.kv_len - self.call.q_len
        end = jnp.minimum(first + self.call.block_q, tile.kv_length)
        return jnp.where(first < tile.kv_length, end, 0)

    def _kv_start(self, tile: _Tile, j: jax.Array) -> jax.Array:
        """The first key of step j of a tile's list; of any step where the list is over."""
        listed, part = mosaic.divide(j, self.call.parts)
        entry = jnp.minimum(listed, self.call.width - 1)
        block = self.gmem.indices[tile.batch, tile.mask_head, tile.block, entry]
        return block * self.call.block_kv + part * self.call.config.kv_tile


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The attention of 64 query rows, by one computing warpgroup.

    Keys are visible below a limit per row, so that in an ascending list the tiles that every row
    sees whole come first, then those that need a mask, then those that no row sees. With a window
    the end of the sinks and its left edge cut tiles too: there each tile is asked.
    """

    worker: _Worker
    tile: _Tile
    window: Window | None
    row0: jax.Array
    queries: Callable[[], Any]

    @property
    def call(self) -> _Call:
        return self.worker.call

    def attend(self, step: jax.Array) -> tuple[jax.Array, _Softmax, jax.Array]:
        """(unnormalised output, softmax state, steps taken), from this step of the rings on."""
        worker, tile = self.worker, self.tile
        visible_end = worker._visible_end(tile)
        full_end = self._full_end()
        zeros = jnp.zeros((WARPGROUP_ROWS, self.call.head_dim), jnp.float32)
        no_values = plgpu.layout_cast(zeros, _MATRIX)

        def more(j: jax.Array, start: jax.Array, *_: Any) -> jax.Array:
            return (j < tile.steps) & (start < visible_end)

        def more_unmasked(j: jax.Array, start: jax.Array, *_: Any) -> jax.Array:
            return (j < tile.steps) & (start + self.call.config.kv_tile <= full_end)

        def is_partial(start: jax.Array) -> jax.Array:
            past_full = start + self.call.config.kv_tile > full_end
            window = self.window
            return past_full if window is None else past_full | self._is_cut(window, start)

        def mask_if_partial(start: jax.Array) -> _Mask:
            partial, mask = is_partial(start), functools.partial(self._mask, start)
            return lambda scores: lax.cond(partial, mask, lambda scores: scores, scores)

        def always_mask(start: jax.Array) -> _Mask:
            return functools.partial(self._mask, start)

        def wait_for_keys(j: jax.Array, start: jax.Array) -> None:
            @pl.when(more(j, start))
            def _wait():
                worker.k.wait(step + j)

        def advance(mask: Callable[[jax.Array], _Mask] | None, carry: Any) -> Any:
            j, start, values, decay, softmax, weights = carry
            following = worker._kv_start(tile, j + 1)
            before_values = functools.partial(wait_for_keys, j + 1, following)
            mask_here = None if mask is None else mask(start)
            state = self._step(step + j, values, decay, softmax, weights, mask_here, before_values)
            return j + 1, following, *state

        def some() -> tuple[Any, ...]:
            softmax, weights = self._first_step(step, mask_if_partial(tile.first))
            wait_for_keys(jnp.int32(1), tile.second)
            carry = (jnp.int32(1), tile.second, no_values, mosaic.row_vector(1.0), softmax, weights)
            if self.window is None:
                carry = lax.while_loop(
                    lambda c: more_unmasked(*c), functools.partial(advance, None), carry
                )
            mask = always_mask if self.window is None else mask_if_partial
            carry = lax.while_loop(lambda c: more(*c), functools.partial(advance, mask), carry)
            j, _, values, decay, softmax, weights = carry
            values = _shrink(values, decay)
            return self._last_values(step + j - 1, values, weights), softmax, j

        def none() -> tuple[Any, ...]:
            return (
                no_values,
                _Softmax(mosaic.row_vector(-jnp.inf), mosaic.row_vector(0.0)),
                jnp.int32(0),
            )

        visible = more(jnp.int32(0), tile.first)
        return lax.cond(visible, some, none)

    def store(self, acc: jax.Array, softmax: _Softmax, out_tile: Any) -> None:
        """Writes output, by way of `out_tile`, and log-sum-exp; rows past the end fall away."""
        reference, total = softmax
        inverse = jnp.where(total > 0, 1 / total, 0.0)
        out = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
        rows = pl.ds(self.row0, WARPGROUP_ROWS)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_tile[...] = out.astype(out_tile.dtype)
        plgpu.commit_smem()
        gmem = self.worker.gmem
        plgpu.copy_smem_to_gmem(out_tile, gmem.out.at[self.tile.batch, rows, self.tile.head])
        gmem.lse[self.tile.batch, self.tile.head, rows] = reference * _LN_2 + jnp.log(total)

    def _first_step(self, step: jax.Array, mask: _Mask):
        """Softmax state and weights of a list's first tile."""
        k = self.worker.k

        def products(scores_acc: Any) -> jax.Array:
            k.wait(step)
            plgpu.wgmma(scores_acc, self.queries(), k.tile(step).T)
            return scores_acc[...]

        scores = pl.run_scoped(products, self._scores_acc())
        k.free(step)
        scores = mask(scores)
        empty = _Softmax(mosaic.row_vector(-jnp.inf), mosaic.row_vector(0.0))
        softmax, weights, _ = self._softmax(empty, scores, may_be_empty=True)
        return softmax, weights.astype(self._dtype)

    def _step(
        self,
        step: jax.Array,
        values: jax.Array,
        decay: jax.Array,
        softmax: _Softmax,
        weights: jax.Array,
        mask: _Mask | None,
        before_values: Callable[[], None],
    ) -> tuple[jax.Array, jax.Array, _Softmax, jax.Array]:
        """The scores and softmax of this tile, the weighted values of the tile before.

        `values` have yet to shrink by `decay`. The keys of this step have been waited for;
        `before_values` waits for those of the next.
        """
        k, v = self.worker.k, self.worker.v

        def products(scores_acc: Any, values_acc: Any):
            plgpu.wgmma(scores_acc, self.queries(), k.tile(step).T)
            values_acc[...] = _shrink(values, decay)
            v.wait(step - 1)
            plgpu.wgmma(values_acc, weights, v.tile(step - 1))
            scores = plgpu.wgmma_accumulator_load(scores_acc, wait_n=1)
            k.free(step)
            if mask is not None:
                scores = mask(scores)
            # Without the barrier and the branch of the wait, compilers move the softmax past the
            # wait for the values, where no product runs beside it.
            results = self._softmax(softmax, scores, may_be_empty=mask is not None)
            new_softmax, new_weights, new_decay = lax.optimization_barrier(results)
            before_values()
            new_values = values_acc[...]
            v.free(step - 1)
            # Not before: the registers of the old weights were being read.
            return new_values, new_decay, new_softmax, new_weights.astype(self._dtype)

        return pl.run_scoped(products, self._scores_acc(), self._values_acc())

    def _last_values(self, step: jax.Array, values: jax.Array, weights: jax.Array) -> jax.Array:
        v = self.worker.v

        def products(values_acc: Any) -> jax.Array:
            values_acc[...] = values
            v.wait(step)
            plgpu.wgmma(values_acc, weights, v.tile(step))
            return values_acc[...]

        values = pl.run_scoped(products, self._values_acc())
        v.free(step)
        return values

    def _softmax(self, softmax: _Softmax, scores: jax.Array, *, may_be_empty: bool):
        """(new state, weights, what earlier weights shrink by) of the online softmax."""
        factor = self.call.scale * _LOG2_E
        highest = scores.max(axis=1) * factor
        old = softmax.reference
        reference = jnp.where(highest > old + _SLACK, highest, old)
        shift = jnp.where(reference == -jnp.inf, 0.0, reference) if may_be_empty else reference
        weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(shift, scores.shape, [0]))
        decay = jnp.exp2(old - shift)
        total = softmax.total * decay + weights.sum(axis=1)
        return _Softmax(reference, total), weights, decay

    def _full_end(self) -> jax.Array:
        """Every row sees all keys before there."""
        call, kv_length = self.call, self.tile.kv_length
        if not call.is_causal:
            return kv_length
        first = self.row0 + call.kv_len - call.q_len
        last = jnp.minimum(first + WARPGROUP_ROWS, call.kv_len) - 1
        return jnp.where(last < kv_length, first + 1, 0)

    def _is_cut(self, window: Window, start: jax.Array) -> jax.Array:
        """Whether the window hides a key of a tile from some row."""
        last = self.row0 + (WARPGROUP_ROWS - 1 + self.call.kv_len - self.call.q_len)
        return (start + self.call.config.kv_tile > window.sink) & (start <= last - window.recent)

    def _mask(self, start: jax.Array, scores: jax.Array) -> jax.Array:
        """`scores`, -inf at the keys that a row does not see."""
        call, shape = self.call, scores.shape
        limit = self.tile.kv_length
        if not call.is_causal:
            return jnp.where(mosaic.columns_before(shape, limit - start), scores, -jnp.inf)
        row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=_ROWS)
        position = row + (self.row0 + call.kv_len - call.q_len)
        limit = jnp.where(position < limit, position + 1, 0)
        limit = lax.broadcast_in_dim(limit, shape, [0])
        scores = jnp.where(mosaic.columns_before(shape, limit - start), scores, -jnp.inf)
        if self.window is None:
            return scores
        sink, recent = self.window
        left = lax.broadcast_in_dim(position + (1 - start - recent), shape, [0])
        in_window = jnp.where(mosaic.columns_before(shape, left), -jnp.inf, scores)
        return jnp.where(mosaic.columns_before(shape, sink - start), scores, in_window)

    @property
    def _dtype(self) -> jnp.dtype:
        return self.worker.gmem.q.dtype

    def _scores_acc(self) -> Any:
        return mosaic.accumulator(self.call.config.kv_tile)

    def _values_acc(self) -> Any:
        return mosaic.accumulator(self.call.head_dim)


def _shrink(values: jax.Array, decay: jax.Array) -> jax.Array:
    """`values` times `decay` by rows; most often no row shrinks, and nothing is multiplied."""
    return lax.cond(
        mosaic.warp_any(1.0 - decay),  # pyright: ignore[reportCallIssue]
        lambda: values * lax.broadcast_in_dim(decay, values.shape, [0]),
        lambda: values,
    )
