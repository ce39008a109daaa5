"""The offline search for the pattern of each head: MInference's, at equal cost (arXiv:2407.02490).

Runs on the host, once per model and layer, on the queries and keys of a long text. Every candidate
is scaled, head by head, until it costs as much as the others, in pairs of query and key that the
kernels compute; the one that keeps most of the softmax mass is the head's. Masses come from
log-sum-exps, so that no array of all pairs exists.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.attention import sparse_attention
from sparseattn_jax.checks import check_qk, checked
from sparseattn_jax.head_patterns import HeadKind, HeadPatterns
from sparseattn_jax.strategies.full import Full
from sparseattn_jax.strategies.minference import MInference

CANDIDATES: tuple[tuple[HeadKind, int, int], ...] = (
    ("stream_llm", 100, 800),
    ("vertical_and_slash", 30, 800),
    ("vertical_and_slash", 100, 750),
    ("vertical_and_slash", 500, 700),
    ("vertical_and_slash", 3500, 100),
    ("block_sparse", 100, 1),
)
"""The published ones. Each is scaled, so that only the ratio of its sizes matters."""

# Halvings of the range of factors, 2**-10 to 2**10, by which a candidate may be scaled.
_STEPS = 14


def _check_parameters(q: jax.Array, candidates: Sequence, density: float, first_query: int) -> None:
    if not 0 < density <= 1:
        raise ValueError(
            f"density={density} must lie in (0, 1]: it is the share of the pairs of causal "
            "attention that a head may compute"
        )
    if not 0 <= first_query < q.shape[1]:
        raise ValueError(
            f"first_query={first_query} must lie in [0, q_len={q.shape[1]}): recall is the mean "
            "from there on; pass a longer text or a lower first_query"
        )
    if not candidates:
        raise ValueError("candidates=() must hold at least one (kind, first size, second size)")


@checked(check_qk, _check_parameters)
def search_head_patterns(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    density: float,
    candidates: Sequence[tuple[HeadKind, int, int]] = CANDIDATES,
    strategy: MInference | None = None,
    first_query: int = 2500,
) -> tuple[HeadPatterns, Float32[np.ndarray, " N"]]:
    """The best candidate of each query head, scaled to the given cost.

    Other than the published search this one keeps what it finds: the kernels run every kind.

    Args:
        q: queries of one layer, after the rotation by position.
        k: keys.
        density: share of the pairs of causal attention that a head may compute: b * b for a listed
            block, T for a column. A candidate takes what it can get without exceeding it.
        candidates: kinds and sizes; see `head_patterns`.
        strategy: what else there is to say about the selection, by default `MInference()`.
        first_query: the first query whose recall counts; of earlier ones every pattern sees most.

    Returns:
        The patterns, and the recall of each head: the mean softmax mass of what it sees.

    Raises:
        ValueError: an argument is out of range, or no candidate is cheap enough for a head.
    """
    strategy = dataclasses.replace(strategy or MInference(), adaptive_budget=None)
    (batch, q_len, num_heads), kv_len = q.shape[:3], k.shape[1]
    allowed = density * batch * q_len * (kv_len - (q_len - 1) / 2)
    sizes = [_scale(strategy, q, k, candidate, allowed) for candidate in candidates]
    kinds: list[HeadKind] = [candidate[0] for candidate in candidates]
    is_affordable = np.stack([of_heads.any(axis=-1) for of_heads in sizes])
    if not is_affordable.any(axis=0).all():
        head = int(np.argmin(is_affordable.any(axis=0)))
        raise ValueError(
            f"density={density} is too low for head {head}: every candidate computes more pairs "
            "at its smallest; raise it, or lower the strategy's forced sizes"
        )
    recalls = np.stack(
        [
            _recall(_with_heads(strategy, kind, of_heads, kv_len), q, k, first_query)
            for kind, of_heads in zip(kinds, sizes, strict=True)
        ]
    )
    best = np.argmax(np.where(is_affordable, recalls, -1.0), axis=0)
    heads = [_head(kinds[i], sizes[i][head]) for head, i in enumerate(best)]
    return HeadPatterns.of(heads), recalls[best, np.arange(num_heads)].astype(np.float32)


def _scale(
    strategy: MInference,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    candidate: tuple[HeadKind, int, int],
    allowed: float,
) -> Int32[np.ndarray, "N 2"]:
    """The largest sizes of each head that compute no more pairs than allowed; 0 where none do."""
    kind, *ratio = candidate
    kv_len, num_heads = k.shape[1], q.shape[2]

    def sizes(exponents: np.ndarray) -> np.ndarray:
        scaled = np.rint(np.exp2(exponents)[:, None] * ratio).astype(np.int32)
        return np.clip(scaled, 1, kv_len)

    def is_allowed(exponents: np.ndarray) -> np.ndarray:
        scaled = _with_heads(strategy, kind, sizes(exponents), kv_len)
        return np.asarray(_computed_pairs(scaled, q, k)) <= allowed

    low, high = np.full(num_heads, -10.0), np.full(num_heads, 10.0)
    is_affordable = is_allowed(low)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        fits = is_allowed(middle)
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return np.where(is_affordable[:, None], sizes(low), 0)


def _with_heads(
    strategy: MInference, kind: HeadKind, sizes: Int32[np.ndarray, "N 2"], kv_len: int
) -> MInference:
    """The strategy with heads of one kind; all have one capacity, so that programs are reused."""
    heads = [_head(kind, pair) for pair in np.maximum(sizes, 1)]
    return dataclasses.replace(strategy, heads=HeadPatterns.of(heads, max_columns=kv_len))


def _head(kind: HeadKind, sizes: Int32[np.ndarray, " 2"]) -> tuple[HeadKind, int, int]:
    return kind, int(sizes[0]), int(sizes[1])


@jax.jit
def _computed_pairs(
    strategy: MInference, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]
) -> Float32[Array, " N"]:
    """Pairs of query and key per head, over the batch."""
    pattern = strategy.select(q, k)
    blocks, columns = pattern.blocks, pattern.columns
    block_pairs = float(blocks.block_q * blocks.block_kv)
    pairs = block_pairs * blocks.kv_num_blocks.sum(axis=(0, 2)).astype(jnp.float32)
    if columns is not None:
        pairs += float(blocks.q_len) * columns.counts.sum(axis=0).astype(jnp.float32)
    return pairs


@functools.partial(jax.jit, static_argnames="first_query")
def _recall(
    strategy: MInference,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    first_query: int,
) -> Float32[Array, " N"]:
    """The mean share of the softmax mass that each head keeps."""
    full = Full(block_size=strategy.block_size)
    kept, whole = (
        sparse_attention(q, k, k, any_strategy.select(q, k), return_lse=True)[1][:, first_query:]
        for any_strategy in (strategy, full)
    )
    return jnp.exp(kept - whole).mean(axis=(0, 1))
