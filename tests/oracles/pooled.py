"""FlexPrefill's pooled scores and distance by their formulas: float64 NumPy, a block at a time."""

import numpy as np

from tests.oracles.vertical_slash import last_positions, vertical_slash_scores


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _key_means(keys: np.ndarray, block_size: int) -> np.ndarray:
    """Means [blocks, H] of one head's valid keys."""
    starts = range(0, len(keys), block_size)
    return np.stack([keys[start : start + block_size].mean(axis=0) for start in starts])


def pooled_scores(
    q: np.ndarray, k: np.ndarray, *, block_size: int, kv_lengths: np.ndarray | None = None
) -> np.ndarray:
    """Softmax [B, N, Tb, Sb] of the scaled products of block means, over the visible key blocks."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, q_len, num_heads, head_dim = q.shape
    kv_len = k.shape[1]
    group = num_heads // k.shape[2]
    scores = np.zeros((batch, num_heads, -(-q_len // block_size), -(-kv_len // block_size)))
    for b, n, i in np.ndindex(scores.shape[:3]):
        length = kv_len if kv_lengths is None else int(kv_lengths[b])
        tokens = [
            t
            for t in range(i * block_size, min((i + 1) * block_size, q_len))
            if t + kv_len - q_len < length
        ]
        if tokens:
            position = tokens[-1] + kv_len - q_len
            means = _key_means(k[b, :length, n // group], block_size)[: position // block_size + 1]
            query = q[b, tokens, n].mean(axis=0)
            scores[b, n, i, : len(means)] = _softmax(means @ query / head_dim**0.5)
    return scores


def jensen_shannon_distance(p: np.ndarray, q: np.ndarray) -> float:
    """sqrt((KL(p || m) + KL(q || m)) / 2) with m the mean of both."""
    m = (p + q) / 2
    divergences = [float(np.sum(x[x > 0] * np.log(x[x > 0] / m[x > 0]))) for x in (p, q)]
    return max(sum(divergences) / 2, 0.0) ** 0.5


def pooled_distance(
    q: np.ndarray, k: np.ndarray, *, block_size: int, kv_lengths: np.ndarray | None = None
) -> np.ndarray:
    """Distances [B, N] between the last queries' pooled and true distribution over key blocks."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, q_len, num_heads, head_dim = q.shape
    kv_len = k.shape[1]
    group = num_heads // k.shape[2]
    vertical, _ = vertical_slash_scores(q, k, num_queries=block_size, kv_lengths=kv_lengths)
    distances = np.zeros((batch, num_heads))
    for b, n in np.ndindex(batch, num_heads):
        length = kv_len if kv_lengths is None else int(kv_lengths[b])
        positions = last_positions(q_len, kv_len, length, block_size)
        if positions:
            query = q[b, np.array(positions) - (kv_len - q_len), n].mean(axis=0)
            means = _key_means(k[b, :length, n // group], block_size)
            starts = np.arange(0, length, block_size)
            true = np.add.reduceat(vertical[b, n, :length], starts)
            estimate = _softmax(means @ query / head_dim**0.5)
            distances[b, n] = jensen_shannon_distance(estimate, true / true.sum())
    return distances
