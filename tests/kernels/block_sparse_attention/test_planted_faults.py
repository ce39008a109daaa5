"""Faults of synchronisation, planted in the Hopper kernel, are seen by race or by value."""

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparseattn_jax.kernels.block_sparse_attention import mosaic_sm90
from sparseattn_jax.kernels.mosaic import Ring
from tests.kernels.block_sparse_attention.cases import Case, assert_right, call, operands
from tests.kernels.faulty_rings import (
    FilledWithoutWait,
    FreedOnArrival,
    FreedWhileRead,
    ReadWithoutWait,
    plant,
)
from tests.kernels.mosaic_interpret import interpret, is_fault_seen

# One worker with two query tiles of four steps each: every slot is used again.
CASE = Case(H=256, block_q=64, block_kv=64, T=64, S=256, is_causal=False, density=1.0)


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_sm90, "multiprocessors", lambda *_: 1)


def is_seen() -> bool:
    """Whether threads raced, missed the completion of a barrier, or the results are wrong."""
    given = operands(CASE)

    def check() -> bool:
        (out, lse), raced = interpret(call, mosaic_sm90.run, CASE, given)
        assert_right(CASE, given, out, lse)
        return raced

    return is_fault_seen(check)


def test_without_a_fault_nothing_is_seen():
    assert not is_seen()


FAULTS = [
    ("k", FreedWhileRead),
    ("v", FreedWhileRead),
    ("q", FreedOnArrival),
    ("k", ReadWithoutWait),
    ("v", ReadWithoutWait),
    ("k", FilledWithoutWait),
    pytest.param("q", ReadWithoutWait, marks=pytest.mark.full),
    pytest.param("q", FilledWithoutWait, marks=pytest.mark.full),
    pytest.param("v", FilledWithoutWait, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("ring", "fault"), FAULTS)
def test_a_faulty_ring_is_seen(monkeypatch: pytest.MonkeyPatch, ring: str, fault: type[Ring]):
    plant(monkeypatch, ring, fault)
    assert is_seen()


def test_a_missing_commit_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    assert is_seen()
