"""Vertical and slash scores by their formula: float64 NumPy, one query at a time."""

import numpy as np


def last_positions(q_len: int, kv_len: int, length: int, num_queries: int) -> list[int]:
    """Positions of the last `num_queries` queries that stand before `length`."""
    positions = [i + kv_len - q_len for i in range(q_len) if i + kv_len - q_len < length]
    return positions[-num_queries:]


def vertical_slash_scores(
    q: np.ndarray,
    k: np.ndarray,
    *,
    num_queries: int,
    kv_lengths: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums [B, N, S] of the last queries' causal softmax rows, per key and per distance."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, q_len, num_heads, head_dim = q.shape
    kv_len = k.shape[1]
    group = num_heads // k.shape[2]
    vertical = np.zeros((batch, num_heads, kv_len))
    slash = np.zeros((batch, num_heads, kv_len))
    for b, n in np.ndindex(batch, num_heads):
        length = kv_len if kv_lengths is None else int(kv_lengths[b])
        for position in last_positions(q_len, kv_len, length, num_queries):
            query = q[b, position - (kv_len - q_len), n]
            logits = k[b, : position + 1, n // group] @ query / head_dim**0.5
            weights = np.exp(logits - logits.max(initial=-np.inf))
            for key, weight in enumerate(weights / weights.sum()):
                vertical[b, n, key] += weight
                slash[b, n, position - key] += weight
    return vertical, slash
