"""A small model from one .npz: arrays by path, and the model's shape, as training writes them."""

import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import PyTree

from sparseattn_jax.models.config import LlamaConfig
from sparseattn_jax.models.llama import Llama, abstract

CONFIG = "config"
"""The entry of the file that holds the model's shape."""


def load(path: str | pathlib.Path, *, dtype: DTypeLike = jnp.float32) -> Llama:
    """The model in the file.

    Args:
        path: an .npz of one array per parameter, named by its path in the model, as
            `layers.attention.key.kernel`, and of `config`, the fields of `LlamaConfig` but its
            dtypes in JSON.
        dtype: of the parameters and of the computation.

    Raises:
        ValueError: the file is no such .npz, or lacks arrays of its model.
        OSError: there is no such file.
    """
    path = pathlib.Path(path)
    try:
        fields, arrays = read(path)
        config = LlamaConfig(**fields, dtype=dtype, param_dtype=dtype)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no model that training wrote: {error}") from error
    graphdef, shapes = abstract(config)
    return nnx.merge(graphdef, nnx.State(fill(path, shapes, arrays)))


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields of the model's config, and the arrays by name.

    Raises:
        ValueError: the file is no such .npz.
        OSError: there is no such file.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = dict(file.items())
        return json.loads(str(arrays.pop(CONFIG))), arrays
    except (KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(str(error)) from error


def fill(path: pathlib.Path, shapes: PyTree, arrays: Mapping[str, np.ndarray]) -> PyTree:
    """The arrays of the file, in the places and dtypes of a model's `shapes`.

    Raises:
        ValueError: they are not that model's.
    """
    wanted = {name_of(key): leaf.shape for key, leaf in jax.tree.leaves_with_path(shapes)}
    if wanted != {name: array.shape for name, array in arrays.items()}:
        odd = sorted(wanted.keys() ^ arrays.keys()) or "their shapes"
        raise ValueError(f"{path} does not hold the arrays of its own model; odd: {odd}")
    return jax.tree.map_with_path(
        lambda key, leaf: jnp.asarray(arrays[name_of(key)], leaf.dtype), shapes
    )


def name_of(key: tuple) -> str:
    """The name of a parameter's array, from its path in the model."""
    return jax.tree_util.keystr(key, simple=True, separator=".")
