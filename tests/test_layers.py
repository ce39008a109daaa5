"""Imports point one way: train -> models -> sparseattn_jax -> kernels."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "sparseattn_jax": {"sparseattn_jax", "kernels"},
    "models": {"models", "sparseattn_jax", "kernels"},
    "train": {"train", "models", "sparseattn_jax", "kernels"},
}
NEVER = {"benchmarks", "tests", "torch", "transformers"}
FILES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]
STRATEGIES = sorted((ROOT / "sparseattn_jax" / "strategies").glob("[!_]*.py"))


def imported_names(source: str) -> set[str]:
    """Dotted names of what the source imports; of `from a import b` the name is a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            names |= {f"{parent}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def forbidden_imports(folder: str, source: str) -> set[str]:
    """Names that a file of this folder must not import."""
    forbidden = set()
    for name in imported_names(source):
        head, *rest = name.split(".")
        if head == "sparseattn_jax":
            layer = rest[0] if rest and rest[0] in MAY_IMPORT else "sparseattn_jax"
            is_fine = layer in MAY_IMPORT[folder]
        else:
            # A bare `kernels` is a second copy of the module; head is "" if relative.
            is_fine = head != "" and head not in NEVER and head not in MAY_IMPORT
        if not is_fine:
            forbidden.add(name)
    return forbidden


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: pathlib.Path) -> None:
    assert not forbidden_imports(path.relative_to(ROOT).parts[0], path.read_text())


@pytest.mark.parametrize(
    ("folder", "statement"),
    [
        ("kernels", "import sparseattn_jax"),
        ("kernels", "from sparseattn_jax import BlockMask"),
        ("kernels", "from sparseattn_jax.block_mask import BlockMask"),
        ("sparseattn_jax", "from sparseattn_jax import train"),
        ("sparseattn_jax", "import sparseattn_jax.models.llama"),
        ("models", "from sparseattn_jax.train.config import TrainConfig"),
        ("models", "def f():\n    from sparseattn_jax import train"),
        ("sparseattn_jax", "import models"),
        ("train", "import kernels.backends as backends"),
        ("train", "from models.llama import Llama"),
        ("train", "from . import config"),
        ("train", "from tests.oracles import attention"),
        ("models", "import torch.nn"),
    ],
)
def test_planted_violations_are_seen(folder: str, statement: str) -> None:
    assert forbidden_imports(folder, statement)


@pytest.mark.parametrize(
    ("folder", "statement"),
    [
        ("kernels", "from sparseattn_jax import kernels"),
        ("sparseattn_jax", "from sparseattn_jax.kernels.backends import choose"),
        ("models", "import sparseattn_jax"),
        ("train", "from sparseattn_jax import models"),
    ],
)
def test_imports_downwards_are_fine(folder: str, statement: str) -> None:
    assert not forbidden_imports(folder, statement)


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda path: path.name)
def test_strategies_do_not_import_each_other(path: pathlib.Path) -> None:
    prefix = "sparseattn_jax.strategies."
    names = {name for name in imported_names(path.read_text()) if name.startswith(prefix)}
    assert {name.removeprefix(prefix).split(".")[0] for name in names} <= {"protocol"}
