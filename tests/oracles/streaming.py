"""What the queries of streaming attention see, by the formula: one query and one key at a time."""

from collections.abc import Sequence

import numpy as np


def visible_pairs(
    batch: int,
    q_len: int,
    kv_len: int,
    *,
    sink_sizes: Sequence[int],
    recent_sizes: Sequence[int],
    kv_lengths: Sequence[int] | None = None,
) -> np.ndarray:
    """[B, N, T, S] bool: j <= p < L and (j < sink or j > p - recent), with p = i + S - T.

    The sizes are those of each head.
    """
    visible = np.zeros((batch, len(sink_sizes), q_len, kv_len), bool)
    for b, n, i, j in np.ndindex(visible.shape):
        position = i + kv_len - q_len
        length = kv_len if kv_lengths is None else kv_lengths[b]
        is_kept = j < sink_sizes[n] or j > position - recent_sizes[n]
        visible[b, n, i, j] = j <= position < length and is_kept
    return visible
