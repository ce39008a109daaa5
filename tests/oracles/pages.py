"""Quest's page selection by its formulas: float64 NumPy, one page and one query at a time."""

import numpy as np


def page_bounds(k, lengths, page_size: int):
    """Least and greatest key of each page, [B, P, K, H]; inf and -inf where there is none."""
    k = np.asarray(k, np.float64)
    batch, capacity, *heads = k.shape
    shape = (batch, -(-capacity // page_size), *heads)
    key_min, key_max = np.full(shape, np.inf), np.full(shape, -np.inf)
    for b in range(batch):
        for j in range(lengths[b]):
            page = j // page_size
            key_min[b, page] = np.minimum(key_min[b, page], k[b, j])
            key_max[b, page] = np.maximum(key_max[b, page], k[b, j])
    return key_min, key_max


def page_scores(q, key_min, key_max):
    """[B, T, N, P]: the sum over channels of the greater product; -inf for a page without keys."""
    q = np.asarray(q, np.float64)
    (batch, q_len, num_heads, _), num_pages = q.shape, key_min.shape[1]
    group = num_heads // key_min.shape[2]
    scores = np.full((batch, q_len, num_heads, num_pages), -np.inf)
    for b, t, n, p in np.ndindex(scores.shape):
        least, greatest = key_min[b, p, n // group], key_max[b, p, n // group]
        if np.all(least <= greatest):
            scores[b, t, n, p] = np.maximum(q[b, t, n] * least, q[b, t, n] * greatest).sum()
    return scores


def page_shares(scores, lengths, page_size: int, num_kv_heads: int, scale: float):
    """[B, K, P]: the mean over a kv head's queries of softmaxes over the pages that each sees."""
    batch, q_len, num_heads, num_pages = scores.shape
    group = num_heads // num_kv_heads
    shares = np.zeros((batch, num_kv_heads, num_pages))
    for b, t, n in np.ndindex(batch, q_len, num_heads):
        position = lengths[b] - q_len + t
        seen = [p for p in range(num_pages) if p * page_size <= position]
        if seen:
            weights = np.exp(scale * (scores[b, t, n, seen] - scores[b, t, n, seen].max()))
            shares[b, n // group, seen] += weights / weights.sum() / (q_len * group)
    return shares


def forced_pages(length: int, q_len: int, page_size: int, num_first: int, num_recent: int):
    """The first pages, those of the queries, and num_recent - 1 before them, as a set."""
    pages = set(range(-(-length // page_size)))
    oldest = (length - q_len) // page_size - (num_recent - 1)
    return {p for p in pages if p < num_first or p >= oldest}


def kept_pages(shares, visible: int, forced: set[int], top_k: int | None, top_p: float | None):
    """Of one kv head: the kept pages, and how many top_k dropped."""
    order = sorted(range(visible), key=lambda p: (p not in forced, -shares[p], p))
    kept = order
    if top_p is not None and top_p < 1:
        kept, mass = [], 0.0
        for p in order:
            if p not in forced and mass >= top_p * shares[:visible].sum():
                break
            kept.append(p)
            mass += shares[p]
    width = len(kept) if top_k is None else min(top_k, len(kept))
    return set(kept[:width]), len(kept) - width
