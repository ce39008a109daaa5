"""Cumulative block selection on Hopper: a row's scores stay in registers during the search.

A warpgroup holds four rows, one per warp, or one that is long or alone. The rank of a block orders
like the rule of the op, so that a cut in it, found bit by bit, separates what is kept from what is
not; blocks tied at the cut have equal scores, so that their number tells how many are needed. Flags
of the kept and of the tied blocks become words of 32 bits by a sum of powers of two. Scalar code
takes the bits of the words one by one and appends their indices to the list.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float32, Int32

from sparseattn_jax.kernels.backends import DeviceFacts, hopper_refusal

_WORD = 32  # bits

# Most columns of rows of which a warpgroup holds four, and of one that it holds alone.
_SHORT, _LONG = 1024, 8192

_VISIBLE, _FORCED = 1, 2

# Ranks, as signed integers: not visible, then by score, then forced and by score.
_LOWEST = -(2**31)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallFacts:
    """What a backend needs to know to accept or refuse a call."""

    device: DeviceFacts
    num_columns: int


def refusal(facts: CallFacts) -> str | None:
    """Why this kernel cannot take a call with these facts; None if it can."""
    if reason := hopper_refusal(facts.device):
        return reason
    if facts.num_columns > _LONG:
        return f"needs rows of at most {_LONG} blocks, got {facts.num_columns}"
    return None


@functools.partial(jax.jit, static_argnames=("max_blocks",))
def run(
    scores: Float32[Array, "B N Tb Sb"],
    threshold: Float32[Array, " N"],
    forced: Bool[Array, "#B #N Tb Sb"],
    visible: Bool[Array, "#B #N Tb Sb"],
    *,
    max_blocks: int | None,
) -> tuple[Int32[Array, "B N Tb M"], Int32[Array, "B N Tb"], Int32[Array, "B N"]]:
    """Lists of the selected blocks; the arguments are those of the op.

    Rows that are no multiple of four, and columns of 128 (of 512 past 1024), cost copies.
    """
    batch, heads, num_rows, num_columns = scores.shape
    capacity = num_columns if max_blocks is None else min(max_blocks, num_columns)
    rows = _Rows.of(num_rows, num_columns)
    states = jnp.where(forced & visible, _FORCED, jnp.where(visible, _VISIBLE, 0)).astype(jnp.int8)
    scores, states = rows.padded(scores), rows.padded(states)
    padded_rows = scores.shape[2]
    call = _Call(
        rows=rows,
        capacity=capacity,
        may_drop=capacity < num_columns,
        width=_round_up(capacity, rows.unit),
        states_per_batch=states.shape[0] > 1,
        states_per_head=states.shape[1] > 1,
    )
    per_row = jax.ShapeDtypeStruct((batch, heads, padded_rows), jnp.int32)
    indices, counts, dropped = plgpu.kernel(
        functools.partial(_kernel, call),
        out_type=(
            jax.ShapeDtypeStruct((batch, heads, padded_rows, call.width), jnp.int32),
            per_row,
            per_row,
        ),
        scratch_types=call.scratch(),
        # Neighbours read the same states.
        grid=(batch, padded_rows // rows.rows, heads),
        grid_names=("batch", "row_tile", "head"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="select_blocks",
        compiler_params=plgpu.CompilerParams(approx_math=False),
    )(scores, states, threshold)
    num_dropped = dropped[:, :, :num_rows].sum(axis=-1)
    return indices[:, :, :num_rows, :capacity], counts[:, :, :num_rows], num_dropped


def _round_up(x: int, unit: int) -> int:
    return pl.cdiv(x, unit) * unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of one warpgroup, [rows, words, 32]; padded columns are not visible."""

    rows: int
    words: int

    @classmethod
    def of(cls, num_rows: int, num_columns: int) -> "_Rows":
        # The one row of a decode step is listed sooner alone than with three of padding.
        rows = 4 if num_columns <= _SHORT and num_rows > 1 else 1
        unit = 512 // rows
        return cls(rows=rows, words=_round_up(num_columns, unit) // _WORD)

    @property
    def unit(self) -> int:
        """Columns that the layout of a list comes in."""
        return 512 // self.rows

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.rows, self.words, _WORD

    @property
    def layout(self) -> Any:
        """Four neighbouring columns are a thread's, eight threads have the columns of a word."""
        if self.rows == 1:
            tiling = plgpu.Tiling(((1, 16, _WORD), (4, _WORD), (4,)))
            return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
        tiling = plgpu.Tiling(((4, 4, _WORD), (4,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)

    @property
    def list_layout(self) -> Any:
        """The layout of lists, [rows, columns]."""
        if self.rows == 1:
            tiling = plgpu.Tiling(((1, 512), (128,), (4,)))
            return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
        tiling = plgpu.Tiling(((4, 128), (4,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def padded(self, x: Array) -> Array:
        """Whole tiles of rows and columns, the columns in words."""
        missing = -x.shape[2] % self.rows, self.words * _WORD - x.shape[3]
        if any(missing):
            x = jnp.pad(x, ((0, 0), (0, 0), (0, missing[0]), (0, missing[1])))
        return x.reshape(*x.shape[:3], self.words, _WORD)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static in a call."""

    rows: _Rows
    capacity: int
    may_drop: bool
    width: int
    states_per_batch: bool
    states_per_head: bool

    def scratch(self) -> dict[str, Any]:
        per_row = plgpu.SMEM((self.rows.rows,), jnp.int32)
        # A number per row is stored over the smallest shape of the layout of rows.
        tile = plgpu.SMEM((self.rows.rows, self.rows.unit // _WORD, _WORD), jnp.int32)
        return {
            "above_smem": plgpu.SMEM(self.rows.shape[:2], jnp.int32),
            "tied_smem": plgpu.SMEM(self.rows.shape[:2], jnp.int32),
            "list_smem": plgpu.SMEM((self.rows.rows, self.width), jnp.int32),
            "ties_smem": tile,
            "dropped_smem": tile if self.may_drop else None,
            "count_smem": per_row,
            "first_smem": per_row,
        }


class _Prefix(NamedTuple):
    """Per row: everything of a rank above the cut, and of those at the cut the first `ties`."""

    cut: jax.Array
    ties: jax.Array


def _kernel(
    call: _Call,
    scores_gmem: Any,
    states_gmem: Any,
    threshold_gmem: Any,
    indices_gmem: Any,
    counts_gmem: Any,
    dropped_gmem: Any,
    **smem: Any,
) -> None:
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    size = call.rows.rows
    first_row = lax.axis_index("row_tile") * size
    rows = pl.ds(pl.multiple_of(first_row, size), size)
    of_batch = batch if call.states_per_batch else 0
    of_head = head if call.states_per_head else 0
    layout = call.rows.layout
    scores = plgpu.load(scores_gmem.at[batch, head, rows], layout=layout, optimized=False)
    states = plgpu.load(states_gmem.at[of_batch, of_head, rows], layout=layout, optimized=False)
    search = _Search(call.rows, *_ranks_and_masses(scores, states.astype(jnp.int32)))
    prefix = search.by_mass(threshold_gmem[head])
    if call.may_drop:
        prefix, dropped = search.limited(prefix, call.capacity)
        _store_per_row(smem["dropped_smem"], dropped, layout)
    smem["above_smem"][...] = search.words(search.ranks > search.over_columns(prefix.cut))
    smem["tied_smem"][...] = search.words(search.ranks == search.over_columns(prefix.cut))
    _store_per_row(smem["ties_smem"], prefix.ties, layout)
    counts = [_append_indices(call, row, **smem) for row in range(size)]
    # Every warp lists every row, and on its way writes what later entries replace: none may read
    # the lists before all have done. Scalar code has no barriers of its own.
    plgpu.commit_smem()
    for row, count in enumerate(counts):
        counts_gmem[batch, head, first_row + row] = count
        dropped_gmem[batch, head, first_row + row] = (
            smem["dropped_smem"][row, 0, 0] if call.may_drop else 0
        )
        smem["count_smem"][row] = count
        smem["first_smem"][row] = jnp.where(count > 0, smem["list_smem"][row, 0], 0)
    _store_lists(call, indices_gmem.at[batch, head, rows], **smem)


def _store_per_row(smem: Any, values: jax.Array, layout: Any) -> None:
    smem[...] = plgpu.layout_cast(lax.broadcast_in_dim(values, smem.shape, [0]), layout)


def _ranks_and_masses(scores: jax.Array, states: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    # A score of 0 ranks above what is not visible.
    bits = jnp.maximum(jnp.bitwise_and(bits, 2**31 - 1), 1)
    ranks = jnp.where(states == _FORCED, bits, bits + _LOWEST)
    ranks = jnp.where(states == 0, _LOWEST, ranks)
    return ranks, jnp.where(states == 0, 0.0, scores)


@dataclasses.dataclass(frozen=True)
class _Search:
    """The search for a cut in the ranks of some rows."""

    rows: _Rows
    ranks: jax.Array
    masses: jax.Array

    def by_mass(self, threshold: jax.Array) -> _Prefix:
        """The shortest prefix whose mass reaches the threshold, and all that is forced."""
        total = _row_sums(self.masses)
        needed = threshold * total + jnp.where(threshold >= 1.0, jnp.inf, 0.0)
        cut = self._cut(self._mass, needed)
        # Every forced rank is above this one.
        cut = jnp.minimum(cut, -1)
        above = self._mass(self.ranks > self.over_columns(cut))
        score = lax.bitcast_convert_type(jnp.bitwise_and(cut, 2**31 - 1), jnp.float32)
        tied = self._count(self.ranks == self.over_columns(cut))
        ties = jnp.minimum((needed - above) / score, tied.astype(jnp.float32))
        whole = ties.astype(jnp.int32)
        whole = whole + jnp.where(whole.astype(jnp.float32) < ties, 1, 0)
        return _Prefix(cut, jnp.where((cut == _LOWEST) | (cut == -1), 0, whole))

    def limited(self, prefix: _Prefix, capacity: int) -> tuple[_Prefix, jax.Array]:
        """(at most the first `capacity` of a prefix, how many that drops)."""
        selected = self._count(self.ranks > self.over_columns(prefix.cut)) + prefix.ties
        cut = self._cut(self._count, jnp.full_like(selected, capacity))
        ties = capacity - self._count(self.ranks > self.over_columns(cut))
        dropped = jnp.maximum(selected - capacity, 0)
        limited = _Prefix(
            jnp.where(dropped > 0, cut, prefix.cut), jnp.where(dropped > 0, ties, prefix.ties)
        )
        return limited, dropped

    def words(self, flags: jax.Array) -> jax.Array:
        """The flags of 32 columns in the bits of one word."""
        layout = self.rows.layout
        bit = plgpu.broadcasted_iota(jnp.int32, self.rows.shape, 2, layout=layout)
        return jnp.where(flags, jnp.left_shift(jnp.ones_like(bit), bit), 0).sum(axis=2)

    def over_columns(self, per_row: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(per_row, self.rows.shape, [0])

    def _mass(self, flags: jax.Array) -> jax.Array:
        return _row_sums(jnp.where(flags, self.masses, 0.0))

    def _count(self, flags: jax.Array) -> jax.Array:
        return _row_sums(jnp.where(flags, 1, 0))

    def _cut(self, weigh: Callable[[jax.Array], jax.Array], needed: jax.Array) -> jax.Array:
        """The highest cut at or above which blocks weigh as much as is needed.

        Adding a non-negative term to a sum of fixed order never lowers it, so that bisection is
        exact.
        """

        def set_bit(step: jax.Array, cut: jax.Array) -> jax.Array:
            # Bit 31 is inverted in signed ranks: setting it clears it.
            raised = jnp.bitwise_xor(cut, lax.shift_right_logical(jnp.int32(_LOWEST), step))
            weight = weigh(self.ranks >= self.over_columns(raised))
            return jnp.where(weight >= needed, raised, cut)

        layout = self.rows.layout.reduce((1, 2))
        lowest = jnp.full((self.rows.rows,), _LOWEST, jnp.int32)
        return lax.fori_loop(0, _WORD, set_bit, plgpu.layout_cast(lowest, layout))


def _row_sums(x: jax.Array) -> jax.Array:
    # Over the words first: that leaves few values for the shuffles of the second sum.
    return x.sum(axis=1).sum(axis=1)


def _append_indices(
    call: _Call,
    row: int,
    *,
    above_smem: Any,
    tied_smem: Any,
    list_smem: Any,
    ties_smem: Any,
    **_: Any,
) -> jax.Array:
    """Lists the set bits of a row's words in order; returns how many those are."""

    def take_word(word: jax.Array, carry: tuple[jax.Array, jax.Array]):
        tied = tied_smem[row, word]

        def take_bit(carry: tuple[jax.Array, ...]):
            left, count, ties = carry
            bit = left & -left
            list_smem[row, count] = word * _WORD + (_WORD - 1) - lax.clz(bit)
            is_tied = jnp.where((tied & bit) != 0, 1, 0)
            count = count + jnp.where((is_tied == 0) | (ties > 0), 1, 0)
            return left & (left - 1), count, ties - is_tied

        def more(carry: tuple[jax.Array, ...]) -> jax.Array:
            return (carry[0] != 0) & (carry[1] < call.capacity)

        first = (above_smem[row, word] | tied, *carry)
        return lax.while_loop(more, take_bit, first)[1:]

    begin = (jnp.int32(0), ties_smem[row, 0, 0])
    return lax.fori_loop(0, call.rows.words, take_word, begin)[0]


def _store_lists(
    call: _Call, indices_gmem: Any, *, list_smem: Any, count_smem: Any, first_smem: Any, **_: Any
) -> None:
    """Writes the lists; entries past the count repeat the first."""
    layout = call.rows.list_layout
    shape = (call.rows.rows, call.width)
    rows = layout.reduce(1)
    listed = plgpu.load(list_smem, layout=layout, optimized=False)
    count = plgpu.load(count_smem, layout=rows, optimized=False)
    first = plgpu.load(first_smem, layout=rows, optimized=False)
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    is_listed = column < lax.broadcast_in_dim(count, shape, [0])
    indices_gmem[...] = jnp.where(is_listed, listed, lax.broadcast_in_dim(first, shape, [0]))
