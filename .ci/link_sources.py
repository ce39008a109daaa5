"""Builds .typings/, the package as one tree of links, for pyright and mypy.

The wheel maps kernels/, models/ and train/ into sparseattn_jax (pyproject.toml);
static checkers do not read that table, so they get the same view as links.
"""

import pathlib
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
    """Replaces the links of an earlier run."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ROOT / ".typings" / "sparseattn_jax"
    package.mkdir(parents=True, exist_ok=True)
    sources = {path.name: path for path in (ROOT / "sparseattn_jax").iterdir()}
    for name, folder in table["package-dir"].items():
        sources[name.rpartition(".")[2]] = ROOT / folder
    for link in package.iterdir():
        link.unlink()
    for name, source in sources.items():
        (package / name).symlink_to(source)


if __name__ == "__main__":
    main()
