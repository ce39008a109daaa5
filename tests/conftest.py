"""Settings that hold for every test: strict arrays, eight CPU devices, the right checkout."""

import importlib
import pathlib
from collections.abc import Iterator

import hypothesis
import jax
import pytest

# flax, optax and jax.nn mix dtypes inside, so strict promotion cannot hold where they run.
MIXES_DTYPES = ("benchmarks", "models", "train")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

# `pytest --hypothesis-profile=full` is what .ci/full runs.
hypothesis.settings.register_profile(
    "ci", max_examples=10, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("full", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """Fails fast when the installed package is another checkout's."""
    for name in ("", ".kernels", ".models", ".train"):
        module = importlib.import_module(f"sparseattn_jax{name}")
        assert module.__file__ is not None
        if not pathlib.Path(module.__file__).is_relative_to(config.rootpath):
            raise pytest.UsageError(
                f"sparseattn_jax{name} is {module.__file__}; "
                f"run `pip install -e .` in {config.rootpath}"
            )


@pytest.fixture(autouse=True)
def strict_dtype_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """No implicit change of dtype in kernels/ and sparseattn_jax/: it would hide lost precision."""
    folder = request.path.relative_to(pathlib.Path(__file__).parent).parts[0]
    with jax.numpy_dtype_promotion("standard" if folder in MIXES_DTYPES else "strict"):
        yield
