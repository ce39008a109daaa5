"""Every config that is proposed lowers, and compiles without a spill; no GPU needed."""

import jax
import pytest

from tests.kernels import candidate_programs as programs


@pytest.mark.parametrize(
    "name",
    [
        name if name in programs.BY_DEFAULT else pytest.param(name, marks=pytest.mark.full)
        for name in programs.PROGRAMS
    ],
)
def test_lowers_for_cuda(name: str):
    """Layouts agree and shared memory suffices."""
    function, arguments = programs.PROGRAMS[name]
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.full
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_compiles_without_a_spill(compiled: dict[str, dict[str, int]], name: str):
    assert compiled[name]["spilled"] == 0
