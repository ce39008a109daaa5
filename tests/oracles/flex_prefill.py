"""FlexPrefill's block sets by the paper's rules: float64 NumPy, one head at a time."""

import numpy as np

from tests.oracles import pooled, selection
from tests.oracles.coverage import coverage_counts
from tests.oracles.vertical_slash import vertical_slash_scores


def _blocks(x: np.ndarray, size: int) -> np.ndarray:
    return np.add.reduceat(x, np.arange(0, len(x), size))


def _highest(x: np.ndarray, count: int) -> list[int]:
    """Indices of the highest entries; of equals the lower."""
    return list(np.lexsort((np.arange(len(x)), -x))[:count])


def _count(x: np.ndarray, share: float) -> int:
    return int(coverage_counts(x[None, None], np.array([share]))[0, 0])


def selected_blocks(
    q: np.ndarray,
    k: np.ndarray,
    *,
    gamma: np.ndarray,
    tau: float,
    block_size: int,
    min_budget: int | None = None,
    max_budget: int | None = None,
    per_row: bool = False,
    sparsity_ratio: float | None = None,
    kv_lengths: np.ndarray | None = None,
) -> np.ndarray:
    """[B, N, Tb, Sb] bool."""
    (batch, q_len, num_heads, _), kv_len, size = np.shape(q), np.shape(k)[1], block_size
    visible, forced = selection.visible_and_forced(
        batch, q_len, kv_len, size, is_causal=True, kv_lengths=kv_lengths
    )
    keep = np.zeros((batch, num_heads, *visible.shape[2:]), bool)
    vertical, slash = vertical_slash_scores(q, k, num_queries=size, kv_lengths=kv_lengths)
    distances = pooled.pooled_distance(q, k, block_size=size, kv_lengths=kv_lengths)
    scores = pooled.pooled_scores(q, k, block_size=size, kv_lengths=kv_lengths)
    least = -(-(min_budget or 1) // size)
    most = max(least, -(-min(max_budget or kv_len, kv_len) // size))
    for b, n in np.ndindex(batch, num_heads):
        is_query_aware = distances[b, n] < tau
        counts = [
            least if is_query_aware else int(np.clip(_count(x, gamma[n]) // size + 1, least, most))
            for x in (vertical[b, n], slash[b, n])
        ]
        columns = _blocks(vertical[b, n], size)
        away = _blocks(slash[b, n], size)
        columns[0] = away[0] = np.inf
        keep[b, n][:, _highest(columns, counts[0])] = True
        slashes = _highest(away, counts[1])
        rank = np.zeros(keep.shape[2:])
        for i, j in np.ndindex(q_len, len(columns)):
            distance = (i + kv_len - q_len) // size - j
            if distance >= 0:
                keep[b, n, i // size, j] |= distance in slashes
                rank[i // size, j] = max(rank[i // size, j], away[distance])
        rank += columns
        if is_query_aware:
            rank = np.where(np.isinf(rank), rank, scores[b, n])
            for rows in range(len(scores[b, n])) if per_row else [slice(None)]:
                flat = scores[b, n, rows].ravel()
                nothing = np.zeros(flat.shape, bool)
                kept = selection.select_row(flat, gamma[n], nothing, ~nothing)
                keep[b, n, rows] |= kept.reshape(scores[b, n, rows].shape)
        keep[b, n] = (keep[b, n] & visible[b, 0]) | forced[b, 0]
        if sparsity_ratio is not None:
            allowed = int(np.float32(sparsity_ratio) * np.float32(visible[b, 0].sum()))
            rank = np.where(keep[b, n], rank, -1.0).ravel()
            kept = np.zeros(rank.shape, bool)
            kept[_highest(rank, max(allowed, forced[b, 0].sum()))] = True
            keep[b, n] &= kept.reshape(keep.shape[2:])
    return keep
