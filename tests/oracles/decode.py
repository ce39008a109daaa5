"""What the queries of a decode step see, by the formula: one query and one slot at a time."""

import numpy as np


def visible_slots(
    num_heads: int,
    q_len: int,
    positions: np.ndarray,
    lengths: np.ndarray,
    blocks: np.ndarray | None = None,
    block_kv: int = 1,
) -> np.ndarray:
    """[B, N, T, S] bool: 0 <= P <= p with p = L - T + t, and slot j in a kept block.

    Args:
        num_heads: query heads.
        q_len: query tokens.
        positions: P, [B, S].
        lengths: L, [B].
        blocks: [B, kv heads, Sb] bool, which blocks of the cache each kv head keeps.
        block_kv: slots per block.
    """
    batch, capacity = positions.shape
    visible = np.zeros((batch, num_heads, q_len, capacity), bool)
    for b, n, t, j in np.ndindex(visible.shape):
        sees = 0 <= positions[b, j] <= lengths[b] - q_len + t
        if blocks is not None:
            kv_head = n * blocks.shape[1] // num_heads
            sees = sees and blocks[b, kv_head, j // block_kv]
        visible[b, n, t, j] = sees
    return visible
