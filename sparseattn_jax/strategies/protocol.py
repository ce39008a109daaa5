"""What a strategy is: parameters, and one pure function from queries and keys to a pattern."""

import typing

from jaxtyping import Array, Float, Int32

from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.pattern import SparsePattern


@typing.runtime_checkable
class Strategy(typing.Protocol):
    """A way to choose the keys that each query attends to.

    Implementations are frozen dataclasses registered as pytrees; fields that shape the result are
    static, the others may be traced.
    """

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
        """Selects key blocks; has no gradient.

        Args:
            q: queries, at the end of the keys if causal. Head n reads kv head n // (N // K).
            k: keys.
            is_causal: whether a query sees keys up to its own position only.
            kv_lengths: valid keys of each sequence; the rest is padding.
            segment_ids: sequences packed in one row. The attention hides other segments' keys;
                a pattern may list their blocks.
            backend: of the ops that score and select, where the strategy has such.

        Returns:
            The pattern; the attention applies causality, lengths and segments per token in it.

        Raises:
            ValueError: an argument or a field is out of range.
            UnsupportedError: the strategy or the named backend cannot take this call.
        """
        ...
