"""Attention by its formula: float64 NumPy, one query at a time."""

import numpy as np


def visible_pairs(
    batch: int,
    q_len: int,
    kv_len: int,
    *,
    is_causal: bool,
    kv_lengths: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
) -> np.ndarray:
    """[B, T, S] bool: key j < L; if causal j <= p and p < L with p = i + S - T; same segment."""
    visible = np.zeros((batch, q_len, kv_len), bool)
    for b in range(batch):
        length = kv_len if kv_lengths is None else int(kv_lengths[b])
        for i in range(q_len):
            position = i + kv_len - q_len
            for j in range(length):
                if is_causal and (j > position or position >= length):
                    continue
                if segment_ids is not None and segment_ids[b, position] != segment_ids[b, j]:
                    continue
                visible[b, i, j] = True
    return visible


def listed_pairs(blocks: np.ndarray, q_len: int, kv_len: int, block_q: int, block_kv: int):
    """[B, N, T, S] bool of the tokens in the kept blocks of a [B, N, Tb, Sb] block matrix."""
    tokens = np.repeat(np.repeat(blocks, block_q, axis=2), block_kv, axis=3)
    return tokens[:, :, :q_len, :kv_len]


def attention(q, k, v, keep: np.ndarray, scale: float | None = None):
    """Output [B, T, N, H] and log-sum-exp [B, T, N] over the kept pairs [B, N, T, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, q_len, num_heads, head_dim = q.shape
    group = num_heads // k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    out = np.zeros_like(q)
    lse = np.full((batch, q_len, num_heads), -np.inf)
    for b, i, n in np.ndindex(batch, q_len, num_heads):
        kept = np.flatnonzero(keep[b, n, i])
        if kept.size == 0:
            continue
        logits = k[b, kept, n // group] @ q[b, i, n] * scale
        weights = np.exp(logits - logits.max())
        lse[b, i, n] = logits.max() + np.log(weights.sum())
        out[b, i, n] = weights @ v[b, kept, n // group] / weights.sum()
    return out, lse


def attention_gradients(q, k, v, keep: np.ndarray, d_out, d_lse, scale: float | None = None):
    """dq, dk, dv of sum(d_out * out) + sum(d_lse * lse), from the softmax's derivative."""
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    batch, q_len, num_heads, head_dim = q.shape
    group = num_heads // k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, i, n in np.ndindex(batch, q_len, num_heads):
        kept = np.flatnonzero(keep[b, n, i])
        if kept.size == 0:
            continue
        head = n // group
        logits = k[b, kept, head] @ q[b, i, n] * scale
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        d_weights = v[b, kept, head] @ d_out[b, i, n]
        d_logits = weights * (d_weights - weights @ d_weights + d_lse[b, i, n])
        d_q[b, i, n] = scale * d_logits @ k[b, kept, head]
        d_k[b, kept, head] += scale * np.outer(d_logits, q[b, i, n])
        d_v[b, kept, head] += np.outer(weights, d_out[b, i, n])
    return d_q, d_k, d_v
