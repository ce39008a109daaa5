"""Full attention as a strategy: every visible block."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from sparseattn_jax.block_mask import BlockMask, num_visible_blocks
from sparseattn_jax.checks import (
    check_causal,
    check_kv_lengths,
    check_positive,
    check_qk,
    check_segment_ids,
    checked,
)
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.pattern import SparsePattern


def _check_parameters(self: "Full") -> None:
    check_positive(block_size=self.block_size)


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, kw_only=True)
class Full:
    """Every block that causality and the lengths leave visible, in lists that heads share.

    Attributes:
        block_size: queries and keys per block.
    """

    block_size: int = dataclasses.field(default=128, metadata={"static": True})

    @checked(_check_parameters, check_qk, check_causal, check_kv_lengths, check_segment_ids)
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
        """Lists all visible blocks; see `Strategy.select`. Reads no values, so needs no backend."""
        batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
        counts = num_visible_blocks(
            q_len=q_len,
            kv_len=kv_len,
            block_q=self.block_size,
            block_kv=self.block_size,
            is_causal=is_causal,
            kv_lengths=kv_lengths,
        )
        counts = jnp.broadcast_to(counts, (batch, counts.shape[1]))[:, None]
        columns = jnp.arange(-(-kv_len // self.block_size), dtype=jnp.int32)[None, None, None, :]
        blocks = BlockMask(
            kv_indices=jnp.where(columns < counts[..., None], columns, 0),
            kv_num_blocks=counts,
            q_len=q_len,
            kv_len=kv_len,
            block_q=self.block_size,
            block_kv=self.block_size,
            is_causal=is_causal,
        )
        return SparsePattern(blocks=blocks, num_dropped=jnp.zeros((batch, 1), jnp.int32))
