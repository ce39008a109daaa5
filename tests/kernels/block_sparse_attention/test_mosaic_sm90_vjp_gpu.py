"""The Hopper backward kernel on a Hopper GPU, over all its options."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.kernels.block_sparse_attention import mosaic_sm90_vjp
from tests.kernels.block_sparse_attention.cases import Case
from tests.kernels.block_sparse_attention.vjp_cases import (
    Gradients,
    VjpOperands,
    assert_gradients_right,
    gradients,
    vjp_operands,
)

pytestmark = pytest.mark.gpu

SHAPES = itertools.product((64, 128, 256), (64, 128), (64, 128))

OPTIONS = [
    Case(N=4, K=1, T=1024, S=1024, density=0.3),
    Case(dtype="float16", N=4, K=2, B=2, T=777, S=901, is_causal=False, lengths=(901, 500)),
    Case(N=6, K=2, T=333, S=1111, density=0.3, lengths=(1000,)),
    Case(dtype="float16", N=4, K=2, T=1536, S=1536, density=0.05),
    Case(N=2, K=2, T=1000, S=1000, density=1.0, shared=True),
    Case(dtype="float16", N=4, K=1, B=3, T=300, S=300, density=1.0, lengths=(300, 1, 0)),
    Case(N=4, K=1, T=515, S=515, density=0.0, shared=True),
    Case(N=2, K=1, T=10, S=130, density=1.0, is_causal=False, shared=True),
    Case(N=4, K=2, T=1024, S=1024, windows=((0, 64, 300, 1), (1024, 128, 0, 1))),
    Case(N=3, K=1, B=2, T=333, S=901, lengths=(901, 500), windows=((5, 0, 70), (65, 901, 200))),
]

CASES = [
    dataclasses.replace(options, H=head_dim, block_q=block_q, block_kv=block_kv)
    for head_dim, block_q, block_kv in SHAPES
    for options in OPTIONS
]


def on_gpu(case: Case, given: VjpOperands) -> Gradients:
    given = jax.device_put(given, jax.devices()[0])
    return jax.jit(lambda given: gradients(mosaic_sm90_vjp.run, case, given))(given)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case: Case):
    given = vjp_operands(case)
    assert_gradients_right(case, given, jax.device_get(on_gpu(case, given)))


def test_two_runs_give_equal_gradients_of_keys_and_values_to_the_bit():
    case = Case(T=1000, S=1000, N=32, K=8)
    given = vjp_operands(case)
    one, other = on_gpu(case, given), on_gpu(case, given)
    np.testing.assert_array_equal(one[1], other[1])
    np.testing.assert_array_equal(one[2], other[2])
    np.testing.assert_allclose(*(np.asarray(x[0], np.float32) for x in (one, other)), atol=2e-2)


def test_an_unlisted_block_is_never_used():
    case = Case(T=512, S=512, density=0.4)
    given = vjp_operands(case)
    blocks = np.asarray(given.forward.blocks).copy()
    blocks[..., 0] = False
    given = vjp_operands(case, blocks)
    forward = given.forward
    poisoned = dataclasses.replace(
        forward, k=forward.k.at[:, :128].set(jnp.nan), v=forward.v.at[:, :128].set(jnp.nan)
    )
    expected = on_gpu(case, given)
    found = on_gpu(case, dataclasses.replace(given, forward=poisoned))
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[2], expected[2])
    assert np.isfinite(np.asarray(found[0], np.float32)).all()
