"""FlexPrefill: per head either pooled block scores or vertical and slash blocks."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Int64, Shaped

from sparseattn_jax.block_mask import BlockMask, num_visible_blocks
from sparseattn_jax.checks import (
    check_causal,
    check_kv_lengths,
    check_positive,
    check_qk,
    check_segment_ids,
    check_share,
    checked,
    concrete,
)
from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.backends import Backend, UnsupportedError
from sparseattn_jax.kernels.coverage_counts import coverage_counts
from sparseattn_jax.kernels.pooled_scores import block_sums, pooled_distance, pooled_scores
from sparseattn_jax.kernels.vertical_slash_scores import vertical_slash_scores
from sparseattn_jax.pattern import SparsePattern
from sparseattn_jax.selection import diagonal_blocks


def _check_parameters(self: "FlexPrefill", q: jax.Array, is_causal: bool) -> None:
    check_positive(block_size=self.block_size)
    check_share(q, gamma=self.gamma)
    tau = concrete(self.tau)
    if tau is not None and not tau >= 0:
        raise ValueError(f"tau={tau} must not be negative; 0 makes every head vertical-slash")
    for name in ("min_budget", "max_budget"):
        if (budget := getattr(self, name)) is not None and budget < 1:
            raise ValueError(f"{name}={budget} must be at least 1 token; pass None for no limit")
    if self.max_budget is not None and (self.min_budget or 1) > self.max_budget:
        raise ValueError(
            f"min_budget={self.min_budget} must not exceed max_budget={self.max_budget}"
        )
    if self.sparsity_ratio is not None:
        _check_ratio(self.sparsity_ratio)
    if not is_causal:
        raise ValueError(
            "is_causal=False: FlexPrefill judges by the last queries, which see all keys only "
            "if causal; pass is_causal=True, or select with XAttention"
        )


def _check_ratio(ratio: float | jax.Array) -> None:
    if np.shape(ratio) != ():
        raise ValueError(f"sparsity_ratio has shape {np.shape(ratio)}; pass one for all heads")
    value = concrete(ratio)
    if value is not None and not 0 <= value <= 1:
        raise ValueError(
            f"sparsity_ratio={value} must lie in [0, 1]: it is the share of the visible blocks "
            "that a head may list; pass None for no limit"
        )


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexPrefill:
    """Pooled or vertical-slash selection, as the last queries decide (arXiv:2502.20766).

    The softmax of the last block_size queries gives the mass of each key and of each distance.
    Where the block means of keys and queries predict the mass of the key blocks, up to a
    Jensen-Shannon distance (its square root) below tau, a head lists the blocks with the highest
    pooled scores, so many that they hold gamma of all rows' scores together. Any other head lists
    the key blocks (columns) and the block distances (slashes) of highest mass: of each as many as
    keys, or distances, are needed to hold gamma of the mass, in blocks. All list the first block
    and the diagonal.

    Differences to the published code: counts use the real block size; distances are pooled from
    the diagonal on, also where the length is no multiple of a block; a distance of s blocks lists
    every block that the diagonal, moved by s blocks, meets; the crossing entry of pooled scores is
    kept, so that they hold at least gamma; query-aware heads are found for blocks without mass.
    Its README names a `sparsity_ratio`, "ratio of blocks to select", that nothing reads: here it
    caps the density.

    Attributes:
        gamma: share of the mass to hold, in [0, 1]; one for all heads or one per query head. 1
            keeps every visible block, unless max_budget or sparsity_ratio says less.
        tau: distance below which a head is query-aware; 0 for none.
        min_budget: tokens of columns, and of slashes, at least; at or below this length, or two
            blocks, everything is listed.
        max_budget: tokens of columns, and of slashes, at most.
        sparsity_ratio: share of its sequence's visible blocks that a head lists at most, in [0, 1],
            or None for no limit. A head that selects more leaves out those of lowest score: the
            pooled score, or the mass of the block's column and slash together. The first block and
            the diagonal stay in any case. This goes before min_budget, but for sequences no longer
            than that.
        block_size: queries and keys per block.
        per_row: whether pooled scores are to hold gamma of each row's, not of all rows' together.
    """

    gamma: float | Float32[Array, ""] | Float32[Array, " N"] = 0.9
    tau: float | Float32[Array, ""] = 0.1
    min_budget: int | None = dataclasses.field(default=None, metadata={"static": True})
    max_budget: int | None = dataclasses.field(default=None, metadata={"static": True})
    sparsity_ratio: float | Float32[Array, ""] | None = None
    block_size: int = dataclasses.field(default=128, metadata={"static": True})
    per_row: bool = dataclasses.field(default=False, metadata={"static": True})

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
        """Decides per head and lists; see `Strategy.select`."""
        if segment_ids is not None:
            raise UnsupportedError(
                "FlexPrefill does not take segment_ids: its last queries are one sequence's; "
                "pass one sequence per batch row, with kv_lengths"
            )
        (batch, q_len), kv_len, size = q.shape[:2], k.shape[1], self.block_size
        ends = num_visible_blocks(
            q_len=q_len,
            kv_len=kv_len,
            block_q=size,
            block_kv=size,
            is_causal=True,
            kv_lengths=kv_lengths,
        )
        columns = jnp.arange(-(-kv_len // size), dtype=jnp.int32)[None, None, :]
        visible = jnp.broadcast_to(columns < ends[..., None], (batch, ends.shape[1], columns.size))
        keep = visible = visible[:, None]
        if kv_len > max(2 * size, self.min_budget or 0):
            keep = self._selected(q, k, visible, kv_lengths, backend)
        blocks = BlockMask.from_dense(keep, q_len=q_len, kv_len=kv_len, block_q=size, block_kv=size)
        num_dropped = jnp.zeros(keep.shape[:2], jnp.int32)
        return SparsePattern(blocks=blocks, num_dropped=num_dropped)

    def _selected(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        visible: Bool[Array, "B 1 Tb Sb"],
        kv_lengths: Int32[Array, " B"] | None,
        backend: Backend | None,
    ) -> Bool[Array, "B N Tb Sb"]:
        """The visible blocks that each head selects."""
        q, k = lax.stop_gradient((q, k))
        gamma = lax.stop_gradient(jnp.asarray(self.gamma, jnp.float32))
        gamma = jnp.broadcast_to(gamma, (q.shape[2],))
        call = {"kv_lengths": kv_lengths, "backend": backend}
        vertical, slash = vertical_slash_scores(q, k, num_queries=self.block_size, **call)
        distance = pooled_distance(q, k, vertical, block_size=self.block_size, **call)
        is_query_aware = distance < lax.stop_gradient(self.tau)

        def with_pooled(keep: Array, rank: Array | None) -> tuple[Array, Array | None]:
            is_pooled = is_query_aware[:, :, None, None]
            scores = pooled_scores(q, k, block_size=self.block_size, **call)
            if rank is not None:
                rank = jnp.where(is_pooled & ~jnp.isinf(rank), scores, rank)
            return keep | (is_pooled & self._highest_pooled(scores, gamma)), rank

        keep, rank = self._vertical_slash(vertical, slash, gamma, is_query_aware, q.shape[1])
        keep, rank = lax.cond(
            is_query_aware.any(), with_pooled, lambda *unchanged: unchanged, keep, rank
        )
        keep = keep & visible
        return keep if rank is None else self._capped(keep, rank, visible)

    def _vertical_slash(
        self,
        vertical: Float32[Array, "B N S"],
        slash: Float32[Array, "B N S"],
        gamma: Float32[Array, " N"],
        is_query_aware: Bool[Array, "B N"],
        q_len: int,
    ) -> tuple[Bool[Array, "B N Tb Sb"], Float32[Array, "B N Tb Sb"] | None]:
        """The columns and slashes of highest mass, the fewest of them in query-aware heads.

        With them, where `sparsity_ratio` wants it, the rank of each block: the mass of its column
        and slash, infinite in the first column and on the diagonal.
        """
        kv_len, size = vertical.shape[-1], self.block_size
        least = -(-(self.min_budget or 1) // size)
        most = -(-min(self.max_budget or kv_len, kv_len) // size)
        # Where the offset of the queries is no multiple of a block, a diagonal meets two blocks.
        diagonals = diagonal_blocks(q_len, kv_len, size)
        away = diagonals[:, :, None] - np.arange(-(-kv_len // size))

        def highest(
            x: Float32[Array, "B N S"], mass: Float32[Array, "B N Sb"]
        ) -> Bool[Array, "B N Sb"]:
            counts = jnp.clip(coverage_counts(x, gamma) // size + 1, least, max(least, most))
            counts = jnp.where(is_query_aware, least, counts)
            return block_lists.keep_highest(mass, jnp.ones(mass.shape, bool), counts)

        def on_slashes(x: Shaped[Array, "B N Sb"]) -> Shaped[Array, "B N Tb Sb"]:
            """The value of each block's distance, of two distances the larger one."""

            def values(blocks: Int64[np.ndarray, "Tb Sb"]) -> Shaped[Array, "B N Tb Sb"]:
                taken = jnp.take(x, jnp.asarray(np.maximum(blocks, 0)), axis=2)
                return jnp.where((blocks >= 0)[None, None], taken, jnp.zeros((), x.dtype))

            return jnp.maximum(values(away[0]), values(away[1]))

        # The first column, and distance 0, are always among the highest.
        columns, distances = (
            block_sums(x, block_size=size).at[:, :, 0].set(jnp.inf) for x in (vertical, slash)
        )
        keep = highest(vertical, columns)[:, :, None] | on_slashes(highest(slash, distances))
        if self.sparsity_ratio is None:
            return keep, None
        return keep, columns[:, :, None] + on_slashes(distances)

    def _highest_pooled(
        self, scores: Float32[Array, "B N Tb Sb"], gamma: Float32[Array, " N"]
    ) -> Bool[Array, "B N Tb Sb"]:
        """The highest scores that hold gamma of each row's, or of a head's."""
        rows = scores if self.per_row else scores.reshape(*scores.shape[:2], 1, -1)
        kept = block_lists.shortest_prefix(
            lax.bitcast_convert_type(rows, jnp.uint32),
            jnp.ones(rows.shape, bool),
            rows,
            gamma[None, :, None] * rows.sum(axis=-1),
        )
        return (kept | (gamma >= 1.0)[None, :, None, None]).reshape(scores.shape)

    def _capped(
        self,
        keep: Bool[Array, "B N Tb Sb"],
        rank: Float32[Array, "B N Tb Sb"],
        visible: Bool[Array, "B 1 Tb Sb"],
    ) -> Bool[Array, "B N Tb Sb"]:
        """Of the kept blocks of each head as many of highest rank as `sparsity_ratio` allows."""
        ratio = lax.stop_gradient(jnp.asarray(self.sparsity_ratio, jnp.float32))
        allowed = jnp.floor(ratio * visible.sum(axis=(-2, -1)).astype(jnp.float32))
        forced = jnp.sum(keep & jnp.isinf(rank), axis=(-2, -1), dtype=jnp.int32)
        flat = (*keep.shape[:2], -1)
        width = jnp.maximum(allowed.astype(jnp.int32), forced)
        kept = block_lists.keep_highest(rank.reshape(flat), keep.reshape(flat), width)
        return kept.reshape(keep.shape)
