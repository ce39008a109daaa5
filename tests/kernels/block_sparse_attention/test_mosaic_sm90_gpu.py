"""The Hopper kernel on a Hopper GPU, over all its options."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.kernels.block_sparse_attention import mosaic_sm90
from tests.kernels.block_sparse_attention.cases import Case, assert_right, call, operands
from tests.kernels.block_sparse_attention.test_windows import (
    MIXED,
    head_alone,
    mixed_blocks,
    of_head,
)
from tests.kernels.block_sparse_attention.vjp_cases import vjp_operands

pytestmark = pytest.mark.gpu

SHAPES = itertools.product(("bfloat16", "float16"), (64, 128, 256), (64, 128), (64, 128))

OPTIONS = [
    Case(N=4, K=4, T=1024, S=1024),
    Case(N=4, K=1, B=2, T=1000, S=1000, shared=True),
    Case(N=6, K=2, T=333, S=1111, density=0.3),
    Case(N=4, K=2, B=2, T=777, S=901, is_causal=False, lengths=(901, 500)),
    Case(N=3, K=1, B=2, T=640, S=1024, lengths=(1024, 700)),
    Case(N=2, K=2, T=1, S=130, density=1.0),
    Case(N=2, K=1, T=10, S=10, density=1.0),
    Case(N=4, K=1, T=515, S=515, density=0.0),
    Case(N=4, K=2, T=2048, S=2048, density=1.0),
    Case(N=32, K=8, T=1536, S=1536, density=0.2),
    Case(N=2, K=1, B=3, T=500, S=500, density=1.0, lengths=(500, 1, 0), is_causal=False),
    Case(N=4, K=2, T=1024, S=1024, windows=((0, 64, 300, 1), (1024, 128, 0, 1))),
    Case(N=3, K=1, B=2, T=333, S=901, lengths=(901, 500), windows=((5, 0, 70), (65, 901, 200))),
]

CASES = [
    dataclasses.replace(options, dtype=dtype, H=head_dim, block_q=block_q, block_kv=block_kv)
    for dtype, head_dim, block_q, block_kv in SHAPES
    for options in OPTIONS
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_log_sum_exp(case: Case):
    given = operands(case)
    assert_right(case, given, *jax.jit(lambda given: call(mosaic_sm90.run, case, given))(given))


def test_two_runs_are_equal_to_the_bit():
    case = Case(T=1000, S=1000, N=32, K=8)
    given = operands(case)
    run = jax.jit(lambda given: call(mosaic_sm90.run, case, given))
    for one, other in zip(run(given), run(given), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_unlisted_block_is_never_used():
    case = Case(T=512, S=512, density=0.4)
    given = operands(case)
    given = dataclasses.replace(given, blocks=given.blocks.at[..., 0].set(False))
    poisoned = dataclasses.replace(
        given, k=given.k.at[:, :128].set(jnp.nan), v=given.v.at[:, :128].set(jnp.nan)
    )
    expected = call(mosaic_sm90.run, case, given)
    for one, other in zip(call(mosaic_sm90.run, case, poisoned), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("head", [0, 1], ids=["full", "block-sparse"])
def test_a_head_without_a_window_is_what_it_is_alone(head: int):
    given = vjp_operands(MIXED, mixed_blocks())
    case, alone = head_alone(head, given)
    on_gpu = jax.device_put((given.forward, alone.forward), jax.devices()[0])
    found = call(mosaic_sm90.run, MIXED, on_gpu[0])
    expected = call(mosaic_sm90.run, case, on_gpu[1])
    for one, other in zip(of_head(head, found), expected, strict=True):
        np.testing.assert_array_equal(one, other)
