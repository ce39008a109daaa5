"""The Hopper kernel, interpreted on the CPU with race detection; and planted faults."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from sparseattn_jax.kernels.backends import DeviceFacts, UnsupportedError
from sparseattn_jax.kernels.select_blocks import mosaic_sm90, select_blocks
from tests.kernels.mosaic_interpret import interpret
from tests.kernels.select_blocks.cases import Case, assert_right, call, operands

CASES = [
    Case(N=4),
    Case(B=2, N=4, Tb=5, Sb=70, per_sequence=True, per_head=True, max_blocks=7),
    Case(Sb=1100, Tb=2, sixteenths=False),
    Case(B=2, Sb=70, Tb=1, max_blocks=7),
]
FULL_CASES = [
    Case(N=4, max_blocks=3, per_head=True),
    Case(Sb=128, Tb=4, max_blocks=128, thresholds=(1.0, 0.99)),
    Case(B=2, Sb=1, Tb=1, per_sequence=True),
    Case(Sb=1030, Tb=3, max_blocks=40),
]


def check(case: Case) -> None:
    results, raced = interpret(lambda: call(mosaic_sm90.run.__wrapped__, case))
    assert_right(case, *results)
    assert not raced


@pytest.mark.parametrize(
    "case", CASES + [pytest.param(case, marks=pytest.mark.full) for case in FULL_CASES], ids=str
)
def test_lists_and_races(case: Case):
    check(case)


def cut_of_all_ties(self, threshold):
    """Keeps every block that is tied at the cut."""
    prefix = by_mass(self, threshold)
    return prefix._replace(ties=jnp.full_like(prefix.ties, 1000))


def forced_mass_ignored(self, threshold):
    """Searches among the unforced blocks alone for the whole mass."""
    masses = jnp.where(self.ranks >= 0, 0.0, self.masses)
    return by_mass(dataclasses.replace(self, masses=masses), threshold)


by_mass = mosaic_sm90._Search.by_mass


@pytest.mark.parametrize(
    "fault", [cut_of_all_ties, forced_mass_ignored], ids=lambda fault: fault.__name__
)
def test_a_faulty_search_is_seen(monkeypatch: pytest.MonkeyPatch, fault):
    monkeypatch.setattr(mosaic_sm90._Search, "by_mass", fault)
    with pytest.raises(AssertionError):
        check(Case(thresholds=(0.5, 0.8)))


HOPPER = DeviceFacts(platform="gpu", compute_capability=(9, 0))


@pytest.mark.parametrize(
    ("device", "num_columns", "reason"),
    [
        (DeviceFacts(platform="cpu", compute_capability=None), 8, "got no NVIDIA GPU"),
        (DeviceFacts(platform="gpu", compute_capability=(10, 0)), 8, "got 10.0"),
        (HOPPER, 8193, "needs rows of at most 8192 blocks, got 8193"),
    ],
    ids=["no-gpu", "blackwell", "long"],
)
def test_refusal(device: DeviceFacts, num_columns: int, reason: str):
    facts = mosaic_sm90.CallFacts(device=HOPPER, num_columns=8192)
    assert mosaic_sm90.refusal(facts) is None
    refused = dataclasses.replace(facts, device=device, num_columns=num_columns)
    assert reason in (mosaic_sm90.refusal(refused) or "")


def test_is_refused_without_a_hopper_gpu():
    arguments = [jnp.asarray(x) for x in operands(Case())]
    with pytest.raises(UnsupportedError, match="mosaic_sm90: needs compute capability 9"):
        jax.eval_shape(
            lambda *x: select_blocks(*x, max_blocks=None, backend="mosaic_sm90"), *arguments
        )
