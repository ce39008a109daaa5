"""Gradients of block-sparse attention on Hopper: FlashAttention-3's shape over transposed lists.

One CTA per multiprocessor stays for the whole call and draws key tile after key tile. Its last
warpgroup loads: it reads the list of the query blocks that see the tile, for all query heads of the
key/value head, and copies queries, output gradients and row statistics into rings in shared memory.
Two warpgroups compute, transposed, so that weights and their gradients are left operands: with S =
K q^T and P = exp(S - lse), dS = P * (V dO^T - delta), they sum dV += P dO and dK += dS q in
registers, exchange dS through shared memory, and add dq = dS^T K to global memory by TMA.
(Shah et al., arXiv:2407.08608, section 3 and appendix B; delta absorbs the gradient of lse.)

A list that is much longer than the others is cut into pieces for several CTAs, whose dk and dv are
summed afterwards. dk and dv are summed in a fixed order. Tiles of dq are added in the order of
their arrival, in float32: its last bits may differ from run to run.
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
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.kernels import mosaic
from sparseattn_jax.kernels.backends import device_model, multiprocessors
from sparseattn_jax.kernels.block_sparse_attention import mosaic_sm90, tiling, vjp_plan
from sparseattn_jax.kernels.block_sparse_attention.mosaic_sm90 import Window
from sparseattn_jax.kernels.block_sparse_attention.vjp_plan import PIECES, Call
from sparseattn_jax.kernels.mosaic import WARPGROUP_ROWS, Ring

_MATRIX = plgpu.Layout.WGMMA
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_LOG2_E = math.log2(math.e)


def refusal(facts: tiling.CallFacts) -> str | None:
    """Why this kernel cannot take a call with these facts; None if it can."""
    return mosaic_sm90.refusal(facts)


def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    kv_indices: Int32[Array, "B #N Tb M"],
    kv_num_blocks: Int32[Array, "B #N Tb"],
    kv_lengths: Int32[Array, " B"] | None,
    segment_ids: None,
    windows: Int32[Array, "2 N"] | None,
    out: Float[Array, "B T N H"],
    lse: Float32[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    d_lse: Float32[Array, "B T N"],
    *,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
    config: tiling.VjpConfig | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of q, k and v, for calls that `refusal` lets through.

    Takes float32 memory of q's shape, and for the pieces of long lists up to 32 MiB. Lengths that
    are no multiple of 8 cost a copy of the arrays concerned.
    """
    del segment_ids
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    config = config or tiling.vjp_config(H, block_kv, device_model(q, k, v))
    call = Call(
        q_len=T,
        kv_len=S,
        q_heads=N,
        kv_heads=K,
        head_dim=H,
        mask_heads=min(kv_indices.shape[1], K),
        block_q=block_q,
        block_kv=block_kv,
        is_causal=is_causal,
        scale=scale,
        num_tiles=B * K * pl.cdiv(S, config.kv_tile),
        max_ctas=multiprocessors(q, k, v),
        config=config,
    )
    q_indices, q_counts = vjp_plan.transposed_lists(kv_indices, kv_num_blocks, call)
    plan = vjp_plan.plan(q_counts, call)
    lengths = jnp.full((B,), S, jnp.int32) if kv_lengths is None else kv_lengths
    statistics = vjp_plan.row_statistics(out, lse, d_out, d_lse, call)
    q, k, v, d_out = (mosaic.whole_tiles(x) for x in (q, k, v, d_out))
    counter = jax.new_ref(jnp.zeros((1,), jnp.int32))
    d_q = jax.new_ref(jnp.zeros(q.shape, jnp.float32))
    d_k, d_v, pieces = plgpu.kernel(
        functools.partial(_kernel, call),
        out_type=(
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((call.num_long, PIECES, 2, config.kv_tile, H), jnp.float32),
        ),
        scratch_types=tiling.vjp_scratch(config, H, q.dtype),
        grid=(call.num_ctas,),
        grid_names=("cta",),
        num_threads=tiling.VJP_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="block_sparse_attention_vjp",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            # No thread reads what it writes to shared memory: products and copies do.
            unsafe_no_auto_barriers=True,
        ),
    )(
        *(q, k, v, d_out, statistics, q_indices, q_counts.reshape(-1), lengths, windows),
        *(*plan, counter, d_q),
    )
    d_k, d_v = vjp_plan.with_long_lists(d_k, d_v, pieces, plan, call)
    return (d_q[:, :T] * scale).astype(q.dtype), d_k[:, :S], d_v[:, :S]


