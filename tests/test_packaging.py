"""The package, its lock and its scripts agree with the tree and with the README."""

import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    """A package that the table omits works in an editable install and is absent from the wheel."""
    table = PYPROJECT["tool"]["setuptools"]
    folders = {"sparseattn_jax": "sparseattn_jax", **table["package-dir"]}
    found = {
        ".".join([name, *path.parent.relative_to(ROOT / folder).parts])
        for name, folder in folders.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(table["packages"])


def test_every_package_folder_has_an_init() -> None:
    """A folder of modules without one is no package, so no wheel would hold it."""
    tops = ("sparseattn_jax", "kernels", "models", "train")
    folders = {path.parent for top in tops for path in (ROOT / top).rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_package_data_reaches_the_wheel() -> None:
    """Files beside the code match a pattern of the package-data table."""
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["sparseattn_jax.train"]
    train = ROOT / "train"
    listed = {path for pattern in patterns for path in train.glob(pattern)}
    data = {
        path
        for path in train.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert data <= listed


@pytest.mark.parametrize("line", (ROOT / "requirements.lock").read_text().splitlines())
def test_lock_holds_versions_only(line: str) -> None:
    assert re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.]+", line)


def test_lock_holds_every_requirement() -> None:
    locked = {line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().split()}
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    required = project["dependencies"] + extras["test"] + extras["lint"]
    assert {re.split(r"[\[<>=]", name)[0] for name in required} <= locked


def test_ci_runs_the_lines_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    main_line, test_line = (
        line.split(" && ")
        for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
        for line in block.splitlines()
    )
    # The tests' environment has all that the main job needs.
    assert main_line[1] == test_line[1].replace("'.[test]'", ".")
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    for part in [*test_line, main_line[2]]:
        assert any(line.startswith(part) for line in script), part
