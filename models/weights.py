"""A small model from one .npz: arrays by path, and the model's shape, as training writes them."""

import json
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sparseattn_jax.models.config import LlamaConfig
from sparseattn_jax.models.llama import Llama


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
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = dict(file.items())
        fields = json.loads(str(arrays.pop("config")))
        config = LlamaConfig(**fields, dtype=dtype, param_dtype=dtype)
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no model that training wrote: {error}") from error
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(state)
    wanted = {_name(key): leaf.shape for key, leaf in jax.tree.leaves_with_path(shapes)}
    if wanted != {name: array.shape for name, array in arrays.items()}:
        odd = sorted(wanted.keys() ^ arrays.keys()) or "their shapes"
        raise ValueError(f"{path} does not hold the arrays of its own model; odd: {odd}")
    weights = jax.tree.map_with_path(
        lambda key, leaf: jnp.asarray(arrays[_name(key)], leaf.dtype), shapes
    )
    return nnx.merge(graphdef, nnx.State(weights))


def _name(key: tuple) -> str:
    return jax.tree_util.keystr(key, simple=True, separator=".")
