"""The Hopper kernels, with every choice of tiles, compile without a spill; no GPU needed."""

import json
import os
import pathlib
import re
import shutil
import subprocess

import jax
import pytest

from tests.kernels import aot_compile
from tests.kernels.decode_attention import programs


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_lowers_for_cuda(name: str):
    """Layouts agree and shared memory suffices."""
    function, arguments = programs.PROGRAMS[name]
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, int]]:
    """Registers and spills of each program."""
    python = request.config.getoption("--aot-python", default=None)
    if python is None:
        pytest.skip(
            "needs --aot-python=PYTHON, the Python of an environment with jax-cuda13-plugin, "
            "jax-cuda13-pjrt and this package, with `tests/kernels` as pytest's path"
        )
    ptxas = shutil.which("ptxas")
    if ptxas is None or ptxas_version(ptxas) < (13, 0, 0):
        pytest.skip(f"needs ptxas of CUDA 13 or newer on the PATH, got {ptxas}: install CUDA 13")
    settings = {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_TO": str(tmp_path_factory.mktemp("ptxas")),
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }
    done = subprocess.run(
        [python, "-m", aot_compile.__name__, programs.__name__],
        cwd=request.config.rootpath,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {result.pop("name"): result for result in results}


def ptxas_version(ptxas: str | pathlib.Path) -> tuple[int, ...]:
    said = subprocess.run([ptxas, "--version"], stdout=subprocess.PIPE, text=True, check=True)
    found = re.search(r"V(\d+)\.(\d+)\.(\d+)", said.stdout)
    assert found is not None, said.stdout
    return tuple(int(part) for part in found.groups())


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_compiles_without_a_spill(compiled: dict[str, dict[str, int]], name: str):
    assert compiled[name]["kernels"] == 2  # the attention and the merge
    assert compiled[name]["spilled"] == 0
