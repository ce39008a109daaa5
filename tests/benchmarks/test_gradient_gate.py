"""The gate for gradients passes right ones and stops wrong ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gate
from benchmarks.block_sparse_forward import draw_blocks, random_operands
from benchmarks.block_sparse_forward_backward import gradients, random_output_gradient
from benchmarks.gradient_gate import judge_gradients
from benchmarks.shapes import SHAPES
from sparseattn_jax import BlockMask, block_sparse_attention
from tests.oracles import attention as oracle

SHAPE = SHAPES["toy"]
SIZE = SHAPE.block_size
LENGTH = 256
ROWS = gate.sample_rows(LENGTH, SIZE, seed=0)
NAMES = ("d_q", "d_k", "d_v")

Arrays = tuple[jax.Array, ...]


@pytest.fixture(scope="module")
def operands() -> Arrays:
    d_out = random_output_gradient(SHAPE, LENGTH, seed=0)
    return *random_operands(SHAPE, LENGTH, seed=0), d_out


@pytest.fixture(scope="module")
def keep() -> np.ndarray:
    return draw_blocks(SHAPE.num_heads, LENGTH, 0.25, block_q=SIZE, block_kv=SIZE, seed=0)


def by_the_oracle(operands: Arrays, keep: np.ndarray, scale: float | None = None) -> Arrays:
    """In float64, rounded to bfloat16."""
    *qkv, d_out = operands
    listed = oracle.listed_pairs(keep[None], LENGTH, LENGTH, SIZE, SIZE)
    seen = listed & np.tri(LENGTH, dtype=bool)
    exact = oracle.attention_gradients(*qkv, seen, d_out, np.zeros(d_out.shape[:3]), scale)
    return tuple(jnp.asarray(x, jnp.bfloat16) for x in exact)


@pytest.fixture(scope="module")
def right(operands: Arrays, keep: np.ndarray) -> Arrays:
    return by_the_oracle(operands, keep)


def passes(operands: Arrays, keep: np.ndarray, found: Arrays) -> bool:
    rows = [np.asarray(x[0, ROWS], np.float32) for x in found]
    return judge_gradients(*rows, operands=operands, rows=ROWS, keep=keep, block_size=SIZE).passed


def test_the_oracle_passes(operands: Arrays, keep: np.ndarray, right: Arrays) -> None:
    assert passes(operands, keep, right)


def test_our_gradients_pass(operands: Arrays, keep: np.ndarray) -> None:
    *qkv, d_out = operands
    mask = BlockMask.from_dense(
        jnp.asarray(keep[None]), q_len=LENGTH, kv_len=LENGTH, block_q=SIZE, block_kv=SIZE
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return block_sparse_attention(q, k, v, mask, backend="xla")

    assert passes(operands, keep, gradients(attend, *qkv, d_out))


@pytest.mark.parametrize("head", [0, 1])
def test_one_block_too_few_in_the_last_row_is_seen(
    operands: Arrays, keep: np.ndarray, head: int
) -> None:
    faulty = keep.copy()
    faulty[head, -1, 0] = False
    found = by_the_oracle(operands, faulty)
    assert not passes(operands, keep, found)


def test_a_wrong_scale_is_seen(operands: Arrays, keep: np.ndarray) -> None:
    found = by_the_oracle(operands, keep, 1.05 * SHAPE.head_dim**-0.5)
    assert not passes(operands, keep, found)


@pytest.mark.parametrize("index", range(3), ids=NAMES)
@pytest.mark.parametrize("fault", ["scaled", "nan", "late-row"])
def test_each_gradient_is_judged(
    operands: Arrays, keep: np.ndarray, right: Arrays, index: int, fault: str
) -> None:
    found = list(right)
    if fault == "scaled":
        found[index] = 1.02 * found[index].astype(jnp.float32)
    elif fault == "nan":
        found[index] = found[index].at[0, ROWS[-1], 0, 0].set(jnp.nan)
    else:
        found[index] = found[index].at[0, ROWS[-1]].mul(0.9)
    assert not passes(operands, keep, tuple(found))
