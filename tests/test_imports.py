"""What a plain `import sparseattn_jax` loads and does."""

import importlib.metadata
import subprocess
import sys

# What jax and jaxtyping load by themselves, Pallas included.
BASELINE = "import jax, jaxtyping; from jax.experimental.pallas import mosaic_gpu"
SETTINGS_KEPT = """
import os, jax
before = dict(os.environ), dict(jax.config.values)
import sparseattn_jax.kernels, sparseattn_jax.models, sparseattn_jax.train
assert before == (dict(os.environ), dict(jax.config.values))
assert not jax._src.xla_bridge.backends_are_initialized()
"""


def third_party_modules(program: str) -> set[str]:
    """Top-level modules of installed distributions that are loaded after the program."""
    program += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(run_python(program).split())
    return loaded & set(importlib.metadata.packages_distributions())


def run_python(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def test_import_loads_jax_and_jaxtyping_only() -> None:
    loaded = third_party_modules("import sparseattn_jax")
    assert {"jax", "jaxtyping"} <= loaded
    assert loaded - third_party_modules(BASELINE) <= {"sparseattn_jax"}


def test_importing_changes_no_setting_and_starts_no_device() -> None:
    run_python(SETTINGS_KEPT)
