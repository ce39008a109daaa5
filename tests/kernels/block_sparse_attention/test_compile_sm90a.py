"""The Hopper kernel, with every choice of tiles, compiles without a spill; no GPU needed."""

import jax
import pytest

from tests.kernels.block_sparse_attention import programs

# What windows add is the same for every choice of tiles.
LOWERED = [
    pytest.param(name, marks=pytest.mark.full)
    if name.endswith("windows") and "H128-128x128" not in name
    else name
    for name in programs.PROGRAMS
]


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name: str):
    """Layouts agree and shared memory suffices."""
    function, arguments = programs.PROGRAMS[name]
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_compiles_without_a_spill(compiled: dict[str, dict[str, int]], name: str):
    assert compiled[name]["kernels"] == 1
    assert compiled[name]["spilled"] == 0
    assert compiled[name]["serialized"] == 0