class _Gmem(NamedTuple):
    """The kernel's arguments in global memory."""

    q: Any
    k: Any
    v: Any
    d_out: Any
    statistics: Any
    indices: Any
    counts: Any
    lengths: Any
    windows: Any
    order: Any
    length: Any
    long_tiles: Any
    counter: Any
    d_q: Any
    d_k: Any
    d_v: Any
    pieces: Any


class _Tile(NamedTuple):
    """One key tile and the list of its key block, up to one step; or a piece of them."""

    batch: jax.Array
    kv_head: jax.Array
    list_index: jax.Array
    key0: jax.Array
    piece: jax.Array
    last_step: jax.Array
    steps: jax.Array
    kv_length: jax.Array


class _Queries(NamedTuple):
    """The 64 queries of one step."""

    head: jax.Array
    row0: jax.Array


def _kernel(
    call: Call,
    *gmem: Any,
    weights_smem: Any,
    d_scores_smem: Any,
    d_q_smem: Any,
    exchange_barrier: Any,
    **rings: Any,
) -> None:
    thread = lax.axis_index("warpgroup")
    config = call.config
    cta = functools.partial(
        _Cta,
        call=call,
        gmem=_Gmem(*gmem),
        numbers=_Numbers(Ring.of(rings, "number", 2)),
        kv=Ring.of(rings, "kv", 1),
        q=Ring.of(rings, "q", config.q_stages),
        d_out=Ring.of(rings, "d_out", config.d_out_stages),
    )

    @pl.when(thread < tiling.VJP_WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(config.computing_registers, action="increase")
        smem = _Exchange(weights_smem, d_scores_smem, d_q_smem.at[thread], exchange_barrier)
        _Warpgroup(cta=cta(), index=thread, smem=smem).compute()

    @pl.when(thread == tiling.VJP_WARPGROUPS)
    def _load():
        plgpu.set_max_registers(config.loading_registers, action="decrease")
        cta().load()


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """The tiles' places in the order, as the CTA draws them; all warpgroups read the ring."""

    ring: Ring

    def draw(self, counter: Any, step: jax.Array) -> None:
        self.ring.claim(step)
        mosaic.take_number(counter, self.ring.tile(step))  # pyright: ignore[reportCallIssue]
        self.ring.announce(step)

    def get(self, step: jax.Array) -> jax.Array:
        self.ring.wait(step)
        number = self.ring.tile(step)[0]
        self.ring.free(step)
        return number


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cta:
    """A loading warpgroup and the two computing ones that it serves.

    Output gradients come with the statistics of their rows.
    """

    call: Call
    gmem: _Gmem
    numbers: _Numbers
    kv: Ring
    q: Ring
    d_out: Ring

    def load(self) -> None:
        """Fills the rings with what the computing warpgroups will ask for, in that order."""

        def load_tile(carry):
            number, round_, step = carry
            tile = self.tile(number)
            self._load_list(tile, round_, step)
            self.numbers.draw(self.gmem.counter, round_ + 1)
            return self.numbers.get(round_ + 1), round_ + 1, step + tile.steps

        self.numbers.draw(self.gmem.counter, jnp.int32(0))
        first = self.numbers.get(jnp.int32(0))
        carry = (first, jnp.int32(0), jnp.int32(0))
        _, rounds, steps = lax.while_loop(self.more, load_tile, carry)
        self.numbers.ring.drain(rounds + 1)
        self.kv.drain(rounds)
        self.q.drain(steps)
        self.d_out.drain(steps)

    def more(self, carry: Any) -> jax.Array:
        """Whether the number that was drawn is that of a tile."""
        return carry[0] < self.gmem.length[0]

    def _load_list(self, tile: _Tile, round_: jax.Array, step: jax.Array) -> None:
        """Loads queries one step ahead of output gradients; the first before the keys."""
        gmem = self.gmem

        def load_queries(i: jax.Array, queries: _Queries) -> None:
            @pl.when(i < tile.steps)
            def _fill():
                self.q.fill(step + i, self.rows(gmem.q, tile, queries))

        first = self.queries(tile, jnp.int32(0))
        load_queries(jnp.int32(0), first)
        self.kv.fill(round_, (self.keys(gmem.k, tile), self.keys(gmem.v, tile)))

        def load_step(i: jax.Array, queries: _Queries) -> _Queries:
            following = self.queries(tile, i + 1)
            q_tile = lax.div(queries.row0, jnp.int32(WARPGROUP_ROWS))
            statistics = gmem.statistics.at[tile.batch, queries.head, q_tile]
            self.d_out.fill(step + i, (self.rows(gmem.d_out, tile, queries), statistics))
            load_queries(i + 1, following)
            return following

        lax.fori_loop(0, tile.steps, load_step, first)

    def tile(self, number: jax.Array) -> _Tile:
        call, gmem = self.call, self.gmem
        unit = gmem.order[number]
        piece = unit - call.num_tiles
        long_list, part = mosaic.divide(jnp.maximum(piece, 0), PIECES)
        flat = jnp.where(piece >= 0, gmem.long_tiles[long_list], unit)
        row, kv_tile = mosaic.divide(flat, call.num_kv_tiles)
        batch, kv_head = mosaic.divide(row, call.kv_heads)
        mask_row = row if call.mask_heads > 1 else batch
        list_index = mask_row * call.num_kv_blocks + lax.div(kv_tile, jnp.int32(call.kv_parts))
        key0 = kv_tile * call.config.kv_tile
        kv_length = gmem.lengths[batch]
        steps_per_entry = call.q_parts * self._heads_per_list
        steps = jnp.where(key0 < kv_length, gmem.counts[list_index] * steps_per_entry, 0)
        first = lax.div(steps * part, jnp.int32(PIECES))
        end = lax.div(steps * (part + 1), jnp.int32(PIECES))
        end = jnp.where(piece >= 0, end, steps)
        steps = jnp.where(piece >= 0, end - first, steps)
        return _Tile(batch, kv_head, list_index, key0, piece, end - 1, steps, kv_length)

    @property
    def _heads_per_list(self) -> int:
        """Query heads that go through one list in turn; else a list names the heads itself."""
        rows = self.gmem.indices.shape[-1]
        return self.call.group if rows == self.call.num_q_blocks else 1

    def queries(self, tile: _Tile, i: jax.Array) -> _Queries:
        """The queries of step i, the last first; any of the list's where it is over.

        From the last query on, since no key block's causal list ends before it: all CTAs work on
        nearly the same queries at a time, whose gradients stay in the L2 cache meanwhile.
        """
        call = self.call
        row, part = mosaic.divide(jnp.maximum(tile.last_step - i, 0), call.q_parts)
        listed, member = mosaic.divide(row, self._heads_per_list)
        q_block = self.gmem.indices[tile.list_index, listed]
        if self._heads_per_list == 1:
            q_block, member = mosaic.divide(q_block, call.group)
        row0 = q_block * call.block_q + part * WARPGROUP_ROWS
        return _Queries(tile.kv_head * call.group + member, row0)

    def rows(self, gmem: Any, tile: _Tile, queries: _Queries) -> Any:
        row0 = pl.multiple_of(queries.row0, WARPGROUP_ROWS)
        return gmem.at[tile.batch, pl.ds(row0, WARPGROUP_ROWS), queries.head]

    def keys(self, gmem: Any, tile: _Tile) -> Any:
        size = self.call.config.kv_tile
        return gmem.at[tile.batch, pl.ds(pl.multiple_of(tile.key0, size), size), tile.kv_head]


class _Exchange(NamedTuple):
    """Shared memory through which the computing warpgroups meet.

    Attributes:
        weights: P [2, keys, queries], if a warpgroup needs the other's; else None.
        d_scores: dS [2, keys, queries].
        d_q: this warpgroup's columns of a tile of dq.
        barrier: completed when both warpgroups have come to the same place.
    """

    weights: Any
    d_scores: Any
    d_q: Any
    barrier: Any

    def meet(self) -> None:
        plgpu.barrier_arrive(self.barrier)
        plgpu.barrier_wait(self.barrier)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Warpgroup:
    """One of the two computing warpgroups.

    Of S it computes its own half: 64 of 128 keys, or 32 of 64 queries. Of dK and dV it has its own
    keys, or its own half of the columns, and of dq always its own half of the columns.
    """

    cta: _Cta
    index: jax.Array
    smem: _Exchange

    def compute(self) -> None:
        cta = self.cta

        def compute_tile(carry):
            number, round_, step = carry
            tile = cta.tile(number)
            self.cta.kv.wait(round_)
            # Opaque, or the compiler finds that the first slot is always the same, and keeps its
            # addresses in registers.
            step = lax.optimization_barrier(step)
            gradients = functools.partial(self._gradients, tile, round_, step)
            d_k, d_v = lax.cond(tile.steps > 0, gradients, self._no_gradients)
            self._store(tile, round_, d_k, d_v)
            return cta.numbers.get(round_ + 1), round_ + 1, step + tile.steps

        carry = (cta.numbers.get(jnp.int32(0)), jnp.int32(0), jnp.int32(0))
        lax.while_loop(cta.more, compute_tile, carry)
        plgpu.wait_smem_to_gmem(0)

    def _no_gradients(self) -> tuple[jax.Array, jax.Array]:
        zeros = jnp.zeros((WARPGROUP_ROWS, self._kv_columns.size), jnp.float32)
        zeros = plgpu.layout_cast(zeros, _MATRIX)
        return zeros, zeros

    def _gradients(self, tile: _Tile, round_: jax.Array, step: jax.Array):
        """(dk, dv) of this warpgroup's share of a key tile; adds to dq on the way."""
        config = self.config

        def loop(d_k_acc: Any, d_v_acc: Any, scores_acc: Any) -> tuple[jax.Array, jax.Array]:
            steps = _Steps(self, tile, round_, step, d_k_acc, d_v_acc, scores_acc)
            if config.scores_ahead:
                steps.begin_scores(jnp.int32(0))

            def body(i: jax.Array, queries: _Queries) -> _Queries:
                following = self.cta.queries(tile, i + 1)
                steps.run(i, queries)
                return following

            lax.fori_loop(0, tile.steps, body, self.cta.queries(tile, jnp.int32(0)))
            results = d_k_acc[...], d_v_acc[...]
            self.cta.q.free(step + tile.steps - 1)
            return results

        columns = self._kv_columns.size
        return pl.run_scoped(
            loop,
            mosaic.accumulator(columns),
            mosaic.accumulator(columns),
            mosaic.accumulator(self._q_columns.size),
        )

    def _store(self, tile: _Tile, round_: jax.Array, d_k: jax.Array, d_v: jax.Array) -> None:
        @pl.when(tile.piece >= 0)
        def _store_piece():
            place = mosaic.divide(tile.piece, PIECES)
            for i, d_x in enumerate((d_k, d_v)):
                self.cta.gmem.pieces[*place, i, self._keys, self._kv_columns] = d_x

        @pl.when(tile.piece < 0)
        def _store_whole():
            self._store_whole(tile, round_, d_k, d_v)

        self.cta.kv.free(round_)

    def _store_whole(self, tile: _Tile, round_: jax.Array, d_k: jax.Array, d_v: jax.Array) -> None:
        """Writes dk and dv by way of the tiles of keys and values, once nobody reads them."""
        call, gmem = self.cta.call, self.cta.gmem
        k_tile, v_tile = self.cta.kv.tile(round_)
        self.smem.meet()
        k_tile.at[self._keys, self._kv_columns][...] = (d_k * call.scale).astype(k_tile.dtype)
        v_tile.at[self._keys, self._kv_columns][...] = d_v.astype(v_tile.dtype)
        plgpu.commit_smem()
        self.smem.meet()

        @pl.when(self.index == 0)
        def _copy_d_k():
            plgpu.copy_smem_to_gmem(k_tile, self.cta.keys(gmem.d_k, tile))

        @pl.when(self.index == 1)
        def _copy_d_v():
            plgpu.copy_smem_to_gmem(v_tile, self.cta.keys(gmem.d_v, tile))

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @property
    def config(self) -> tiling.VjpConfig:
        return self.cta.call.config

    @property
    def _keys(self) -> Any:
        """Of the key tile, the keys of this warpgroup's S, dK and dV."""
        splits = self.config.splits_keys
        return _part(self.index if splits else jnp.int32(0), WARPGROUP_ROWS)

    @property
    def _q_columns(self) -> Any:
        """Of the query tile, the queries of this warpgroup's S."""
        return _all(WARPGROUP_ROWS) if self.config.splits_keys else self._share(WARPGROUP_ROWS)

    @property
    def _kv_columns(self) -> Any:
        """Of the head, the columns of this warpgroup's dK and dV."""
        H = self.cta.call.head_dim
        return _all(H) if self.config.splits_keys else self._share(H)

    @property
    def _d_q_columns(self) -> Any:
        return self._share(self.cta.call.head_dim)

    def _share(self, size: int) -> Any:
        return _part(self.index, size // tiling.VJP_WARPGROUPS)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The steps of one key tile by one warpgroup: one per 64 listed queries."""

    warpgroup: _Warpgroup
    tile: _Tile
    round_: jax.Array
    step: jax.Array
    d_k_acc: Any
    d_v_acc: Any
    scores_acc: Any

    @property
    def call(self) -> Call:
        return self.warpgroup.cta.call

    def begin_scores(self, i: jax.Array) -> None:
        """Begins the scores of step i, of the last step where there is no such step."""
        warpgroup, cta = self.warpgroup, self.warpgroup.cta

        @pl.when(i < self.tile.steps)
        def _wait():
            cta.q.wait(self.step + i)

        queries = cta.q.tile(self.step + jnp.minimum(i, self.tile.steps - 1))
        keys, _ = cta.kv.tile(self.round_)
        self.scores_acc[...] = _zeros(self.scores_acc)
        plgpu.wgmma(self.scores_acc, keys.at[warpgroup._keys], queries.at[warpgroup._q_columns].T)

    def run(self, i: jax.Array, queries: _Queries) -> None:
        """One step: its share of dK and dV, and a tile of dq."""
        cta, config, step = self.warpgroup.cta, self.call.config, self.step + i
        if not config.scores_ahead:
            self.begin_scores(i)
        self._write_d_scores(i, queries)
        if config.scores_ahead:
            self.begin_scores(i + 1)
        plgpu.commit_smem()
        # Both have written dS, and have done with the dS of the step before, the next's place.
        self.warpgroup.smem.meet()
        d_q = self._finish(step)
        cta.d_out.free(step)
        self._add(d_q, queries)
        if not config.scores_ahead:
            plgpu.wgmma_accumulator_load(self.d_k_acc)

            @pl.when(i + 1 < self.tile.steps)
            def _free_the_queries():
                cta.q.free(step)

    def _write_d_scores(self, i: jax.Array, queries: _Queries) -> None:
        """Writes dS to shared memory; P too, or else begins its product."""
        warpgroup, cta, smem = self.warpgroup, self.warpgroup.cta, self.warpgroup.smem
        config, step = self.call.config, self.step + i
        is_cut = self._is_cut(queries)
        q_columns = warpgroup._q_columns
        stage = lax.rem(step, jnp.int32(2))
        cta.d_out.wait(step)
        d_out, statistics = cta.d_out.tile(step)

        def products(d_weights_acc: Any) -> jax.Array:
            _, values = cta.kv.tile(self.round_)
            plgpu.wgmma(d_weights_acc, values.at[warpgroup._keys], d_out.at[q_columns].T)
            scores = plgpu.wgmma_accumulator_load(self.scores_acc, wait_n=1)
            if config.scores_ahead:

                @pl.when(i > 0)
                def _free_the_queries_before():
                    cta.q.free(step - 1)

            weights = self._weights(scores, queries, is_cut, statistics)
            rounded = weights.astype(d_out.dtype)
            if config.splits_keys:
                plgpu.wgmma(self.d_v_acc, rounded, d_out)
                d_weights = plgpu.wgmma_accumulator_load(d_weights_acc, wait_n=1)
            else:
                smem.weights.at[stage, :, q_columns][...] = rounded
                d_weights = d_weights_acc[...]
            delta = plgpu.load(statistics.at[1, q_columns], layout=_COLUMNS)
            delta = lax.broadcast_in_dim(delta, weights.shape, [1])
            return (weights * (d_weights - delta)).astype(d_out.dtype)

        d_scores = pl.run_scoped(products, mosaic.accumulator(q_columns.size))
        smem.d_scores.at[stage, warpgroup._keys, q_columns][...] = d_scores

    def _finish(self, step: jax.Array) -> jax.Array:
        """The products that need dS of both warpgroups; returns dq."""
        warpgroup, cta, smem = self.warpgroup, self.warpgroup.cta, self.warpgroup.smem
        config, stage = self.call.config, lax.rem(step, jnp.int32(2))
        kv_columns, d_q_columns = warpgroup._kv_columns, warpgroup._d_q_columns
        d_scores = smem.d_scores.at[stage]
        if config.splits_keys:
            # For the registers of the weights; the next scores go on.
            plgpu.wgmma_accumulator_load(self.d_v_acc, wait_n=1 if config.scores_ahead else 0)
        else:
            d_out, _ = cta.d_out.tile(step)
            plgpu.wgmma(self.d_v_acc, smem.weights.at[stage], d_out.at[:, kv_columns])

        def products(d_q_acc: Any) -> jax.Array:
            keys, _ = cta.kv.tile(self.round_)
            plgpu.wgmma(d_q_acc, d_scores.T, keys.at[:, d_q_columns])
            # dS from shared memory again: there are no registers for it beside the next scores.
            queries = cta.q.tile(step).at[:, kv_columns]
            plgpu.wgmma(self.d_k_acc, d_scores.at[warpgroup._keys], queries)
            return plgpu.wgmma_accumulator_load(d_q_acc, wait_n=1)

        return pl.run_scoped(products, mosaic.accumulator(d_q_columns.size))

    def _weights(
        self,
        scores: jax.Array,
        queries: _Queries,
        is_cut: jax.Array | None,
        statistics: Any,
    ) -> jax.Array:
        """P from S, zero where a query does not see the key."""
        warpgroup = self.warpgroup
        lse = plgpu.load(statistics.at[0, warpgroup._q_columns], layout=_COLUMNS)
        lse = lax.broadcast_in_dim(lse, scores.shape, [1])
        key0 = self.tile.key0 + warpgroup._keys.start
        position0 = queries.row0 + warpgroup._q_columns.start + self.call.kv_len - self.call.q_len
        is_partial = key0 + WARPGROUP_ROWS > self.tile.kv_length
        if self.call.is_causal:
            is_partial |= position0 < key0 + WARPGROUP_ROWS - 1
        if is_cut is not None:
            is_partial |= is_cut
        mask = functools.partial(self._mask, key0, position0, queries)
        scores = lax.cond(is_partial, mask, lambda scores: scores, scores)
        return jnp.exp2(scores * (self.call.scale * _LOG2_E) - lse)

    def _window(self, queries: _Queries) -> Window | None:
        return Window.of(self.warpgroup.cta.gmem.windows, queries.head)

    def _is_cut(self, queries: _Queries) -> jax.Array | None:
        """Whether the window hides a key from some query; None where the call has none."""
        window = self._window(queries)
        if window is None:
            return None
        q_columns = self.warpgroup._q_columns
        key0 = self.tile.key0 + self.warpgroup._keys.start
        first = queries.row0 + q_columns.start + self.call.kv_len - self.call.q_len
        last = first + (q_columns.size - 1)
        return (key0 + WARPGROUP_ROWS > window.sink) & (key0 <= last - window.recent)

    def _mask(
        self,
        key0: jax.Array,
        position0: jax.Array,
        queries: _Queries,
        scores: jax.Array,
    ) -> jax.Array:
        """`scores`, -inf at the keys that a query does not see."""
        key = plgpu.broadcasted_iota(jnp.int32, scores.shape[:1], 0, layout=_ROWS)
        keys_left = self.tile.kv_length - key0
        if not self.call.is_causal:
            key = lax.broadcast_in_dim(key, scores.shape, [0])
            return jnp.where(key < keys_left, scores, -jnp.inf)
        # The first query that sees the key; none of a tile comes up to its width.
        first = jnp.where(key < keys_left, key + (key0 - position0), scores.shape[1])
        first = lax.broadcast_in_dim(first, scores.shape, [0])
        scores = jnp.where(mosaic.columns_before(scores.shape, first), -jnp.inf, scores)
        # Read again: kept from `_is_cut` on, it would take registers that there are not.
        window = self._window(queries)
        if window is None:
            return scores
        # The first query that does not see the key any more; none of a tile for a sink.
        end = key + (key0 - position0 + window.recent)
        end = jnp.where(key < window.sink - key0, scores.shape[1], end)
        end = lax.broadcast_in_dim(end, scores.shape, [0])
        return jnp.where(mosaic.columns_before(scores.shape, end), scores, -jnp.inf)

    def _add(self, d_q: jax.Array, queries: _Queries) -> None:
        """Adds to dq in global memory; rows past the end fall away."""
        warpgroup, cta = self.warpgroup, self.warpgroup.cta
        tile = warpgroup.smem.d_q
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tile[...] = d_q
        plgpu.commit_smem()
        rows = pl.ds(pl.multiple_of(queries.row0, WARPGROUP_ROWS), WARPGROUP_ROWS)
        where = (self.tile.batch, rows, queries.head, warpgroup._d_q_columns)
        plgpu.copy_smem_to_gmem(tile, cta.gmem.d_q.at[where], reduction_op="add")


def _part(index: jax.Array, size: int) -> Any:
    # Opaque, or the compiler keeps the addresses of all parts of K and V in registers.
    index = lax.optimization_barrier(index)
    return pl.ds(pl.multiple_of(index * size, size), size)


def _all(size: int) -> Any:
    return pl.ds(0, size)


def _zeros(acc: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(acc.shape, jnp.float32), _MATRIX)
