"""Registers and spills of a module's programs, compiled for an H100 without a GPU."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import types

import pytest

from tests.kernels import aot_compile


def compile_programs(
    programs: types.ModuleType, config: pytest.Config, folder: pathlib.Path
) -> dict[str, dict[str, int]]:
    """What ptxas says of each program, by name; skips the test where nothing can compile."""
    python = config.getoption("--aot-python", default=None)
    if python is None:
        pytest.skip(
            "needs --aot-python=PYTHON, the Python of an environment with jax-cuda13-plugin, "
            "jax-cuda13-pjrt and this package, with `tests/kernels` as pytest's path"
        )
    ptxas = shutil.which("ptxas")
    if ptxas is None or _version(ptxas) < (13, 0, 0):
        pytest.skip(f"needs ptxas of CUDA 13 or newer on the PATH, got {ptxas}: install CUDA 13")
    settings = {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }
    done = subprocess.run(
        [python, "-m", aot_compile.__name__, programs.__name__],
        cwd=config.rootpath,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {result.pop("name"): result for result in results}


def _version(ptxas: str) -> tuple[int, ...]:
    said = subprocess.run([ptxas, "--version"], stdout=subprocess.PIPE, text=True, check=True)
    found = re.search(r"V(\d+)\.(\d+)\.(\d+)", said.stdout)
    assert found is not None, said.stdout
    return tuple(int(part) for part in found.groups())
