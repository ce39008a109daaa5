"""MInference: vertical columns and slashes per head, or what its heads' patterns say."""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from sparseattn_jax.block_mask import BlockMask, num_visible_blocks
from sparseattn_jax.checks import (
    check_causal,
    check_kv_lengths,
    check_positive,
    check_qk,
    check_segment_ids,
    checked,
)
from sparseattn_jax.head_patterns import KINDS, HeadPatterns
from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.backends import Backend, UnsupportedError
from sparseattn_jax.kernels.pooled_scores import pooled_scores
from sparseattn_jax.kernels.vertical_slash_scores import vertical_slash_scores
from sparseattn_jax.pattern import HeadWindows, SparsePattern, TokenColumns
from sparseattn_jax.selection import diagonal_blocks, visible_and_forced

# Published: the fewest distances of a vertical-slash head.
_LEAST = 50

_VERTICAL_SLASH, _BLOCK_SPARSE, _A_SHAPE, _TRI_SHAPE = range(len(KINDS))

type _Lists = tuple[Int32[Array, "B N Tb M"], Int32[Array, "B N Tb"]]


def _check_parameters(self: "MInference", q: jax.Array, is_causal: bool) -> None:
    check_positive(
        slash_size=self.slash_size,
        recent_size=self.recent_size,
        last_size=self.last_size,
        num_queries=self.num_queries,
        block_size=self.block_size,
    )
    for name in ("vertical_size", "sink_size"):
        if getattr(self, name) < 0:
            raise ValueError(f"{name}={getattr(self, name)} must not be negative")
    budget = self.adaptive_budget
    if budget is not None and not 0 < budget <= 1:
        raise ValueError(
            f"adaptive_budget={budget} must lie in (0, 1]: it is a share of the sequence; "
            "pass None to use vertical_size and slash_size"
        )
    if self.heads is not None and self.heads.kinds.shape != q.shape[2:3]:
        raise ValueError(
            f"heads.kinds has shape {self.heads.kinds.shape}, but q has {q.shape[2]} heads; "
            "pass the patterns of this layer, with one entry per query head"
        )
    if self.max_blocks is not None and self.max_blocks < 2:
        raise ValueError(
            f"max_blocks={self.max_blocks} must be at least 2, to hold the diagonal of each row; "
            "raise it, or pass None for no limit"
        )
    if self.max_blocks is not None and self.heads is not None:
        raise ValueError(
            f"max_blocks={self.max_blocks} does not go with heads: their own sizes limit their "
            "lists; pass one of them"
        )
    if not is_causal:
        raise ValueError(
            "is_causal=False: MInference judges by the last queries, which see all keys only "
            "if causal; pass is_causal=True, or select with XAttention"
        )


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, kw_only=True)
class MInference:
    """Vertical columns and slashes of highest mass in the last queries' rows (arXiv:2407.02490).

    The softmax of the last num_queries queries gives the mass of each key and of each distance. A
    head takes the keys of highest mass as columns, the first sink_size always and first, and the
    distances of highest mass, the first recent_size always and first, distance 0 before all; of
    equals the lower. A distance lists, for each query block, the one or two key blocks that hold
    keys at that distance from the positions of a whole block. Columns stay single tokens.

    With `heads` each query head may be something else instead:
    - block_sparse: of each query block the key blocks of highest pooled score, with its diagonal
      and the first block among them;
    - stream_llm (A-shape): the first keys and the recent ones, exact to the token;
    - tri_shape: the same in whole blocks, and everything for the query blocks that hold one of the
      last last_size queries.

    Differences to the published code: any head_dim, batch, length and T <= S; the scale is that of
    the head_dim; forced distances are taken in order, so that none of them is lost to a tie, and
    distance 0 never; blocks are aligned, so that a distance lists up to two of them; block means
    leave padding out.

    Attributes:
        vertical_size: columns of a head, sink_size at least.
        slash_size: distances of a head, 50 or recent_size at least.
        adaptive_budget: share of the valid keys that columns (a fifth of it) and distances (the
            rest) are to number; replaces both sizes, also those of `heads`.
        heads: kind and sizes per query head, by default vertical_and_slash with the sizes above.
        sink_size: first keys that are columns whatever their mass.
        recent_size: shortest distances that are taken whatever their mass. The published pattern
            search has 30.
        last_size: queries at the end of each sequence that see everything in tri_shape heads.
        num_queries: queries that judge.
        block_size: queries and keys per block.
        max_blocks: capacity of a query block's list, by default no limit; not with `heads`. A head
            that lists blocks at more distances keeps those whose distances have the highest mass;
            `SparsePattern.num_dropped` counts the rest. Without a limit the lists of 32 heads and
            128K tokens take 0.5 GB, and grow with the square of the length.
    """

    vertical_size: int = dataclasses.field(default=1000, metadata={"static": True})
    slash_size: int = dataclasses.field(default=6096, metadata={"static": True})
    adaptive_budget: float | None = dataclasses.field(default=None, metadata={"static": True})
    heads: HeadPatterns | None = None
    sink_size: int = dataclasses.field(default=30, metadata={"static": True})
    recent_size: int = dataclasses.field(default=100, metadata={"static": True})
    last_size: int = dataclasses.field(default=100, metadata={"static": True})
    num_queries: int = dataclasses.field(default=64, metadata={"static": True})
    block_size: int = dataclasses.field(default=64, metadata={"static": True})
    max_blocks: int | None = dataclasses.field(default=None, metadata={"static": True})

    @checked(check_qk, check_causal, _check_parameters, check_kv_lengths, check_segment_ids)
    def select(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        *,
        is_causal: bool = True,
        kv_lengths: Int32[Array, " B"] | None = None,
        segment_ids: Int32[Array, "B S"] | None = None,
        backend: Backend | None = None,
    ) -> SparsePattern:
        """Scores and lists; see `Strategy.select`."""
        if segment_ids is not None:
            raise UnsupportedError(
                "MInference does not take segment_ids: its last queries are one sequence's; "
                "pass one sequence per batch row, with kv_lengths"
            )
        q, k = lax.stop_gradient((q, k))
        blocks = _Blocks.of(q, k, self.block_size, kv_lengths)
        vertical, slash = vertical_slash_scores(
            q, k, num_queries=self.num_queries, kv_lengths=kv_lengths, backend=backend
        )
        num_columns, num_slashes = self._sizes(blocks)
        slash = slash.at[:, :, : self.recent_size].set(jnp.inf)
        is_slash = blocks.highest(slash, num_slashes)
        width = min(len(blocks.first_keys), 2 * self._most_slashes(blocks.kv_len))
        lists, num_dropped = blocks.of_slashes(is_slash, slash, width, self.max_blocks)
        windows = None
        if self.heads is not None:
            scores = functools.partial(
                pooled_scores,
                *(q, k),
                block_size=self.block_size,
                kv_lengths=kv_lengths,
                backend=backend,
            )
            lists = self._with_other_heads(self.heads, blocks, lists, scores)
            is_a_shape = self.heads.kinds == _A_SHAPE
            sinks, recents = jnp.moveaxis(self.heads.sizes, -1, 0)
            windows = HeadWindows(
                sinks=jnp.where(is_a_shape, sinks, 0),
                recents=jnp.where(is_a_shape, recents, blocks.kv_len),
            )
        columns, width = None, self._most_columns(blocks.kv_len)
        if width > 0:
            vertical = vertical.at[:, :, : self.sink_size].set(jnp.inf)
            is_column = blocks.highest(vertical, jnp.minimum(num_columns, width))
            indices, counts = block_lists.from_dense(is_column, width)
            columns = TokenColumns(indices=indices, counts=counts, kv_len=blocks.kv_len)
        return SparsePattern(
            blocks=BlockMask(
                kv_indices=lists[0],
                kv_num_blocks=lists[1],
                q_len=blocks.q_len,
                kv_len=blocks.kv_len,
                block_q=self.block_size,
                block_kv=self.block_size,
                is_causal=True,
            ),
            num_dropped=num_dropped,
            columns=columns,
            windows=windows,
        )

    def _sizes(self, blocks: "_Blocks") -> tuple[Int32[Array, "B N"], Int32[Array, "B N"]]:
        """How many columns and distances each head takes of its sequence."""
        lengths = blocks.lengths[:, None]
        if self.adaptive_budget is not None:
            columns, slashes = _shares_of(self.adaptive_budget, lengths)
        elif self.heads is not None:
            columns, slashes = self.heads.sizes[None, :, 0], self.heads.sizes[None, :, 1]
        else:
            columns, slashes = self.vertical_size, self.slash_size
        columns = jnp.minimum(jnp.maximum(columns, self.sink_size), lengths)
        slashes = jnp.minimum(jnp.maximum(slashes, min(_LEAST, self.recent_size)), lengths)
        shape = len(blocks.lengths), blocks.num_heads
        columns, slashes = jnp.broadcast_to(columns, shape), jnp.broadcast_to(slashes, shape)
        if self.heads is None:
            return columns, slashes
        is_vertical_slash = self.heads.kinds[None, :] == _VERTICAL_SLASH
        return jnp.where(is_vertical_slash, columns, 0), jnp.where(is_vertical_slash, slashes, 0)

    def _most_columns(self, kv_len: int) -> int:
        """The most that any head can take."""
        if self.adaptive_budget is not None:
            most = int(_shares_of(self.adaptive_budget, np.int32(kv_len))[0])
        else:
            most = self.vertical_size if self.heads is None else self.heads.max_columns
        return min(max(most, self.sink_size), kv_len)

    def _most_slashes(self, kv_len: int) -> int:
        if self.heads is not None:
            return kv_len
        most = self.slash_size
        if self.adaptive_budget is not None:
            most = int(_shares_of(self.adaptive_budget, np.int32(kv_len))[1])
        return max(most, _LEAST)

    def _with_other_heads(
        self,
        heads: HeadPatterns,
        blocks: "_Blocks",
        lists: _Lists,
        scores: Callable[[], Float32[Array, "B N Tb Sb"]],
    ) -> _Lists:
        """The lists, with those of the heads that are not vertical_and_slash filled in."""
        first, second = jnp.moveaxis(heads.sizes, -1, 0)[:, None, :, None, None]
        visible, forced = blocks.visible_and_forced()

        def is_kind(kind: int) -> Bool[Array, "1 N 1 1"]:
            return (heads.kinds == kind)[None, :, None, None]

        def with_pooled(keep: Bool[Array, "B N Tb Sb"]) -> Bool[Array, "B N Tb Sb"]:
            rank = jnp.where(forced, jnp.inf, scores())
            num_kept = jnp.maximum(first, forced.sum(axis=-1, keepdims=True, dtype=jnp.int32))
            kept = block_lists.keep_highest(
                rank, jnp.broadcast_to(visible, rank.shape), num_kept[..., 0]
            )
            return jnp.where(is_kind(_BLOCK_SPARSE), kept, keep)

        def with_others(lists: _Lists) -> _Lists:
            last_keys = (blocks.first_keys + blocks.size - 1)[None, None, None, :]
            keep = blocks.first_keys[None, None, None, :] < first
            keep = keep | (last_keys > blocks.first_queries[None, None, :, None] - second)
            keep = keep | (is_kind(_TRI_SHAPE) & blocks.hold_last(self.last_size))
            keep = keep & visible
            keep = lax.cond(is_kind(_BLOCK_SPARSE).any(), with_pooled, lambda keep: keep, keep)
            others = block_lists.from_dense(keep)
            is_other = ~is_kind(_VERTICAL_SLASH)
            return (
                jnp.where(is_other, others[0], lists[0]),
                jnp.where(is_other[..., 0], others[1], lists[1]),
            )

        is_any = (heads.kinds != _VERTICAL_SLASH).any()
        return lax.cond(is_any, with_others, lambda lists: lists, lists)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Query and key blocks of a causal call."""

    lengths: Int32[Array, " B"]
    visible_counts: Int32[Array, "B Tb"]
    num_heads: int
    q_len: int
    kv_len: int
    size: int

    @classmethod
    def of(cls, q: Array, k: Array, size: int, kv_lengths: Array | None) -> "_Blocks":
        q_len, kv_len = q.shape[1], k.shape[1]
        counts = num_visible_blocks(
            q_len=q_len,
            kv_len=kv_len,
            block_q=size,
            block_kv=size,
            is_causal=True,
            kv_lengths=kv_lengths,
        )
        return cls(
            lengths=jnp.full(len(q), kv_len, jnp.int32) if kv_lengths is None else kv_lengths,
            visible_counts=jnp.broadcast_to(counts, (len(q), counts.shape[1])),
            num_heads=q.shape[2],
            q_len=q_len,
            kv_len=kv_len,
            size=size,
        )

    @property
    def first_keys(self) -> Int32[np.ndarray, " Sb"]:
        return np.arange(0, self.kv_len, self.size, dtype=np.int32)

    @property
    def first_queries(self) -> Int32[np.ndarray, " Tb"]:
        """Positions."""
        starts = np.arange(0, self.q_len, self.size, dtype=np.int32)
        return starts + (self.kv_len - self.q_len)

    def visible_and_forced(self) -> tuple[Bool[Array, "B 1 Tb Sb"], Bool[Array, "B 1 Tb Sb"]]:
        """Forced is the first block, and the diagonal."""
        diagonals = jnp.asarray(diagonal_blocks(self.q_len, self.kv_len, self.size))
        both = visible_and_forced(self.visible_counts, diagonals, len(self.first_keys))
        return both[0][:, None], both[1][:, None]

    def hold_last(self, num: int) -> Bool[Array, "B 1 Tb 1"]:
        """The query blocks that hold one of the last `num` queries of their sequence."""
        ends = self.lengths[:, None]
        stops = jnp.minimum(self.first_queries[None, :] + self.size, ends)
        return (stops > ends - num)[:, None, :, None]

    def highest(
        self, mass: Float32[Array, "B N S"], counts: Int32[Array, "B N"]
    ) -> Bool[Array, "B N S"]:
        """Of the keys, or distances, of each sequence the `counts` with the highest mass."""
        exists = jnp.arange(self.kv_len)[None, None, :] < self.lengths[:, None, None]
        return block_lists.keep_highest(mass, jnp.broadcast_to(exists, mass.shape), counts)

    def of_slashes(
        self,
        is_slash: Bool[Array, "B N S"],
        mass: Float32[Array, "B N S"],
        width: int,
        max_blocks: int | None,
    ) -> tuple[_Lists, Int32[Array, "B N"]]:
        """Lists of the visible blocks that the distances meet, and how many have no room.

        Distances in blocks count from the key block that holds the last position of a whole query
        block. From there on all query blocks of a head list blocks at the same distances, so that
        every list is a part of one per head, reversed. With `max_blocks` that one keeps the
        distances of highest mass, the shorter of equals.
        """
        before = -(self.kv_len - self.q_len) % self.size
        bases = (self.first_queries + before) // self.size
        num = int(bases[-1]) + 1

        def met(x: Shaped[Array, "B N S"]) -> Shaped[Array, "B N num size"]:
            """The distances of the keys that a query block's last query, or its first, meets."""
            parts = []
            for shift in (before, before + self.size - 1):
                part = jnp.pad(x, ((0, 0), (0, 0), (shift, 0)))[..., : num * self.size]
                part = jnp.pad(part, ((0, 0), (0, 0), (0, num * self.size - part.shape[-1])))
                parts.append(part.reshape(*x.shape[:2], num, self.size))
            return jnp.concatenate(parts, axis=-1)

        def visible_part(keep: Bool[Array, "B N num"]) -> tuple[Array, Array]:
            """The kept distances that lead to visible blocks: from which to which, of each row."""
            nearer = jnp.cumsum(jnp.pad(keep, ((0, 0), (0, 0), (1, 0))), axis=-1, dtype=jnp.int32)
            starts = bases[None, :] + 1 - self.visible_counts
            return jax.vmap(lambda x, at: x[:, at])(nearer, starts), nearer[:, :, bases + 1]

        keep = is_met = met(is_slash).any(axis=-1)
        if max_blocks is not None:
            rank = met(jnp.where(is_slash, mass, 0.0)).sum(axis=-1)
            keep = block_lists.keep_highest(rank, is_met, max_blocks)
            width = min(width, max_blocks)
        starts, stops = visible_part(keep)
        counts = stops - starts
        met_starts, met_stops = visible_part(is_met)
        num_dropped = jnp.sum(met_stops - met_starts - counts, axis=-1, dtype=jnp.int32)
        distances, _ = block_lists.from_dense(keep)
        slots = stops[..., None] - 1 - jnp.arange(width, dtype=jnp.int32)[None, None, None, :]
        taken = jax.vmap(jax.vmap(lambda x, at: x[at]))(distances, jnp.maximum(slots, 0))
        indices = bases[None, None, :, None] - taken
        first = jnp.where(counts[..., None] > 0, indices[..., :1], 0)
        return (jnp.where(slots >= starts[..., None], indices, first), counts), num_dropped


def _shares_of(budget: float, lengths: Any) -> tuple[Any, Any]:
    """Columns and distances of sequences of these lengths."""
    tokens = (np.float32(budget) * lengths.astype(np.float32)).astype(np.int32)
    return tokens // 5, tokens * 4 // 5
