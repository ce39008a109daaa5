"""MInference's patterns by their rules: float64 NumPy, one head at a time."""

import numpy as np

from tests.oracles import attention, pooled, selection
from tests.oracles.vertical_slash import vertical_slash_scores


def _highest(x: np.ndarray, count: int) -> list[int]:
    """Indices of the highest entries; of equals the lower."""
    return sorted(range(len(x)), key=lambda i: (-x[i], i))[:count]


def _sizes(
    head: tuple, length: int, budget: float | None, sink_size: int, recent_size: int
) -> tuple[int, int]:
    """How many columns and distances a vertical_and_slash head takes."""
    _, vertical, slash = head
    if budget is not None:
        tokens = int(np.float32(budget) * np.float32(length))
        vertical, slash = int(0.2 * tokens), int(0.8 * tokens)
    return (
        min(length, max(vertical, sink_size)),
        min(length, max(slash, min(50, recent_size))),
    )


def selected(
    q: np.ndarray,
    k: np.ndarray,
    *,
    heads: list[tuple],
    sink_size: int,
    recent_size: int,
    last_size: int,
    num_queries: int,
    block_size: int,
    adaptive_budget: float | None = None,
    kv_lengths: np.ndarray | None = None,
) -> tuple[np.ndarray, list[list[list[int]]]]:
    """(listed blocks [B, N, Tb, Sb], columns of each sequence's heads)."""
    (batch, q_len), kv_len, size = np.shape(q)[:2], np.shape(k)[1], block_size
    offset = kv_len - q_len
    call = {"kv_lengths": kv_lengths}
    visible, forced = selection.visible_and_forced(
        batch, q_len, kv_len, size, is_causal=True, **call
    )
    verticals, slashes = vertical_slash_scores(q, k, num_queries=num_queries, **call)
    pooled_scores = pooled.pooled_scores(q, k, block_size=size, **call)
    keep = np.zeros((batch, len(heads), *visible.shape[2:]), bool)
    columns: list[list[list[int]]] = [[[] for _ in heads] for _ in range(batch)]
    for b, (n, head) in ((b, item) for b in range(batch) for item in enumerate(heads)):
        length = kv_len if kv_lengths is None else int(kv_lengths[b])
        if head[0] == "vertical_and_slash":
            counts = _sizes(head, length, adaptive_budget, sink_size, recent_size)
            vertical, slash = verticals[b, n, :length].copy(), slashes[b, n, :length].copy()
            vertical[:sink_size] = slash[:recent_size] = np.inf
            columns[b][n] = sorted(_highest(vertical, counts[0]))
            for row, distance in np.ndindex(keep.shape[2], length):
                if distance in _highest(slash, counts[1]):
                    for position in range(row * size + offset, (row + 1) * size + offset):
                        if 0 <= position - distance < kv_len:
                            keep[b, n, row, (position - distance) // size] = True
        for row in range(keep.shape[2]):
            first, listed = row * size + offset, keep[b, n, row]
            if head[0] == "block_sparse":
                rank = np.where(forced[b, 0, row], np.inf, pooled_scores[b, n, row])
                shown = np.flatnonzero(visible[b, 0, row])
                count = max(head[1], int(forced[b, 0, row].sum()))
                listed[[shown[i] for i in _highest(rank[shown], count)]] = True
            if head[0] in ("stream_llm", "tri_shape"):
                for key in range(kv_len):
                    listed[key // size] |= key < head[1] or key > first - head[2]
            is_last = first < length and min(first + size, length) > length - last_size
            listed |= head[0] == "tri_shape" and is_last
    return keep & visible, columns


def kept_pairs(
    keep: np.ndarray,
    columns: list[list[list[int]]],
    heads: list[tuple],
    q_len: int,
    kv_len: int,
    block_size: int,
    kv_lengths: np.ndarray | None = None,
) -> np.ndarray:
    """[B, N, T, S] bool of what `selected` returned: the pairs that attention sees."""
    visible = attention.visible_pairs(
        len(keep), q_len, kv_len, is_causal=True, kv_lengths=kv_lengths
    )
    pairs = attention.listed_pairs(keep, q_len, kv_len, block_size, block_size)
    for b, n in np.ndindex(keep.shape[:2]):
        if heads[n][0] == "stream_llm":
            for i, j in np.ndindex(q_len, kv_len):
                pairs[b, n, i, j] &= j < heads[n][1] or j > i + kv_len - q_len - heads[n][2]
        pairs[b, n][:, columns[b][n]] = True
    return pairs & visible[:, None]
