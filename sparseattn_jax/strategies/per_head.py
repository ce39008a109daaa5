"""Two strategies, each in its own heads."""

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


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, kw_only=True)
class PerHead:
    """Any two strategies in one call: each head sees what its own strategy selects for it.

    Both select for all heads, so that which heads are whose may be traced; one that has no heads
    costs nothing.

    Attributes:
        first: a strategy.
        second: another, in blocks of the same size.
        is_first: the heads of `first`, by kv head or by query head; the others are of `second`.
    """

    first: Strategy
    second: Strategy
    is_first: Bool[Array, " K"] | Bool[Array, " N"]

    @checked(check_qk, check_causal, check_kv_lengths, check_segment_ids)
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
        """Selects by both; see `Strategy.select`."""
        is_first = query_heads("is_first", self.is_first, q, k)
        options = {
            "is_causal": is_causal,
            "kv_lengths": kv_lengths,
            "segment_ids": segment_ids,
            "backend": backend,
        }
        first = functools.partial(self.first.select, q, k, **options)
        second = functools.partial(self.second.select, q, k, **options)
        return mix(select_if(is_first.any(), first), select_if((~is_first).any(), second), is_first)
