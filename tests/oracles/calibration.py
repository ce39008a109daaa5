"""Calibration of thresholds by its rules: float64 NumPy, a row of blocks at a time."""

import itertools
from collections.abc import Callable

import numpy as np

from tests.oracles import selection


def recall_of(
    mass: np.ndarray,
    scores: np.ndarray,
    forced: np.ndarray,
    visible: np.ndarray,
    threshold: float,
) -> float:
    """Share of a head's true mass [Tb, Sb] in the blocks that a threshold selects by scores."""
    rows = zip(mass, scores, forced, visible, strict=True)
    kept = sum(row[0][selection.select_row(row[1], threshold, *row[2:])].sum() for row in rows)
    return kept / mass.sum()


def lowest_threshold(texts: list[tuple[np.ndarray, ...]], recall: float) -> float:
    """By bisection, the lowest threshold at which every text's recall is as wanted, or just above.

    A text is what `recall_of` takes. Recall never falls with the threshold.
    """
    low, high = 0.0, 1.0
    if min(recall_of(*text, low) for text in texts) >= recall:
        return low
    while high - low > 1e-7:
        middle = (low + high) / 2
        is_enough = min(recall_of(*text, middle) for text in texts) >= recall
        low, high = (low, middle) if is_enough else (middle, high)
    return high


def coverage_threshold(
    mass: np.ndarray, scores: np.ndarray, visible: np.ndarray, recall: float
) -> float:
    """A head's threshold by the published profiler's rule."""
    kept = 0.0
    for row_mass, row_scores, row_visible in zip(mass, scores, visible, strict=True):
        marked: list[int] = []
        for block in sorted(np.flatnonzero(row_visible), key=lambda i: (-row_mass[i], i)):
            if row_mass[marked].sum() >= recall * row_mass.sum():
                break
            marked.append(block)
        if marked:
            kept += row_scores[row_visible & (row_scores >= row_scores[marked].min())].sum()
    return kept / scores[visible].sum()


def best_reductions(
    score: Callable[[np.ndarray], float],
    initial: np.ndarray,
    num_reductions: int,
    factor: float,
    max_per_head: int,
) -> tuple[np.ndarray, float]:
    """The best thresholds with exactly so many reductions: all choices are tried."""
    choices = itertools.product(range(max_per_head + 1), repeat=initial.size)
    thresholds = [
        initial * factor ** np.reshape(counts, initial.shape)
        for counts in choices
        if sum(counts) == num_reductions
    ]
    best = max(thresholds, key=score)
    return best, score(best)


def block_mass(
    weights: np.ndarray, num_q_blocks: int, num_kv_blocks: int, block_size: int
) -> np.ndarray:
    """Sums of softmax weights [..., T, S] over blocks."""
    *batch, q_len, kv_len = weights.shape
    padding = [(0, 0)] * len(batch)
    padding += [(0, num_q_blocks * block_size - q_len), (0, num_kv_blocks * block_size - kv_len)]
    blocks = np.pad(weights, padding).reshape(
        *batch, num_q_blocks, block_size, num_kv_blocks, block_size
    )
    return blocks.sum(axis=(-3, -1))
