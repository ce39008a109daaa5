"""The judge of selections, on sets that are right, too small and too large."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import xattention
from benchmarks.block_sparse_forward import random_operands
from benchmarks.shapes import SHAPES
from sparseattn_jax import BlockMask, XAttention

SHAPE = SHAPES["toy"]
LENGTH = 1024
STRATEGY = XAttention(threshold=xattention.THRESHOLD, stride=16, block_size=SHAPE.block_size)


@pytest.fixture(scope="module")
def operands() -> tuple[jax.Array, jax.Array]:
    """Normal operands spread their mass, so that each threshold has a set of its own."""
    q, k, _ = random_operands(SHAPE, LENGTH, seed=0)
    return q, k


@pytest.fixture(scope="module")
def keep(operands: tuple[jax.Array, jax.Array]) -> np.ndarray:
    return select(STRATEGY, operands)


def select(strategy: XAttention, operands: tuple[jax.Array, jax.Array]) -> np.ndarray:
    return np.asarray(jax.jit(lambda q, k: strategy.select(q, k).blocks.to_dense())(*operands))


def is_right(operands: tuple[jax.Array, jax.Array], keep: np.ndarray) -> bool:
    size = SHAPE.block_size
    blocks = BlockMask.from_dense(
        jnp.asarray(keep), q_len=LENGTH, kv_len=LENGTH, block_q=size, block_kv=size
    )
    q, k = operands
    return xattention.judge_selection(blocks, q=q, k=k, strategy=STRATEGY).passed


def test_the_selection_is_right(operands: tuple[jax.Array, jax.Array], keep: np.ndarray) -> None:
    assert is_right(operands, keep)


def test_the_selection_is_wrong_for_another_threshold(
    operands: tuple[jax.Array, jax.Array],
) -> None:
    strategy = dataclasses.replace(STRATEGY, threshold=0.8)
    assert not is_right(operands, select(strategy, operands))


@pytest.mark.parametrize(
    ("column", "value"),
    [(0, False), (-1, False), (slice(1, -1), True)],
    ids=["no_sink", "no_diagonal", "every_block"],
)
def test_a_changed_last_row_is_wrong(
    operands: tuple[jax.Array, jax.Array], keep: np.ndarray, column: int | slice, value: bool
) -> None:
    changed = keep.copy()
    changed[:, :, -1, column] = value
    assert not is_right(operands, changed)


def test_an_invisible_block_is_wrong(
    operands: tuple[jax.Array, jax.Array], keep: np.ndarray
) -> None:
    changed = keep.copy()
    changed[:, :, 0, 1] = True
    assert not is_right(operands, changed)


def test_the_judge_of_a_prefill_counts_what_was_dropped(
    operands: tuple[jax.Array, jax.Array],
) -> None:
    strategy = dataclasses.replace(STRATEGY, max_blocks=3)
    pattern = jax.jit(strategy.select)(*operands)
    judge = xattention._PrefillJudge(
        q=operands[0], k=operands[1], rows=np.arange(1), judge_rows=None, strategy=strategy
    )
    assert not judge((operands[0], pattern)).passed
    assert judge.num_dropped == pattern.num_dropped.sum() > 0
    assert judge.density == pytest.approx(float(pattern.blocks.density().mean()))
