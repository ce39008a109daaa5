"""The Hopper kernel, interpreted on the CPU with race detection, over all its options in pairs."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from sparseattn_jax.kernels.block_sparse_attention import mosaic_sm90, xla
from tests.kernels.block_sparse_attention.cases import (
    Case,
    Operands,
    assert_right,
    call,
    operands,
)
from tests.kernels.mosaic_interpret import interpret

# A search found these: with the further ones, as few as show every pair of values below.
CASES = [
    Case(T=77, S=201, N=4, B=2, lengths=(201, 150)),
    Case(H=64, K=2, T=67, S=221, shared=True),
    Case(block_q=64, block_kv=64, N=3, B=2, T=121, S=121, is_causal=False),
    Case(dtype="float16", H=256, N=4, B=2, T=128, S=128, shared=True, density=0.3),
    Case(
        H=256, block_kv=64, N=3, B=2, T=104, S=192, is_causal=False, shared=True, lengths=(162, 0)
    ),
    Case(
        dtype="float16",
        H=64,
        block_q=64,
        block_kv=64,
        N=4,
        B=2,
        T=73,
        S=89,
        is_causal=False,
        density=0.7,
    ),
    Case(
        dtype="float16", block_q=64, K=2, T=59, S=255, is_causal=False, shared=True, lengths=(244,)
    ),
    Case(block_kv=64, N=4, T=121, S=121, shared=True, density=0.3, lengths=(81,)),
    Case(
        dtype="float16",
        H=64,
        block_q=64,
        N=3,
        T=128,
        S=128,
        is_causal=False,
        density=0.7,
        lengths=(88,),
    ),
    Case(block_kv=64, N=3, T=216, S=224, is_causal=False, lengths=(184,)),
]
FURTHER_CASES = [
    Case(dtype="float16", H=256, block_q=64, block_kv=64, K=2, T=64, S=64, lengths=(53,)),
    Case(
        dtype="float16",
        H=256,
        block_q=64,
        block_kv=64,
        K=2,
        B=2,
        T=61,
        S=61,
        is_causal=False,
        shared=True,
        density=0.3,
    ),
    Case(H=64, block_q=64, block_kv=64, N=3, T=35, S=185, shared=True, lengths=(145,)),
    Case(H=64, block_kv=64, K=2, T=300, S=300, density=1.0),
    Case(dtype="float16", H=256, block_q=64, N=3, T=130, S=259),
    Case(T=256, S=384, N=4, B=2, density=0.6),
]

FULL_CASES = [pytest.param(case, marks=pytest.mark.full) for case in FURTHER_CASES]

VALUES = {
    "dtype": {"bfloat16", "float16"},
    "head_dim": {64, 128, 256},
    "block_q": {64, 128},
    "block_kv": {64, 128},
    "heads per kv head": {1, 3, 4},
    "several sequences": {False, True},
    "fewer queries than keys": {False, True},
    "odd length": {False, True},
    "shared lists": {False, True},
    "is_causal": {False, True},
    "kv_lengths": {False, True},
    "an empty list": {False, True},
    "a full list": {False, True},
}


def values(case: Case) -> dict[str, object]:
    """What a case has of `VALUES`."""
    blocks = np.asarray(operands(case).blocks)
    found = (
        case.dtype,
        case.H,
        case.block_q,
        case.block_kv,
        case.N // case.K,
        case.B > 1,
        case.T < case.S,
        case.T % 8 != 0,
        case.shared,
        case.is_causal,
        case.lengths is not None,
        bool((~blocks).all(axis=-1).any()),
        bool(blocks.all(axis=-1).any()),
    )
    return dict(zip(VALUES, found, strict=True))


def test_the_cases_show_every_pair_of_values():
    found = [values(case) for case in CASES + FURTHER_CASES]
    for one, other in itertools.combinations(VALUES, 2):
        pairs = set(itertools.product(VALUES[one], VALUES[other]))
        assert pairs == {(case[one], case[other]) for case in found}, (one, other)


def test_the_cases_show_every_shape_of_tiles():
    shapes = {(case.H, case.block_q, case.block_kv) for case in CASES + FURTHER_CASES}
    assert shapes == set(itertools.product((64, 128, 256), (64, 128), (64, 128)))


@pytest.fixture
def two_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that some workers have several query tiles."""
    monkeypatch.setattr(mosaic_sm90, "multiprocessors", lambda *_: 2)


@pytest.mark.usefixtures("two_multiprocessors")
@pytest.mark.parametrize("case", CASES + FULL_CASES, ids=str)
def test_values_and_races(case: Case):
    given = operands(case)
    (out, lse), raced = interpret(call, mosaic_sm90.run, case, given)
    assert_right(case, given, out, lse)
    assert not raced


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_xla_is_right_by_the_same_measure(case: Case):
    given = operands(case)
    assert_right(case, given, *call(xla.run, case, given))


@pytest.mark.usefixtures("two_multiprocessors")
def test_batching_by_vmap():
    case = Case(H=256, block_q=64, block_kv=64, T=64, S=128, B=2, lengths=(128, 70))
    given = operands(case)

    def one_sequence(given: Operands) -> tuple[jax.Array, jax.Array]:
        one = dataclasses.replace(case, B=1)
        batch_of_one = jax.tree.map(lambda x: x[None], given)
        return jax.tree.map(lambda x: x[0], call(mosaic_sm90.run, one, batch_of_one))

    (out, lse), raced = interpret(jax.vmap(one_sequence), given)
    assert_right(case, given, out, lse)
    assert not raced
