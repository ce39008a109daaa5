"""The Hopper kernels on a Hopper GPU, over all their options."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from sparseattn_jax.kernels.antidiagonal_scores import mosaic_sm90
from tests.kernels.antidiagonal_scores.cases import Case, assert_right, call, expected, operands

pytestmark = pytest.mark.gpu

SHAPES = itertools.product(("bfloat16", "float16"), (64, 128, 256), (4, 8, 16), (64, 128))

OPTIONS = [
    Case(N=4, K=1, T=1024, S=1024),
    Case(N=3, K=1, B=2, T=1000, S=1000, lengths=(1000, 777)),
    Case(N=6, K=3, T=333, S=1111, q_blocks=(1, 3)),
    Case(N=2, K=2, B=2, T=777, S=901, is_causal=False, lengths=(901, 500)),
    Case(N=2, K=1, T=2100, S=2500, workspace_bytes=1),
]

CASES = [
    dataclasses.replace(options, dtype=dtype, H=head_dim, stride=stride, block_size=block_size)
    for dtype, head_dim, stride, block_size in SHAPES
    for options in OPTIONS
]
EDGES = [
    Case(N=2, K=1, T=1, S=130),
    Case(N=1, K=1, T=10, S=10),
    Case(N=2, K=1, B=3, T=500, S=500, lengths=(500, 1, 0), is_causal=False),
    Case(N=32, K=8, H=128, stride=16, block_size=128, T=1536, S=1536),
]


@pytest.mark.parametrize("case", CASES + EDGES, ids=str)
def test_values(case: Case):
    scores = jax.jit(functools.partial(call, mosaic_sm90.run, case))(*operands(case))
    assert_right(case, scores, expected(case))


def test_two_runs_are_equal_to_the_bit():
    case = Case(N=32, K=8, H=128, stride=8, block_size=128, T=4000, S=4000)
    given = operands(case)
    run = jax.jit(functools.partial(call, mosaic_sm90.run, case))
    np.testing.assert_array_equal(run(*given), run(*given))
