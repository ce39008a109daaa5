"""The gate passes right outputs and stops wrong ones, in early rows and in late ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gate
from benchmarks.block_sparse_forward import draw_blocks, random_operands
from benchmarks.shapes import SHAPES
from tests.oracles import attention as oracle

SHAPE = SHAPES["toy"]
LENGTH = 512
ROWS = gate.sample_rows(LENGTH, SHAPE.block_size, seed=0)

Operands = tuple[jax.Array, jax.Array, jax.Array]


@pytest.fixture(scope="module")
def operands() -> Operands:
    return random_operands(SHAPE, LENGTH, seed=0)


@pytest.fixture(scope="module")
def keep() -> np.ndarray:
    size = SHAPE.block_size
    return draw_blocks(SHAPE.num_heads, LENGTH, 0.25, block_q=size, block_kv=size, seed=0)


def attend(operands: Operands, keep: np.ndarray, scale: float | None = None) -> np.ndarray:
    """The oracle's output, rounded to bfloat16."""
    listed = oracle.listed_pairs(keep[None], LENGTH, LENGTH, SHAPE.block_size, SHAPE.block_size)
    out, _ = oracle.attention(*operands, listed & np.tri(LENGTH, dtype=bool), scale)
    return np.asarray(out[0], jnp.bfloat16).astype(np.float32)


def judge(operands: Operands, keep: np.ndarray, out: np.ndarray) -> gate.Verdict:
    keep = keep[:, ROWS // SHAPE.block_size]
    return gate.judge(out[ROWS], *operands, rows=ROWS, keep=keep, block_size=SHAPE.block_size)


def test_sampled_rows_hold_the_edges() -> None:
    assert {0, 63, 64, 256, 448, 511} <= set(ROWS)
    assert np.all(np.diff(ROWS) > 0)


def test_the_oracle_passes(operands: Operands, keep: np.ndarray) -> None:
    assert judge(operands, keep, attend(operands, keep)).passed


@pytest.mark.parametrize("head", [0, 1])
def test_one_block_too_few_in_the_last_row_is_seen(
    operands: Operands, keep: np.ndarray, head: int
) -> None:
    """The late rows' values are too small for a tolerance that suits the first ones."""
    faulty = keep.copy()
    faulty[head, -1, 0] = False
    assert not judge(operands, keep, attend(operands, faulty)).passed


def test_a_wrong_scale_is_seen(operands: Operands, keep: np.ndarray) -> None:
    scale = 1.05 * SHAPE.head_dim**-0.5
    assert not judge(operands, keep, attend(operands, keep, scale)).passed


def test_a_nan_is_seen(operands: Operands, keep: np.ndarray) -> None:
    out = attend(operands, keep)
    out[ROWS[-1], 0, 0] = np.nan
    assert not judge(operands, keep, out).passed
