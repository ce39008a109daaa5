"""The Hopper kernels on a Hopper GPU, over all their options."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.kernels.decode_attention import mosaic_sm90
from tests.kernels.decode_attention.cases import Case, assert_right, call, operands

pytestmark = pytest.mark.gpu

SHAPES = itertools.product(("bfloat16", "float16"), (64, 128, 256))

OPTIONS = [
    Case(N=8, K=2, S=1024, lengths=(1024,)),
    Case(N=32, K=8, S=520, lengths=(520, 64, 1, 0), T=2),
    Case(N=3, K=3, S=2000, lengths=(1999, 700), T=3),
    Case(N=8, K=1, S=3000, lengths=(3000,), T=8),
    Case(N=8, K=2, S=1024, lengths=(1024, 900), block_kv=128, density=0.3),
    Case(N=8, K=2, S=1000, lengths=(1000, 129, 500), block_kv=64, density=0.7, T=4),
    Case(N=6, K=2, S=1000, lengths=(1000, 129), block_kv=128, shared=True),
    Case(N=8, K=2, S=512, lengths=(512,), block_kv=64, density=0.0),
    Case(N=8, K=2, S=1152, lengths=(5000, 1152, 3), ring=1024),
    Case(N=8, K=2, S=136, lengths=(5000, 100), ring=72, T=3),
    Case(N=8, K=2, S=1152, lengths=(5000,), ring=1024, block_kv=128, density=0.5),
    Case(N=4, K=1, S=1000, lengths=(1000, 0, 0, 64, 0, 999), rows=(7, 0, 3, 1, 0, 2)),
    Case(N=3, K=1, S=1024, lengths=(900, 0, 1024), rows=(5, 0, 4), block_kv=64, density=0.4),
    Case(N=6, K=2, S=1152, lengths=(5000, 10), rows=(3, 1), ring=1024, T=2),
]

CASES = [
    dataclasses.replace(options, dtype=dtype, H=head_dim)
    for dtype, head_dim in SHAPES
    for options in OPTIONS
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_log_sum_exp(case: Case):
    given = operands(case)
    assert_right(case, given, *jax.jit(lambda given: call(mosaic_sm90.run, case, given))(given))


def test_two_runs_are_equal_to_the_bit():
    case = Case(N=32, K=8, S=8192, lengths=(8192, 5000))
    given = operands(case)
    run = jax.jit(lambda given: call(mosaic_sm90.run, case, given))
    for one, other in zip(run(given), run(given), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_unlisted_block_is_never_used():
    case = Case(N=8, K=2, S=1024, lengths=(1024, 1024), block_kv=128)
    given = operands(case)
    given = dataclasses.replace(given, blocks=given.blocks.at[..., 0].set(False))
    given = dataclasses.replace(given, blocks=given.blocks.at[1].set(False))
    poisoned = dataclasses.replace(
        given, k=given.k.at[:, :128].set(jnp.nan), v=given.v.at[:, :128].set(jnp.nan)
    )
    expected = call(mosaic_sm90.run, case, given)
    for one, other in zip(call(mosaic_sm90.run, case, poisoned), expected, strict=True):
        np.testing.assert_array_equal(one, other)
