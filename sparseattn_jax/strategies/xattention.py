"""XAttention: blocks by the softmax mass of their antidiagonals."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.checks import (
    check_causal,
    check_kv_lengths,
    check_positive,
    check_qk,
    check_segment_ids,
    check_threshold,
    checked,
)
from sparseattn_jax.kernels.antidiagonal_scores import antidiagonal_scores
from sparseattn_jax.kernels.backends import Backend, UnsupportedError
from sparseattn_jax.pattern import SparsePattern
from sparseattn_jax.selection import Operands, num_forced_blocks, select_cumulative


def _check_parameters(self: "XAttention", q: jax.Array, k: jax.Array, is_causal: bool) -> None:
    check_positive(stride=self.stride, block_size=self.block_size)
    if self.block_size % self.stride:
        raise ValueError(
            f"stride={self.stride} must divide block_size={self.block_size}; "
            "the paper's strides are 4, 8 and 16"
        )
    check_threshold(q, self.threshold)
    if self.max_blocks is None:
        return
    least = num_forced_blocks(
        q.shape[1],
        k.shape[1],
        self.block_size,
        is_causal=is_causal,
        keep_sink=self.keep_sink,
        keep_recent=self.keep_recent,
    )
    least = max(1, least)
    if self.max_blocks < least:
        raise ValueError(
            f"max_blocks={self.max_blocks} must be at least {least}, to hold the blocks that each "
            "row keeps in any case; raise it, or pass None for no limit"
        )


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, kw_only=True)
class XAttention:
    """Antidiagonal block scoring and cumulative selection, arXiv:2503.16428 section 2.

    Blocks are scored by `kernels/antidiagonal_scores` and listed per query head by
    `kernels/select_blocks`. Causal rows keep the first block and their diagonal in any case, with
    their mass counted towards the threshold. In packed rows both are of the queries' own segments,
    blocks that hold none of their keys are never listed, and segments are contiguous; calls that
    are not causal do not take them.

    Attributes:
        threshold: share of the estimated softmax mass to keep, in [0, 1]; one for all heads or
            one per query head. 1 keeps every visible block, 0 the forced ones.
        stride: tokens per antidiagonal; divides block_size. Scoring costs 1/stride of q k^T.
        block_size: queries and keys per block.
        max_blocks: capacity of a row's list, by default no limit. A row that selects more keeps
            its forced blocks and the highest-scored; `SparsePattern.num_dropped` counts the rest.
            Without a limit the lists of 32 heads and 1M tokens take 8.6 GB, with 1024 blocks 1.1.
        keep_sink: whether calls that are not causal keep the first block in any case too,
        keep_recent: and the blocks that hold the position of one of the row's queries.

    A threshold of [layers, N] is for a scan over layers: the strategy's slice is that of a layer.
    """

    threshold: float | Float32[Array, ""] | Float32[Array, " N"] = 0.95
    stride: int = dataclasses.field(default=16, metadata={"static": True})
    block_size: int = dataclasses.field(default=128, metadata={"static": True})
    max_blocks: int | None = dataclasses.field(default=None, metadata={"static": True})
    keep_sink: bool = dataclasses.field(default=False, metadata={"static": True})
    keep_recent: bool = dataclasses.field(default=False, metadata={"static": True})

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
        """Scores and selects; see `Strategy.select`."""
        if segment_ids is not None and not is_causal:
            raise UnsupportedError(
                "XAttention takes segment_ids only if is_causal: otherwise the last keys of a "
                "packed sequence may have no scores; pass one sequence per batch row, with "
                "kv_lengths"
            )
        threshold = jnp.asarray(jax.lax.stop_gradient(self.threshold), jnp.float32)

        def scores(operands: Operands, q_blocks: tuple[int, int]) -> Float32[Array, "B N rows Sb"]:
            return antidiagonal_scores(
                *operands,
                stride=self.stride,
                block_size=self.block_size,
                is_causal=is_causal,
                kv_lengths=kv_lengths,
                segment_ids=segment_ids,
                q_blocks=q_blocks,
                backend=backend,
            )

        return select_cumulative(
            scores,
            (jax.lax.stop_gradient(q), jax.lax.stop_gradient(k)),
            jnp.broadcast_to(threshold, (q.shape[2],)),
            block_size=self.block_size,
            is_causal=is_causal,
            kv_lengths=kv_lengths,
            max_blocks=self.max_blocks,
            backend=backend,
            segment_ids=segment_ids,
            keep_sink=self.keep_sink,
            keep_recent=self.keep_recent,
        )
