"""Masks as pictures: # is kept, . is not."""

import numpy as np


def block_matrix(picture: str) -> np.ndarray:
    """The bool matrix of a drawing, one text line a row."""
    rows = [line.strip() for line in picture.split()]
    return np.array([[cell == "#" for cell in row] for row in rows])
