"""Coverage counts by their rule: float64 NumPy, by sorting."""

import numpy as np


def coverage_counts(x: np.ndarray, share: np.ndarray, *, slack: float = 0.0) -> np.ndarray:
    """Counts [B, N] of rows x [B, N, L]; `slack` is added to each share."""
    x = np.asarray(x, np.float64)
    held = np.cumsum(-np.sort(-x, axis=-1), axis=-1)
    allowed = (np.asarray(share, np.float64) + slack)[None, :, None] * held[..., -1:]
    return np.minimum(1 + (held <= allowed).sum(axis=-1), x.shape[-1])
