"""DuoAttention: retrieval heads, which see what a strategy selects, and streaming heads."""

import dataclasses
import functools
import typing

import jax
from jaxtyping import Array, Bool, Float, Int32

from sparseattn_jax.checks import (
    check_causal,
    check_kv_lengths,
    check_qk,
    check_segment_ids,
    checked,
)
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.mixing import mix, query_heads, select_if
from sparseattn_jax.pattern import SparsePattern
from sparseattn_jax.strategies.protocol import Strategy
from sparseattn_jax.windows import check_window, token_windows


def _check_parameters(self: "DuoAttention", is_causal: bool) -> None:
    check_window(self.sink_size, self.recent_size, is_causal)


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, kw_only=True)
class DuoAttention:
    """Streaming heads beside retrieval heads (arXiv:2410.10819; the masks of arXiv:2506.17121).

    Streaming heads see the first sink_size keys and the recent_size last ones up to each query's
    own, exact to the token. Retrieval heads see what `retrieval` selects: by Full it is the
    published DuoAttention, by XAttention no head is dense. `sparseattn_jax/head_gates.py` reads
    published gates and masks, and makes retrieval heads of them.

    Differences to the published inference: streaming heads stream in the first chunk of a prefill
    too, where that is dense; every query has the window of the training, which counts its own key,
    where that grows with the chunk. `PerHead` with Streaming has windows of whole blocks instead,
    and takes segment ids.

    Attributes:
        retrieval: strategy of the retrieval heads, whose square blocks all heads use.
        retrieval_heads: by kv head of this layer, or by query head; the others stream.
        sink_size: first keys that every query of a streaming head sees; 0 for none. The published
            evaluations have 64, PruLong's 128.
        recent_size: keys before and at each query's position; 256 there, PruLong's 1024.
    """

    retrieval: Strategy
    retrieval_heads: Bool[Array, " K"] | Bool[Array, " N"]
    sink_size: int = dataclasses.field(default=64, metadata={"static": True})
    recent_size: int = dataclasses.field(default=256, metadata={"static": True})

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
        """Selects for the retrieval heads, if there are any; see `Strategy.select`."""
        is_retrieval = query_heads("retrieval_heads", self.retrieval_heads, q, k)
        select = functools.partial(
            self.retrieval.select,
            *(q, k),
            is_causal=is_causal,
            kv_lengths=kv_lengths,
            segment_ids=segment_ids,
            backend=backend,
        )
        retrieval = select_if(is_retrieval.any(), select)
        streaming = token_windows(
            *(q, k),
            sink_size=self.sink_size,
            recent_size=self.recent_size,
            block_size=retrieval.blocks.block_kv,
            kv_lengths=kv_lengths,
            segment_ids=segment_ids,
        )
        return mix(retrieval, streaming, is_retrieval)
