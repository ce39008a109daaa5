"""The settings of conftest.py and pyproject.toml hold, and each guard sees its planted fault."""

import pathlib
import shutil
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from sparseattn_jax.kernels import block_lists


def test_implicit_rank_promotion_raises() -> None:
    with pytest.raises(ValueError, match="rank"):
        jnp.add(jnp.zeros(2), jnp.zeros((2, 2)))


def test_implicit_dtype_promotion_raises() -> None:
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.add(jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.float32))


def test_there_are_eight_cpu_devices() -> None:
    assert len(jax.devices("cpu")) == 8


def test_properties_run_as_many_cases_as_the_profile_says(request: pytest.FixtureRequest) -> None:
    name = request.config.getoption("--hypothesis-profile") or "ci"
    profile = hypothesis.settings.get_profile(name)
    assert hypothesis.settings().max_examples == profile.max_examples


def test_another_checkout_is_refused(tmp_path: pathlib.Path) -> None:
    """pytest in a second checkout with this one installed would test this one."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    shutil.copy(pathlib.Path(__file__).with_name("conftest.py"), tmp_path)
    command = [sys.executable, "-P", "-m", "pytest", "--import-mode=importlib"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"run `pip install -e .` in {tmp_path}" in done.stderr


def test_shapes_are_checked_in_mapped_folders(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--jaxtyping-packages"):
        pytest.skip("needs --jaxtyping-packages=sparseattn_jax,beartype.beartype, as .ci/run has")
    with pytest.raises(TypeCheckError):
        block_lists.from_dense(jnp.zeros((2, 2), jnp.float32))
