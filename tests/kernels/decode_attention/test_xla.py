"""The xla implementation against the float64 oracle, and the op's own errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.backends import UnsupportedError
from sparseattn_jax.kernels.decode_attention import decode_attention, xla
from tests.drawing import block_matrix
from tests.kernels.decode_attention.cases import (
    Case,
    Operands,
    assert_right,
    call,
    operands,
    read_by,
    visible,
)
from tests.oracles import attention, decode

run = functools.partial(call, xla.run)


def assert_equals_the_oracle(case: Case, given: Operands) -> None:
    out, lse = run(case, given)
    keep = visible(case, given)
    expected, expected_lse = attention.attention(*read_by(given), keep, case.scale)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)


CASES = [
    Case(dtype="float32", H=8, S=20, lengths=(20,)),
    Case(dtype="float32", H=8, S=21, lengths=(21, 13, 0), T=3, N=6),
    Case(dtype="float32", H=8, S=30, lengths=(30, 17), block_kv=4, T=2),
    Case(dtype="float32", H=8, S=30, lengths=(29,), block_kv=8, shared=True, N=3, K=3),
    Case(dtype="float32", H=8, S=24, lengths=(24, 9), block_kv=4, density=0.0),
    Case(dtype="float32", H=8, S=24, lengths=(100, 24, 7, 1), ring=16, T=2),
    Case(dtype="float32", H=8, S=26, lengths=(53,), ring=20, block_kv=8, T=4, K=1),
    Case(dtype="float32", H=8, S=300, lengths=(290,)),
    Case(dtype="float32", H=8, S=21, lengths=(21, 0, 13, 0), rows=(5, 9, 0, 5), T=3, N=6),
    Case(dtype="float32", H=8, S=30, lengths=(30, 17), rows=(2, 1), block_kv=4, T=2, K=1),
    Case(dtype="float32", H=8, S=26, lengths=(53, 9), rows=(1, 1), ring=20, T=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_equal_the_oracle(case: Case):
    assert_equals_the_oracle(case, operands(case))


# T, S, N, K: few, so that cases share compiled programs; odd lengths, and queries without a slot.
SHAPES = [
    (1, 1, 1, 1),
    (1, 24, 4, 2),
    (1, 37, 3, 1),
    (2, 7, 2, 2),
    (3, 40, 4, 2),
    (4, 13, 3, 1),
    (5, 3, 1, 1),
    (5, 33, 2, 2),
]


@given(
    shape=st.sampled_from(SHAPES),
    block_kv=st.sampled_from([None, 4, 16]),
    shared=st.booleans(),
    is_ring=st.booleans(),
    data=st.data(),
)
def test_any_call_equals_the_oracle(shape, block_kv, shared, is_ring, data):
    q_len, capacity, num_heads, num_kv_heads = shape
    longest = 2 * capacity if is_ring else capacity
    lengths = data.draw(st.tuples(st.integers(0, longest), st.integers(0, longest)))
    case = Case(
        dtype="float32",
        H=4,
        N=num_heads,
        K=num_kv_heads,
        T=q_len,
        S=capacity,
        lengths=lengths,
        block_kv=block_kv,
        shared=shared,
        ring=data.draw(st.integers(1, capacity)) if is_ring else 0,
    )
    assert_equals_the_oracle(case, operands(case))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_by_its_rounding_only(dtype: str):
    case = Case(dtype=dtype, H=16, S=40, lengths=(40, 11), T=2)
    given = operands(case)
    assert_right(case, given, *run(case, given))


def test_what_two_queries_see_of_a_ring():
    """Two sinks, then a ring of four; token 7 took the place of token 3, and one slot is empty."""
    positions = np.array([[0, 1, 6, 7, -1, 5]])
    seen = decode.visible_slots(1, 2, positions, lengths=np.array([8]))
    picture = """
        ###..#
        ####.#
    """
    np.testing.assert_array_equal(seen[0, 0], block_matrix(picture))


def test_a_cache_in_order_equals_the_list_of_all_blocks():
    case = Case(dtype="float32", H=8, S=70, lengths=(70, 33), T=2)
    given = operands(case)
    listed = dataclasses.replace(given, blocks=jnp.ones((2, 1, 5), bool))
    expected = run(case, given)
    for one, other in zip(
        run(dataclasses.replace(case, block_kv=16), listed), expected, strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_cache_in_order_equals_its_positions():
    case = Case(dtype="float32", H=8, S=40, lengths=(40, 9), T=3)
    given = operands(case)
    in_order = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32), (2, 40))
    with_positions = run(case, dataclasses.replace(given, positions=in_order))
    for one, other in zip(with_positions, run(case, given), strict=True):
        np.testing.assert_array_equal(one, other)


@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_slots_changes_nothing(seed: int):
    case = Case(dtype="float32", H=8, S=24, lengths=(40, 20), ring=20, T=2)
    given = operands(case)
    assert given.positions is not None
    order = np.random.default_rng(seed).permutation(case.S)
    permuted = dataclasses.replace(
        given,
        k=given.k[:, order],
        v=given.v[:, order],
        positions=given.positions[:, order],
    )
    for one, other in zip(run(case, permuted), run(case, given), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 16, 24, 1000])
def test_the_size_of_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(xla, "_CHUNK", chunk)
    case = Case(dtype="float32", H=8, S=80, lengths=(77, 30), block_kv=8)
    xla.run.clear_cache()
    assert_equals_the_oracle(case, operands(case))
    xla.run.clear_cache()


def test_an_unlisted_block_is_never_used():
    case = Case(dtype="float32", H=8, S=32, lengths=(32, 32), block_kv=8)
    given = operands(case)
    blocks = np.repeat([[[False, True, False, True]], [[False] * 4]], case.K, axis=1)
    given = dataclasses.replace(given, blocks=jnp.asarray(blocks))
    unlisted = np.repeat([0, 2], 8) * 8 + np.tile(np.arange(8), 2)
    poisoned = dataclasses.replace(
        given, k=given.k.at[:, unlisted].set(jnp.nan), v=given.v.at[:, unlisted].set(jnp.nan)
    )
    for one, other in zip(run(case, poisoned), run(case, given), strict=True):
        np.testing.assert_array_equal(one, other)


def test_memory_is_that_of_a_chunk_of_the_lists():
    S, K, H, M, block_kv = 2**20, 2, 64, 4, 64
    cache = jax.ShapeDtypeStruct((1, S, K, H), jnp.float32)
    lists = jax.ShapeDtypeStruct((1, K, M), jnp.int32), jax.ShapeDtypeStruct((1, K), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    q = jax.ShapeDtypeStruct((1, 1, 8, H), jnp.float32)
    compiled = xla.run.lower(
        q, cache, cache, lengths, None, *lists, block_kv=block_kv, scale=1.0
    ).compile()
    listed_bytes = 2 * K * M * block_kv * H * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * listed_bytes


def test_a_row_of_the_cache_is_read_in_place():
    """A copy of the rows, or of the cache, would take as much memory as these."""
    cache = jax.ShapeDtypeStruct((64, 2**16, 1, 64), jnp.float32)
    of_each = jax.ShapeDtypeStruct((8,), jnp.int32)
    q = jax.ShapeDtypeStruct((8, 1, 4, 64), jnp.float32)
    compiled = xla.run.lower(
        *(q, cache, cache, of_each, None, None, None), kv_rows=of_each, block_kv=None, scale=1.0
    ).compile()
    row_bytes = 2**16 * 64 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * row_bytes / 4


def test_batching_by_vmap_equals_a_loop():
    case = Case(dtype="float32", H=8, S=40, lengths=(40, 11, 0), block_kv=8)
    given = operands(case)

    def one(given: Operands) -> tuple[jax.Array, jax.Array]:
        return jax.tree.map(lambda x: x[0], run(case, jax.tree.map(lambda x: x[None], given)))

    for one_by_one, batched in zip(jax.vmap(one)(given), run(case, given), strict=True):
        np.testing.assert_allclose(one_by_one, batched, atol=1e-6)


def test_the_scale_is_that_of_the_head_dim_unless_given():
    case = Case(dtype="float32", H=16, S=20, lengths=(20,))
    given = operands(case)
    arguments = given.q, given.k, given.v
    default = decode_attention(*arguments, kv_lengths=given.lengths)
    same = decode_attention(*arguments, kv_lengths=given.lengths, scale=0.25)
    other = decode_attention(*arguments, kv_lengths=given.lengths, scale=0.5)
    np.testing.assert_array_equal(default[0], same[0])
    assert np.abs(default[0] - other[0]).max() > 0.01


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["kv_indices"], "kv_num_blocks and block_kv missing: pass all of kv_indices, "),
        (["kv_indices", "kv_num_blocks"], "block_kv missing: pass all of "),
        (["block_kv"], "kv_indices and kv_num_blocks missing: pass all of "),
    ],
    ids="-".join,
)
def test_half_of_a_list_raises(names: list[str], message: str):
    x = jnp.zeros((1, 8, 1, 8))
    indices, counts = block_lists.from_dense(jnp.ones((1, 1, 2), bool))
    lists = {"kv_indices": indices, "kv_num_blocks": counts, "block_kv": 4}
    given = {name: lists[name] for name in names}
    with pytest.raises(ValueError, match=message):
        decode_attention(x[:, :1], x, x, kv_lengths=jnp.array([8]), **given)


def test_a_cache_of_other_rows_than_sequences_raises():
    x = jnp.zeros((3, 8, 1, 8))
    with pytest.raises(ValueError, match=r"k.shape=\(3, 8, 1, 8\) has 3 rows for 2 seq"):
        decode_attention(x[:2, :1], x, x, kv_lengths=jnp.array([8, 8]))


def test_an_unknown_backend_is_refused():
    x = jnp.zeros((1, 8, 1, 8))
    with pytest.raises(UnsupportedError, match="backend='cudnn': this op has mosaic_sm90, xla"):
        decode_attention(x[:, :1], x, x, kv_lengths=jnp.array([8]), backend="cudnn")
