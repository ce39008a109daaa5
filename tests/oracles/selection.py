"""Cumulative block selection by its rule, and what makes a selected set right."""

import numpy as np


def select_row(
    scores: np.ndarray, threshold: float, forced: np.ndarray, visible: np.ndarray
) -> np.ndarray:
    """Forced blocks, then the highest scores (ties: lower index) until the mass is reached."""
    if threshold >= 1:
        return visible.copy()
    scores = np.where(visible, np.asarray(scores, np.float64), 0.0)
    keep = forced & visible
    needed = threshold * scores.sum()
    for block in sorted(np.flatnonzero(visible & ~keep), key=lambda block: (-scores[block], block)):
        if scores[keep].sum() >= needed:
            break
        keep[block] = True
    return keep


def select_blocks(
    scores: np.ndarray, threshold: np.ndarray, forced: np.ndarray, visible: np.ndarray
) -> np.ndarray:
    """`select_row` for every row of [B, N, Tb, Sb] scores, with one threshold per head."""
    forced, visible = (np.broadcast_to(x, scores.shape) for x in (forced, visible))
    keep = np.zeros(scores.shape, bool)
    for row in np.ndindex(scores.shape[:3]):
        keep[row] = select_row(scores[row], float(threshold[row[1]]), forced[row], visible[row])
    return keep


def rows_at_fault(
    keep: np.ndarray,
    scores: np.ndarray,
    threshold: np.ndarray,
    forced: np.ndarray,
    visible: np.ndarray,
    *,
    epsilon: float = 1e-5,
) -> list[str]:
    """Why rows of a selected set are not right; empty if all are.

    A row is right iff it keeps the visible forced blocks and nothing invisible, its mass is at
    least (threshold - epsilon) * total, and without its lowest unforced block the mass is below
    (threshold + epsilon) * total. At a threshold of 1 or more it keeps every visible block.
    """
    forced, visible = (np.broadcast_to(x, scores.shape) for x in (forced, visible))
    faults = []
    for row in np.ndindex(scores.shape[:3]):
        goal = float(threshold[row[1]])
        mass = np.where(visible[row], np.asarray(scores[row], np.float64), 0.0)
        unforced = mass[keep[row] & ~forced[row]]
        kept = mass[keep[row]].sum()
        if (keep[row] & ~visible[row]).any():
            faults.append(f"row {row} keeps an invisible block")
        elif (forced[row] & visible[row] & ~keep[row]).any():
            faults.append(f"row {row} lacks a forced block")
        elif goal >= 1:
            if (keep[row] != visible[row]).any():
                faults.append(f"row {row} lacks a visible block at threshold {goal}")
        elif kept < (goal - epsilon) * mass.sum():
            faults.append(f"row {row} keeps {kept} of {mass.sum()}, too little for {goal}")
        elif unforced.size and kept - unforced.min() >= (goal + epsilon) * mass.sum():
            faults.append(f"row {row} keeps a block that it does not need for {goal}")
    return faults


def visible_and_forced(
    batch: int,
    q_len: int,
    kv_len: int,
    block_size: int,
    *,
    is_causal: bool,
    kv_lengths: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """[B, 1, Tb, Sb] each, from tokens: blocks of which a query sees a key; forced blocks.

    Causal rows must keep the first block and each block that holds a valid query's position.
    """
    shape = (batch, 1, -(-q_len // block_size), -(-kv_len // block_size))
    visible, forced = np.zeros(shape, bool), np.zeros(shape, bool)
    for b, i in np.ndindex(batch, q_len):
        length = kv_len if kv_lengths is None else int(kv_lengths[b])
        position = i + kv_len - q_len
        if is_causal and position >= length:
            continue
        last_key = min(position, length - 1) if is_causal else length - 1
        row = (b, 0, i // block_size)
        visible[row][: last_key // block_size + 1] = True
        if is_causal:
            forced[row][[0, position // block_size]] = True
    return visible, forced


def listed_blocks(block_mask) -> np.ndarray:
    """[B, #N, Tb, Sb] bool of what a BlockMask's lists hold."""
    indices, counts = np.asarray(block_mask.kv_indices), np.asarray(block_mask.kv_num_blocks)
    keep = np.zeros((*counts.shape, -(-block_mask.kv_len // block_mask.block_kv)), bool)
    for row in np.ndindex(counts.shape):
        keep[row][indices[row][: counts[row]]] = True
    return keep
