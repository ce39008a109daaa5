"""Weights of a small model in one .npz: float16 arrays by path, and the model's shape."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from sparseattn_jax import models
from sparseattn_jax.models import weights as model_weights
from sparseattn_jax.train import gated_model
from sparseattn_jax.train.config import InvalidRunError

# They say how to compute, not which model it is.
_NOT_SHAPE = ("dtype", "param_dtype")


def save(path: pathlib.Path, config: models.LlamaConfig, weights: PyTree) -> None:
    """Writes the file whole or not at all."""
    arrays: dict[str, Any] = {
        model_weights.name_of(key): np.asarray(leaf, np.float16)
        for key, leaf in jax.tree.leaves_with_path(weights)
    }
    unfinished = path.with_suffix(".unfinished.npz")
    np.savez(unfinished, **{model_weights.CONFIG: np.array(json.dumps(_shape(config)))}, **arrays)
    unfinished.replace(path)


def load(path: pathlib.Path, config: models.LlamaConfig) -> PyTree:
    """The weights in float32, as nested dictionaries.

    Raises:
        InvalidRunError: the file is no such .npz, or of a model of another shape.
    """
    try:
        stored, arrays = model_weights.read(path)
    except ValueError as error:
        raise InvalidRunError(f"{path} holds no weights that a run wrote: {error}") from error
    wanted = _shape(config)
    for name in wanted | stored:
        if stored.get(name) != wanted.get(name):
            raise InvalidRunError(
                f"{path} is of a model with {name} {stored.get(name)}, and the run's model has "
                f"{wanted.get(name)}; set model.{name} to the former or take other weights"
            )
    try:
        return model_weights.fill(path, gated_model.weight_shapes(config), arrays)
    except ValueError as error:
        raise InvalidRunError(str(error)) from error


def _shape(config: models.LlamaConfig) -> dict[str, Any]:
    """The fields as JSON has them, without those at their defaults, which older files lack."""
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _NOT_SHAPE and getattr(config, field.name) != field.default
    }
    return json.loads(json.dumps(values))
