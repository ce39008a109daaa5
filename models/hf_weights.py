"""Checkpoints of LLaMA, Mistral, Qwen2 and Qwen3 in Hugging Face's format: read and written.

A folder holds config.json and one model.safetensors, or several files that
model.safetensors.index.json lists. Reading fails closed: a tensor that the model lacks, or that the
folder does, is an error that names it, and so is a setting that is not known (hf_config.py).
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import PyTree

from sparseattn_jax.models import hub
from sparseattn_jax.models.config import LlamaConfig
from sparseattn_jax.models.hf_config import config_from_hf as config_from_hf
from sparseattn_jax.models.hf_config import config_to_hf as config_to_hf
from sparseattn_jax.models.llama import Llama, abstract
from sparseattn_jax.models.weights import name_of

type Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MODULES = {
    "embedding": "model.embed_tokens",
    "head": "lm_head",
    "final_norm": "model.norm",
    "layers.attention_norm": "model.layers.{}.input_layernorm",
    "layers.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers.attention.query": "model.layers.{}.self_attn.q_proj",
    "layers.attention.key": "model.layers.{}.self_attn.k_proj",
    "layers.attention.value": "model.layers.{}.self_attn.v_proj",
    "layers.attention.output": "model.layers.{}.self_attn.o_proj",
    "layers.attention.query_norm": "model.layers.{}.self_attn.q_norm",
    "layers.attention.key_norm": "model.layers.{}.self_attn.k_norm",
    "layers.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "layers.mlp.up": "model.layers.{}.mlp.up_proj",
    "layers.mlp.down": "model.layers.{}.mlp.down_proj",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Tables of rotary frequencies that old versions of transformers saved; config.json has them too.
_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_DTYPES = ("F32", "BF16", "F16")


@dataclasses.dataclass(frozen=True)
class _Place:
    """A parameter of the model, and the tensors of a checkpoint that it is made of.

    Attributes:
        path: in the model.
        shape: in the model, layers first if there are several tensors.
        names: of the tensors: one per layer, or a single one.
        is_stacked: the first axis is that of the layers.
        is_transposed: kernels are [in, out] here and [out, in] there.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    is_stacked: bool
    is_transposed: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of each of its tensors."""
        shape = self.shape[1:] if self.is_stacked else self.shape
        return shape[::-1] if self.is_transposed else shape


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of a checkpoint.

    A file is opened for each reading: what it maps into memory counts as the process's until it is
    closed, and one tensor is little.
    """

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        with _opened(self.file) as file:
            return file.get_slice(self.name)[index]


def read_config(
    source: str | pathlib.Path, *, dtype: DTypeLike = jnp.bfloat16, revision: str | None = None
) -> LlamaConfig:
    """The shape of a checkpoint's model; arguments and errors as of `load`."""
    return _config(hub.folder_of(source, revision=revision), dtype)


def load(
    source: str | pathlib.Path,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    shardings: Shardings | None = None,
    revision: str | None = None,
) -> Llama:
    """The model of a checkpoint, each part read straight to where it belongs.

    All is checked before a weight is read. The largest parameters are read first, and the host
    holds one stack of all layers' at a time beside what is on its devices.

    Args:
        source: a folder, or `organisation/name` on Hugging Face's hub.
        dtype: of the parameters and of the computation, whatever that of the files.
        shardings: from a parameter's path, as `layers.attention.key.kernel`, and its shape to its
            sharding, of which each process reads its own part; the default device unless given.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: there is no such checkpoint, or it is not wholly of a model known here.
    """
    folder = hub.folder_of(source, revision=revision)
    config = _config(folder, dtype)
    graphdef, shapes = abstract(config)
    places = _places(config, shapes)
    tensors = _matched(folder, config, places, _tensors(folder))
    arrays = {
        place.path: _read(place, tensors, config.param_dtype, shardings)
        for place in sorted(places, key=lambda place: -math.prod(place.shape))
    }
    state = jax.tree.map_with_path(lambda key, _: arrays[name_of(key)], shapes)
    return nnx.merge(graphdef, nnx.State(state))


