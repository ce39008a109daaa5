"""Full: every visible block, and nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import Full
from tests.drawing import block_matrix
from tests.oracles import selection


def arrays(B=1, T=32, S=32, N=4, K=2, H=16):
    return jnp.ones((B, T, N, H)), jnp.ones((B, S, K, H))


def test_a_causal_picture():
    pattern = Full(block_size=8).select(*arrays(T=21, S=29))
    drawing = block_matrix("""
        ##..
        ###.
        ####
    """)
    np.testing.assert_array_equal(selection.listed_blocks(pattern.blocks)[0, 0], drawing)
    np.testing.assert_array_equal(pattern.blocks.density(), 1.0)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("lengths", [None, [45, 30, 0]], ids=["all", "lengths"])
def test_lists_the_visible_blocks(is_causal: bool, lengths: list[int] | None):
    q, k = arrays(B=3, T=21, S=45)
    kv_lengths = None if lengths is None else jnp.array(lengths, jnp.int32)
    pattern = Full(block_size=8).select(q, k, is_causal=is_causal, kv_lengths=kv_lengths)
    visible, _ = selection.visible_and_forced(3, 21, 45, 8, is_causal=is_causal, kv_lengths=lengths)
    np.testing.assert_array_equal(selection.listed_blocks(pattern.blocks), visible)


def test_a_block_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="block_size=0 must be at least 1"):
        Full(block_size=0).select(*arrays())


def test_more_causal_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match="q_len=40 must not exceed kv_len=32"):
        Full().select(*arrays(T=40))
