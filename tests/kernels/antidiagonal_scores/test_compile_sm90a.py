"""The Hopper kernels, with every choice of tiles, compile without a spill; no GPU needed."""

import jax
import pytest

from tests.kernels.antidiagonal_scores import programs


@pytest.mark.parametrize(
    "name",
    [
        name if index % 3 == 0 else pytest.param(name, marks=pytest.mark.full)
        for index, name in enumerate(programs.PROGRAMS)
    ],
)
def test_lowers_for_cuda(name: str):
    """Layouts agree and shared memory suffices."""
    function, arguments = programs.PROGRAMS[name]
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == programs.KERNELS


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_compiles_without_a_spill(compiled: dict[str, dict[str, int]], name: str):
    assert compiled[name]["kernels"] == programs.KERNELS
    assert compiled[name]["spilled"] == 0
    assert compiled[name]["serialized"] == 0