def save(model: Llama, folder: str | pathlib.Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes a checkpoint that `load` and transformers read.

    Args:
        model: the model.
        folder: made if it is not there; it must not hold a checkpoint.
        max_shard_bytes: of tensors in one file, unless a single one is larger.

    Raises:
        ValueError: the folder holds a checkpoint, or Hugging Face has no model of this kind.
    """
    folder = pathlib.Path(folder)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
    settings = config_to_hf(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    if there := sorted([*folder.glob("*.safetensors*"), *folder.glob("config.json")]):
        raise ValueError(f"{folder} holds {there[0].name}; save into a folder without a checkpoint")
    params = {
        name_of(key): leaf
        for key, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    }
    shards = _shards(_places(model.config, abstract(model.config)[1]), params, max_shard_bytes)
    files, weight_map = _shard_names(len(shards)), {}
    for file, shard in zip(files, shards, strict=True):
        arrays = {name: _tensor_of(params[place.path], place, i) for name, place, i in shard}
        safetensors.numpy.save_file(arrays, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
    if len(files) > 1:
        total = sum(leaf.nbytes for leaf in params.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    # Last, because without it nothing loads: a folder that was left half written is refused.
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _config(folder: pathlib.Path, dtype: DTypeLike) -> LlamaConfig:
    path = folder / "config.json"
    settings = hub.read_json(path)
    try:
        return config_from_hf(settings, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _places(config: LlamaConfig, shapes: PyTree) -> list[_Place]:
    """Where the parameters of a model come from."""
    places = []
    for key, leaf in jax.tree.leaves_with_path(shapes):
        path = name_of(key)
        module, _, last = path.rpartition(".")
        pattern = f"{_MODULES[module]}.{_LEAVES[last]}" if module else f"{_MODULES[path]}.weight"
        is_stacked = "{}" in pattern
        names = [pattern.format(layer) for layer in range(config.num_layers)]
        places.append(
            _Place(
                path=path,
                shape=leaf.shape,
                names=tuple(names if is_stacked else names[:1]),
                is_stacked=is_stacked,
                is_transposed=last == "kernel",
            )
        )
    return places


def _tensors(folder: pathlib.Path) -> dict[str, _Tensor]:
    """The tensors of a checkpoint by name, from the heads of its files.

    Raises:
        ValueError: a file is missing, broken, or does not hold what the index says.
    """
    if not (folder / _INDEX).is_file():
        if not (folder / _SINGLE).is_file():
            raise ValueError(
                f"{folder} holds neither {_SINGLE} nor {_INDEX}; weights in other formats are not "
                "read"
            )
        return _tensors_of(folder / _SINGLE)
    weight_map = hub.read_json(folder / _INDEX).get("weight_map")
    is_map = isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())
    if not is_map or not weight_map:
        raise ValueError(f"{folder / _INDEX} lacks its weight_map, from tensors to files")
    tensors = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}, which {_INDEX} lists")
        found = _tensors_of(folder / name)
        listed = {tensor for tensor, file in weight_map.items() if file == name}
        if odd := sorted(listed ^ found.keys()):
            raise ValueError(f"{folder / name} and {_INDEX} disagree about {_some(odd)}")
        tensors |= found
    return tensors


def _tensors_of(path: pathlib.Path) -> dict[str, _Tensor]:
    """The tensors of one file."""
    tensors = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118  (a file is no mapping)
            part = file.get_slice(name)
            if _DERIVED.fullmatch(name):
                continue
            if part.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"{path}: {name} is {part.get_dtype()}; tensors must be {', '.join(_DTYPES)}"
                )
            tensors[name] = _Tensor(path, name, tuple(part.get_shape()))
    return tensors


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    """A file of tensors, whose length its head must account for."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def _matched(
    folder: pathlib.Path,
    config: LlamaConfig,
    places: Sequence[_Place],
    tensors: dict[str, _Tensor],
) -> dict[str, _Tensor]:
    """The tensors that the parameters are read from, if they are those of the model.

    Raises:
        ValueError: some are missing, left over, or of another shape.
    """
    shapes = {name: place.tensor_shape for place in places for name in place.names}
    has_copy = config.tie_embeddings and _HEAD in tensors
    if has_copy:
        shapes[_HEAD] = shapes[_EMBEDDING]
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise ValueError(f"{folder} lacks {_some(missing)}")
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise ValueError(f"{folder} holds {_some(unknown)}, which the model of its config lacks")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{tensors[name].file}: {name} has shape {tensors[name].shape}; by config.json it "
                f"is {shape}"
            )
    if has_copy and not _are_equal(tensors[_HEAD], tensors[_EMBEDDING]):
        raise ValueError(
            f"{folder}: config.json ties {_HEAD} to {_EMBEDDING}, but they differ; set "
            "tie_word_embeddings to false"
        )
    return tensors


def _are_equal(a: _Tensor, b: _Tensor) -> bool:
    """Whether two tensors of one shape hold the same."""
    rows_at_a_time = 4096
    starts = range(0, a.shape[0], rows_at_a_time)
    stretches = [(slice(i, min(i + rows_at_a_time, a.shape[0])),) for i in starts]
    return all(np.array_equal(a.read(rows), b.read(rows)) for rows in stretches)


def _read(
    place: _Place,
    tensors: dict[str, _Tensor],
    dtype: DTypeLike,
    shardings: Shardings | None,
) -> jax.Array:
    """A parameter on its devices."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        inner = index[1:] if place.is_stacked else index
        names = place.names[index[0]] if place.is_stacked else place.names
        extents = [
            len(range(*axis.indices(size))) for axis, size in zip(index, place.shape, strict=True)
        ]
        out = np.empty(extents, dtype)
        for row, name in zip(out if place.is_stacked else [out], names, strict=True):
            # A single assignment turns and rounds: nothing of the tensor's size lies between.
            if place.is_transposed:
                row.T[...] = tensors[name].read(inner[::-1])
            else:
                row[...] = tensors[name].read(inner)
        return out

    if shardings is None:
        array = jnp.asarray(part((slice(None),) * len(place.shape)))
    else:
        sharding = shardings(place.path, place.shape)
        # One reading of a part that several devices hold.
        array = jax.make_array_from_callback(place.shape, sharding, functools.cache(part))
    # Else the host would hold all that is under way to a device.
    return array.block_until_ready()


def _shards(
    places: Sequence[_Place], params: dict[str, jax.Array], max_bytes: int
) -> list[list[tuple[str, _Place, int]]]:
    """Tensors as (name, place, layer), by the file they go to."""
    shards, size = [[]], 0
    for place in places:
        num_bytes = params[place.path].nbytes // len(place.names)
        for layer, name in enumerate(place.names):
            if shards[-1] and size + num_bytes > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append((name, place, layer))
            size += num_bytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [_SINGLE]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def _tensor_of(param: jax.Array, place: _Place, layer: int) -> np.ndarray:
    """A tensor of a checkpoint, from the parameter that holds it."""
    tensor = np.asarray(param[layer] if place.is_stacked else param)
    return np.ascontiguousarray(tensor.T if place.is_transposed else tensor)


def _some(names: Sequence[str]) -> str:
    """The names, or of many the first."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
