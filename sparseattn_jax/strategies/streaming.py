"""Streaming attention: sinks and a window of recent tokens, in whole blocks or exact."""

import dataclasses
import typing

import jax
from jaxtyping import Array, Float, Int32

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
from sparseattn_jax.windows import block_windows, check_window, token_windows


def _check_parameters(self: "Streaming", is_causal: bool) -> None:
    check_positive(block_size=self.block_size)
    check_window(self.sink_size, self.recent_size, is_causal)


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, kw_only=True)
class Streaming:
    """The first and the most recent keys (StreamingLLM, arXiv:2309.17453), for all heads alike.

    Query i at position p = i + S - T sees, if exact, the keys j <= p with j < sink_size or
    j > p - recent_size.

    Otherwise, by default, the rule of Block-Sparse-Attention holds (Guo et al., 2024): a query
    block sees the ceil(sink_size / block_size) first blocks, and of the blocks up to its diagonal
    the ceil(recent_size / block_size) last ones, counted from the block that holds its first
    query. A query sees at least recent_size - block_size + 1 recent keys, and up to a block more
    than recent_size. With segment ids the sinks are the first sink_size keys of each query's own
    segment; segments are contiguous. Exact windows with sinks do not take segment ids.

    Attributes:
        sink_size: first keys that every query sees; 0 for none.
        recent_size: keys before and at each query's position.
        block_size: queries and keys per block.
        exact: whether the sizes hold to the token.
    """

    sink_size: int = dataclasses.field(default=128, metadata={"static": True})
    recent_size: int = dataclasses.field(default=1024, metadata={"static": True})
    block_size: int = dataclasses.field(default=128, metadata={"static": True})
    exact: bool = dataclasses.field(default=False, metadata={"static": True})

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
        windows = token_windows if self.exact else block_windows
        return windows(
            *(q, k),
            sink_size=self.sink_size,
            recent_size=self.recent_size,
            block_size=self.block_size,
            kv_lengths=kv_lengths,
            segment_ids=segment_ids,
        )
