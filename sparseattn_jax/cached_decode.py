"""Decode over a cache: the newest token attends to what each head of a layer keeps."""

from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.checks import check_scale, checked
from sparseattn_jax.decode import QuestPages
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.kv_cache import KVCache, check_layer


def _check_query(
    q: jax.Array, cache: KVCache, layer: int | jax.Array, pages: QuestPages | None
) -> None:
    check_layer(cache, layer)
    batch, num_kv_heads, head_dim = len(cache.lengths), cache.rows.shape[1], cache.full_k.shape[2]
    if q.ndim != 4 or (q.shape[0], q.shape[3]) != (batch, head_dim) or q.shape[2] % num_kv_heads:
        raise ValueError(
            f"q.shape={q.shape} must be [{batch}, new tokens, a multiple of {num_kv_heads}, "
            f"{head_dim}], as the cache was created"
        )
    if q.dtype != cache.full_k.dtype:
        raise ValueError(f"q.dtype={q.dtype} must be that of the cache, {cache.full_k.dtype}; cast")
    if q.shape[1] != 1 and len(cache.ring_k):
        raise ValueError(
            f"q has {q.shape[1]} tokens, but a streaming head's ring holds the window of exactly 1;"
            " decode token by token, or attend to a chunk by KVCache.extend and prefill_attention"
        )
    if pages is not None and cache.bounds is None:
        raise ValueError(
            f"pages={pages} need bounds of the cache's pages; create it with a page_size, or pass "
            "pages=None"
        )


@overload
def decode_attention(
    q: Float[Array, "B T N H"],
    cache: KVCache,
    layer: int | Int32[Array, ""],
    *,
    pages: QuestPages | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: Backend | None = None,
) -> Float[Array, "B T N H"]: ...


@overload
def decode_attention(
    q: Float[Array, "B T N H"],
    cache: KVCache,
    layer: int | Int32[Array, ""],
    *,
    pages: QuestPages | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: Backend | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]: ...


@checked(_check_query, check_scale)
def decode_attention(
    q: Float[Array, "B T N H"],
    cache: KVCache,
    layer: int | Int32[Array, ""],
    *,
    pages: QuestPages | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Attention of the newest token to a layer of a cache; has no gradient.

    The token's key and value have been appended, and `advance` has not yet counted it: it stands at
    position lengths. Full heads see all tokens, streaming heads what their row holds. Each kind of
    head is one launch, in which heads of the other kind have no keys.

    Args:
        q: queries of the newest token; head n reads kv head n // (N // K). Of several tokens, the
            last ones appended, where no head of the cache streams.
        cache: after `append` to this layer.
        layer: index of the layer.
        pages: what full heads read of a cache with bounds, by default everything. Streaming heads
            read all that they keep.
        scale: positive factor of the logits, by default H ** -0.5.
        return_lse: whether to return the log-sum-exp too.
        backend: of the attention, by default the best that runs.

    Returns:
        The output in q's dtype, or (output, log-sum-exp).

    Raises:
        ValueError: an argument is out of range or does not fit the cache; or there are several
            tokens and streaming heads.
        UnsupportedError: the named backend cannot run this call.
    """
    full, ring = cache.pools(layer)
    lengths = cache.lengths + q.shape[1]
    of_full = full.attend(
        q, jnp.minimum(lengths, cache.capacity), pages=pages, scale=scale, backend=backend
    )
    # The newest token sees all that a ring holds, wherever in it a token lies.
    held = jnp.minimum(lengths, cache.sink_size + cache.recent_size)
    of_ring = ring.attend(q, held, pages=None, scale=scale, backend=backend)
    is_full = jnp.repeat(full.is_here, q.shape[2] // len(full.is_here))[None, None]
    out = jnp.where(is_full[..., None], of_full[0], of_ring[0])
    return (out, jnp.where(is_full, of_full[1], of_ring[1])) if return_lse else out
