"""The option for compiling kernels without a GPU."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Read by the tests named test_compile_*; give it with `tests/kernels` as pytest's path."""
    parser.addoption(
        "--aot-python",
        help="A Python that compiles kernels to sm_90a without a GPU: an environment of its own "
        "with this package and `pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`, both of "
        "jax's version, and ptxas of CUDA 13 on the PATH. (In the environment of the tests the "
        "plugin would log a failed start of CUDA at every run.)",
    )
