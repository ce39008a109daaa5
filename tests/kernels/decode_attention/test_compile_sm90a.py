"""The Hopper kernels, with every choice of tiles, compile without a spill; no GPU needed."""

import jax
import pytest

from tests.kernels.decode_attention import programs


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_lowers_for_cuda(name: str):
    """Layouts agree and shared memory suffices."""
    function, arguments = programs.PROGRAMS[name]
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_compiles_without_a_spill(compiled: dict[str, dict[str, int]], name: str):
    assert compiled[name]["kernels"] == 2  # the attention and the merge
    assert compiled[name]["spilled"] == 0
    assert compiled[name]["serialized"] == 0
