"""The choice of a backend: a named one runs or raises, None takes the first that can."""

import jax
import jax.numpy as jnp
import pytest

from sparseattn_jax.kernels.backends import (
    DeviceFacts,
    Implementation,
    UnsupportedError,
    choose,
    device_facts,
    never_refuses,
)

TABLE = {
    "mosaic_sm90": Implementation(
        lambda: "mosaic", lambda facts: None if facts == "hopper" else f"needs hopper, got {facts}"
    ),
    "xla": Implementation(lambda: "xla", never_refuses),
}


@pytest.mark.parametrize(("facts", "expected"), [("hopper", "mosaic"), ("cpu", "xla")])
def test_none_takes_the_first_that_does_not_refuse(facts: str, expected: str):
    assert choose(TABLE, None, facts).run() == expected


def test_a_named_backend_runs_although_a_better_one_could():
    assert choose(TABLE, "xla", "hopper").run() == "xla"


def test_a_named_backend_that_refuses_raises_its_reason():
    with pytest.raises(UnsupportedError, match="mosaic_sm90: needs hopper, got cpu"):
        choose(TABLE, "mosaic_sm90", "cpu")


def test_a_backend_that_the_op_has_not_raises_what_there_is():
    with pytest.raises(UnsupportedError, match="'cudnn': this op has mosaic_sm90, xla"):
        choose(TABLE, "cudnn", "cpu")


def test_facts_of_a_concrete_and_of_a_traced_operand():
    cpu = DeviceFacts(platform="cpu", compute_capability=None)
    seen = []

    @jax.jit
    def traced(x: jax.Array) -> jax.Array:
        seen.append(device_facts(x))
        return x

    traced(jnp.ones(3))
    assert [device_facts(jnp.ones(3)), *seen] == [cpu, cpu]
