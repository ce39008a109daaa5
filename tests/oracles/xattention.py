"""XAttention's block scores by their formula: float64 NumPy, one pair of token groups at a time."""

import numpy as np


def antidiagonal_scores(
    q: np.ndarray,
    k: np.ndarray,
    *,
    stride: int,
    block_size: int,
    is_causal: bool,
    kv_lengths: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
) -> np.ndarray:
    """Block sums [B, N, Tb, Sb] of the strided softmax.

    The mean logit of query group i and key group j runs over the antidiagonal of their tile.
    Tokens that do not exist or are padding count as zeros. Key group j is visible to query group i
    iff it holds a valid key and, if causal, its first key is at or before the position of the
    group's last valid query. With segments the key group is of its last valid key's, the other
    keys of it count as zeros, and it is visible iff a valid query of the group has that segment.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, q_len, num_heads, head_dim = q.shape
    kv_len = k.shape[1]
    group = num_heads // k.shape[2]
    segments = np.zeros((batch, kv_len)) if segment_ids is None else np.asarray(segment_ids)
    sums = np.zeros((batch, num_heads, -(-q_len // block_size), -(-kv_len // block_size)))
    for b, n in np.ndindex(batch, num_heads):
        length = kv_len if kv_lengths is None else int(kv_lengths[b])
        for i in range(-(-q_len // stride)):
            position = {
                t: t + kv_len - q_len
                for t in range(i * stride, min((i + 1) * stride, q_len))
                if not is_causal or t + kv_len - q_len < length
            }
            of_queries = {int(segments[b, p]) for p in position.values() if p >= 0}
            of_key_group = [
                int(segments[b, min(j * stride + stride, length) - 1])
                for j in range(-(-length // stride))
            ]
            visible = [
                j
                for j, segment in enumerate(of_key_group)
                if position and (not is_causal or j * stride <= max(position.values()))
                if segment_ids is None or segment in of_queries
            ]
            if not visible:
                continue
            logits = np.zeros(len(visible))
            for column, j in enumerate(visible):
                for u in range(stride):
                    query, key = i * stride + stride - 1 - u, j * stride + u
                    is_key = key < length and segments[b, key] == of_key_group[j]
                    if query in position and is_key:
                        logits[column] += q[b, query, n] @ k[b, key, n // group]
            weights = np.exp(logits / (stride * head_dim**0.5))
            for j, weight in zip(visible, weights / weights.sum(), strict=True):
                sums[b, n, i * stride // block_size, j * stride // block_size] += weight
    return sums
