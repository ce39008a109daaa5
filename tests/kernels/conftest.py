"""What the kernels' tests share: compiling them without a GPU, and the GPU that others need."""

import pytest

from sparseattn_jax.kernels.backends import device_facts, hopper_refusal
from tests.kernels.compile_sm90a import compile_programs


def pytest_addoption(parser: pytest.Parser) -> None:
    """Read by the tests named test_compile_*; give it with `tests/kernels` as pytest's path."""
    parser.addoption(
        "--aot-python",
        help="A Python that compiles kernels to sm_90a without a GPU: an environment of its own "
        "with this package and `pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`, both of "
        "jax's version, and ptxas of CUDA 13 on the PATH. (In the environment of the tests the "
        "plugin would log a failed start of CUDA at every run.)",
    )


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, int]]:
    """Registers and spills of each of the test module's `programs`."""
    folder = tmp_path_factory.mktemp("ptxas")
    return compile_programs(request.module.programs, request.config, folder)


@pytest.fixture(autouse=True)
def needs_a_hopper_gpu(request: pytest.FixtureRequest) -> None:
    """Skips what is marked `gpu` elsewhere."""
    if request.node.get_closest_marker("gpu") and (reason := hopper_refusal(device_facts())):
        pytest.skip(f"mosaic_sm90 {reason}")
