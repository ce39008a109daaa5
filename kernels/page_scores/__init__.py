"""Page scores: an upper bound of a query's logits with the keys of each page of a cache.

Page p of kv head h holds the tokens p * page_size to (p + 1) * page_size - 1 of a cache in order.
With its channel-wise bounds m[c] = min and M[c] = max of its keys,

    score = sum over the channels c of max(q[c] * m[c], q[c] * M[c])  >=  q . k for each key k,

the logit before it is scaled. A page without keys has m = inf, M = -inf and score -inf. Bounds are
2 / page_size of the cache's keys, and that much is what scoring reads.

Bounds are kept up as tokens are appended: `extend_bounds` costs what the new tokens do, and gives
exactly what `page_bounds` of the longer cache would. Where tokens were taken back and overwritten
the bounds are still bounds, but looser ones.

Source: Quest (arXiv:2406.10774) section 3.3. Its per-head rule is that of each query head here;
how the heads that share a kv head agree on pages is left to who selects.
"""

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.kernels.backends import (
    Backend,
    DeviceFacts,
    Implementation,
    choose,
    device_facts,
    never_refuses,
)
from sparseattn_jax.kernels.page_scores import xla
from sparseattn_jax.kernels.page_scores.xla import extend_bounds as extend_bounds

_BOUNDS: Mapping[Backend, Implementation[DeviceFacts]] = {
    "xla": Implementation(xla.run_bounds, never_refuses),
}
_SCORES: Mapping[Backend, Implementation[DeviceFacts]] = {
    "xla": Implementation(xla.run_scores, never_refuses),
}


def page_bounds(
    k: Float[Array, "B S K H"],
    *,
    page_size: int,
    kv_lengths: Int32[Array, " B"] | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Array, "B P K H"], Float[Array, "B P K H"]]:
    """The channel-wise least and greatest keys of each page, in the keys' dtype.

    Args:
        k: keys of the cache; slots past the lengths may hold anything.
        page_size: tokens per page; P = ceil(S / page_size).
        kv_lengths: tokens of each sequence so far, by default S.
        backend: which implementation runs, by default the best that can.

    Raises:
        UnsupportedError: the named backend cannot run this call.
    """
    run = choose(_BOUNDS, backend, device_facts(k)).run
    return run(jax.lax.stop_gradient(k), kv_lengths, page_size=page_size)


def page_scores(
    q: Float[Array, "B T N H"],
    key_min: Float[Array, "B P K H"],
    key_max: Float[Array, "B P K H"],
    *,
    backend: Backend | None = None,
) -> Float32[Array, "B T N P"]:
    """Upper bounds of the unscaled logits of every query with each page; has no gradient.

    Args:
        q: queries; head n reads kv head n // (N // K).
        key_min: least keys of each page.
        key_max: greatest keys.
        backend: which implementation runs, by default the best that can.

    Returns:
        The scores, which are bounds up to the rounding of float32 sums.

    Raises:
        UnsupportedError: the named backend cannot run this call.
    """
    run = choose(_SCORES, backend, device_facts(q, key_min, key_max)).run
    return run(*jax.lax.stop_gradient((q, key_min, key_max)))
