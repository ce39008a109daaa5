"""Streaming attention: sinks and a window of recent tokens, in whole blocks."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from sparseattn_jax.block_mask import BlockMask, num_visible_blocks
from sparseattn_jax.checks import (
    check_causal,
    check_kv_lengths,
    check_positive,
    check_qk,
    check_segment_ids,
    checked,
)
from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.pattern import SparsePattern
from sparseattn_jax.selection import first_diagonal_blocks


def _check_parameters(self: "Streaming", is_causal: bool) -> None:
    check_positive(block_size=self.block_size, recent_size=self.recent_size)
    if self.sink_size < 0:
        raise ValueError(f"sink_size={self.sink_size} must not be negative; 0 lists no sinks")
    if not is_causal:
        raise ValueError(
            "is_causal=False: a streaming window looks back from each query; "
            "pass is_causal=True, or select with Full"
        )


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, kw_only=True)
class Streaming:
    """The first and the most recent keys (StreamingLLM, arXiv:2309.17453), in whole blocks.

    A query block lists the ceil(sink_size / block_size) first blocks, and of the blocks up to its
    diagonal the ceil(recent_size / block_size) last ones, counted from the block that holds its
    first query. Windows are whole blocks: a query sees at least recent_size - block_size + 1
    recent keys, and up to a block more than recent_size. Heads share the lists.

    With segment ids the sinks are the first sink_size keys of each query's own segment; segments
    are contiguous.

    Attributes:
        sink_size: first keys that every query sees; 0 for none.
        recent_size: keys before and at each query's position.
        block_size: queries and keys per block.
    """

    sink_size: int = dataclasses.field(default=128, metadata={"static": True})
    recent_size: int = dataclasses.field(default=1024, metadata={"static": True})
    block_size: int = dataclasses.field(default=128, metadata={"static": True})

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
        """Lists sinks and windows; see `Strategy.select`. Reads no values, so needs no backend."""
        batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
        ends = num_visible_blocks(
            q_len=q_len,
            kv_len=kv_len,
            block_q=self.block_size,
            block_kv=self.block_size,
            is_causal=True,
            kv_lengths=kv_lengths,
        )
        ends = jnp.broadcast_to(ends, (batch, ends.shape[1]))
        num_recent = -(-self.recent_size // self.block_size)
        starts = first_diagonal_blocks(q_len, kv_len, self.block_size) - (num_recent - 1)
        starts = jnp.minimum(jnp.maximum(starts, 0)[None, :], ends)
        if segment_ids is None:
            indices, counts = self._lists(starts, ends, kv_len)
        else:
            columns = jnp.arange(-(-kv_len // self.block_size))[None, None, :]
            recent = (columns >= starts[..., None]) & (columns < ends[..., None])
            sinks = self._segment_sinks(segment_ids, q_len) & (columns < ends[..., None])
            indices, counts = block_lists.from_dense(recent | sinks)
        blocks = BlockMask(
            kv_indices=indices[:, None],
            kv_num_blocks=counts[:, None],
            q_len=q_len,
            kv_len=kv_len,
            block_q=self.block_size,
            block_kv=self.block_size,
            is_causal=True,
        )
        return SparsePattern(blocks=blocks, num_dropped=jnp.zeros((batch, 1), jnp.int32))

    def _lists(
        self, starts: Int32[Array, "B Tb"], ends: Int32[Array, "B Tb"], kv_len: int
    ) -> tuple[Int32[Array, "B Tb M"], Int32[Array, "B Tb"]]:
        """Lists of the sink blocks, then of starts..ends, with room for two diagonals."""
        num_recent = -(-self.recent_size // self.block_size)
        num_sinks = -(-self.sink_size // self.block_size)
        width = min(num_sinks + num_recent + 1, -(-kv_len // self.block_size))
        sinks = jnp.minimum(num_sinks, starts)
        counts = sinks + ends - starts
        slots = jnp.arange(width, dtype=jnp.int32)[None, None, :]
        indices = slots + jnp.where(slots < sinks[..., None], 0, (starts - sinks)[..., None])
        return jnp.where(slots < counts[..., None], indices, indices[..., :1]), counts

    def _segment_sinks(
        self, segment_ids: Int32[Array, "B S"], q_len: int
    ) -> Bool[Array, "B Tb Sb"]:
        """The blocks that hold one of the first sink_size keys of a query's segment."""
        batch, kv_len = segment_ids.shape
        positions = jnp.arange(kv_len, dtype=jnp.int32)[None, :]
        is_first = segment_ids != jnp.roll(segment_ids, 1, axis=1)
        starts = jax.lax.cummax(jnp.where(is_first, positions, 0), axis=1)[:, kv_len - q_len :]
        starts = jnp.pad(starts, ((0, 0), (0, -q_len % self.block_size)), mode="edge")
        starts = starts.reshape(batch, -1, self.block_size, 1)
        first_keys = positions[:, :: self.block_size][:, None, None, :]
        is_sink = (first_keys < starts + self.sink_size) & (first_keys + self.block_size > starts)
        return is_sink.any(axis=2)
