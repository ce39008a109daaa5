"""FlexPrefill: per head either pooled block scores or vertical and slash blocks."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

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
from sparseattn_jax.kernels.backends import Backend, UnsupportedError
from sparseattn_jax.kernels.coverage_counts import coverage_counts
from sparseattn_jax.kernels.pooled_scores import block_sums, pooled_distance, pooled_scores
from sparseattn_jax.kernels.vertical_slash_scores import vertical_slash_scores
from sparseattn_jax.pattern import SparsePattern
from sparseattn_jax.selection import first_diagonal_blocks


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
    if not is_causal:
        raise ValueError(
            "is_causal=False: FlexPrefill judges by the last queries, which see all keys only "
            "if causal; pass is_causal=True, or select with XAttention"
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

    Attributes:
        gamma: share of the mass to hold, in [0, 1]; one for all heads or one per query head. 1
            keeps every visible block, unless max_budget says less.
        tau: distance below which a head is query-aware; 0 for none.
        min_budget: tokens of columns, and of slashes, at least; at or below this length, or two
            blocks, everything is listed.
        max_budget: tokens of columns, and of slashes, at most.
        block_size: queries and keys per block.
        per_row: whether pooled scores are to hold gamma of each row's, not of all rows' together.
    """

    gamma: float | Float32[Array, ""] | Float32[Array, " N"] = 0.9
    tau: float | Float32[Array, ""] = 0.1
    min_budget: int | None = dataclasses.field(default=None, metadata={"static": True})
    max_budget: int | None = dataclasses.field(default=None, metadata={"static": True})
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
        keep = jnp.broadcast_to(columns < ends[..., None], (batch, ends.shape[1], columns.size))
        keep = keep[:, None]
        if kv_len > max(2 * size, self.min_budget or 0):
            keep = keep & self._selected(q, k, kv_lengths, backend)
        blocks = BlockMask.from_dense(keep, q_len=q_len, kv_len=kv_len, block_q=size, block_kv=size)
        num_dropped = jnp.zeros(keep.shape[:2], jnp.int32)
        return SparsePattern(blocks=blocks, num_dropped=num_dropped)

    def _selected(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        kv_lengths: Int32[Array, " B"] | None,
        backend: Backend | None,
    ) -> Bool[Array, "B N Tb Sb"]:
        """The blocks that each head selects, visible or not."""
        q, k = lax.stop_gradient((q, k))
        gamma = lax.stop_gradient(jnp.asarray(self.gamma, jnp.float32))
        gamma = jnp.broadcast_to(gamma, (q.shape[2],))
        call = {"kv_lengths": kv_lengths, "backend": backend}
        vertical, slash = vertical_slash_scores(q, k, num_queries=self.block_size, **call)
        distance = pooled_distance(q, k, vertical, block_size=self.block_size, **call)
        is_query_aware = distance < lax.stop_gradient(self.tau)

        def with_pooled(keep: Bool[Array, "B N Tb Sb"]) -> Bool[Array, "B N Tb Sb"]:
            scores = pooled_scores(q, k, block_size=self.block_size, **call)
            return keep | (is_query_aware[:, :, None, None] & self._highest_pooled(scores, gamma))

        keep = self._vertical_slash(vertical, slash, gamma, is_query_aware, q.shape[1])
        return lax.cond(is_query_aware.any(), with_pooled, lambda keep: keep, keep)

    def _vertical_slash(
        self,
        vertical: Float32[Array, "B N S"],
        slash: Float32[Array, "B N S"],
        gamma: Float32[Array, " N"],
        is_query_aware: Bool[Array, "B N"],
        q_len: int,
    ) -> Bool[Array, "B N Tb Sb"]:
        """The columns and slashes of highest mass, the fewest of them in query-aware heads."""
        kv_len, size = vertical.shape[-1], self.block_size
        least = -(-(self.min_budget or 1) // size)
        most = -(-min(self.max_budget or kv_len, kv_len) // size)

        def highest_blocks(x: Float32[Array, "B N S"]) -> Bool[Array, "B N Sb"]:
            counts = jnp.clip(coverage_counts(x, gamma) // size + 1, least, max(least, most))
            counts = jnp.where(is_query_aware, least, counts)
            # The first column, and distance 0, are always among them.
            return _highest(block_sums(x, block_size=size).at[:, :, 0].set(jnp.inf), counts)

        columns, distances = highest_blocks(vertical), highest_blocks(slash)
        first = first_diagonal_blocks(q_len, kv_len, size)
        last_query = np.minimum((np.arange(first.size) + 1) * size, q_len) - 1
        keep = jnp.repeat(columns[:, :, None], first.size, axis=2)
        # Where the offset of the queries is no multiple of a block, a diagonal meets two blocks.
        for diagonal in (first, (last_query + kv_len - q_len) // size):
            away = diagonal[:, None] - np.arange(columns.shape[-1])[None, :]
            on_slash = jnp.take(distances, jnp.asarray(np.maximum(away, 0)), axis=2)
            keep = keep | (on_slash & (away >= 0)[None, None])
        return keep

    def _highest_pooled(
        self, scores: Float32[Array, "B N Tb Sb"], gamma: Float32[Array, " N"]
    ) -> Bool[Array, "B N Tb Sb"]:
        """The highest scores that hold gamma of each row's, or of a head's."""
        batch, num_heads, num_rows, num_columns = scores.shape
        if self.per_row:
            rows = scores.reshape(batch, num_heads * num_rows, num_columns)
            gamma = jnp.repeat(gamma, num_rows)
        else:
            rows = scores.reshape(batch, num_heads, num_rows * num_columns)
        return _highest(rows, coverage_counts(rows, gamma)).reshape(scores.shape)


def _highest(
    x: Float32[Array, "B rows L"], counts: Int32[Array, "B rows"]
) -> Bool[Array, "B rows L"]:
    """The `counts` highest entries of each row, none of them negative; of equals the first.

    Found bit by bit, as the bits of such floats order like their values; a sort takes longer.
    """

    def at_least(bits: Int32[Array, "B rows"]) -> Bool[Array, "B rows L"]:
        return x >= lax.bitcast_convert_type(bits, jnp.float32)[..., None]

    def set_bit(step: Int32[Array, ""] | int, bits: Int32[Array, "B rows"]) -> Array:
        raised = jnp.bitwise_or(bits, jnp.left_shift(1, 30 - step))
        return jnp.where(at_least(raised).sum(axis=-1) >= counts, raised, bits)

    bits = lax.fori_loop(0, 31, set_bit, jnp.zeros_like(counts))
    above = x > lax.bitcast_convert_type(bits, jnp.float32)[..., None]
    tied = at_least(bits) & ~above
    left = counts - above.sum(axis=-1, dtype=jnp.int32)
    return above | (tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= left[..., None]))
