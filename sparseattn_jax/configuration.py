"""Strategies in JSON: which one, with what parameters, and in which layers it is another.

    {
        "strategy": "xattention",
        "threshold": 0.9,
        "stride": 16,
        "layers": {"0-1": {"strategy": "full"}, "31": {"threshold": 0.95}}
    }

`strategy` is a name of the registry, `layers` maps one layer or a range, both ends included, to
what is different there; every other key is a field of the strategy, whose default holds where it
is absent. An array is a list of numbers, None is null, and a strategy within a strategy an object
that names it. A layer that names a strategy inherits nothing, any other inherits the parameters
above.

Without `strategy` the caller names one. Then the keys of SparseAttn's configuration (`stride`,
`threshold`, `block_size`, `sparsity_ratio`, `adaptive_budget`) may all be there: those that the
named strategy has no field for are ignored, each with a warning. Any other unknown key is an error.

Ranges of values are checked where the operands are known, in `select`.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import types
import typing
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseattn_jax.strategies import STRATEGIES
from sparseattn_jax.strategies.protocol import Strategy

_SHARED_KEYS = ("stride", "threshold", "block_size", "sparsity_ratio", "adaptive_budget")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """The strategy of every layer of a model.

    Attributes:
        strategy: of all layers but those below.
        layers: the strategies of single layers, counted from 0.
    """

    strategy: Strategy
    layers: Mapping[int, Strategy] = dataclasses.field(default_factory=dict)

    def of_layer(self, index: int) -> Strategy:
        """The strategy of one layer."""
        return self.layers.get(index, self.strategy)


def load(path: str | pathlib.Path, *, strategy: str | None = None) -> Configuration:
    """Reads a JSON file; see `from_dict`."""
    try:
        settings = json.loads(pathlib.Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return from_dict(_object(str(path), settings), strategy=strategy)


def save(configuration: Configuration, path: str | pathlib.Path) -> None:
    """Writes a JSON file that `load` reads back as the same configuration."""
    pathlib.Path(path).write_text(json.dumps(to_dict(configuration), indent=4) + "\n")


def from_dict(settings: Mapping[str, Any], *, strategy: str | None = None) -> Configuration:
    """The configuration that parsed JSON describes; see the module for its keys.

    Args:
        settings: what the JSON says.
        strategy: name of the strategy, for settings that name none.

    Raises:
        ValueError: a key or a value is none that the strategy takes, layers are given twice, or
            the strategy is not named, not known, or named differently.
    """
    settings = dict(settings)
    layers = _object("layers", settings.pop("layers", {}))
    named = settings.pop("strategy", None)
    if named is None and strategy is None:
        raise ValueError(f"the settings name no strategy; add the key or pass {_names()}")
    if named is not None and strategy not in (None, named):
        raise ValueError(f"strategy={strategy!r}, but the settings name {named!r}; leave one out")
    name = strategy if named is None else named
    ignored = () if named else _SHARED_KEYS
    settings = _without(ignored, name, settings)
    of_layers: dict[int, Strategy] = {}
    for key, changes in layers.items():
        where = f"layers[{key!r}]"
        changes = dict(_object(where, changes))
        if "strategy" in changes:
            layer = _strategy(changes.pop("strategy"), changes, f"{where}: ")
        else:
            layer = _strategy(name, settings | _without(ignored, name, changes), f"{where}: ")
        for index in _layer_range(str(key)):
            if index in of_layers:
                raise ValueError(f"{where}: layer {index} is there twice; leave one out")
            of_layers[index] = layer
    return Configuration(strategy=_strategy(name, settings), layers=of_layers)


def to_dict(configuration: Configuration) -> dict[str, Any]:
    """What `from_dict` makes the same configuration of, ready for JSON; states every field."""
    settings = _settings(configuration.strategy)
    if configuration.layers:
        settings["layers"] = {
            str(index): _settings(layer) for index, layer in sorted(configuration.layers.items())
        }
    return settings


def _settings(strategy: Strategy) -> dict[str, Any]:
    for name, cls in STRATEGIES.items():
        if type(strategy) is cls:
            return {"strategy": name, **_encode_fields(strategy)}
    raise ValueError(f"{type(strategy).__name__} is not registered; use {_names()}")


def _encode(value: Any) -> Any:
    """Strategies and other dataclasses as objects, arrays as lists."""
    if isinstance(value, Strategy):
        return _settings(value)
    if dataclasses.is_dataclass(value):
        return _encode_fields(value)
    return None if value is None else np.asarray(value).tolist()


def _encode_fields(value: Any) -> dict[str, Any]:
    return {name: _encode(getattr(value, name)) for name in _fields(type(value))}


def _strategy(name: object, settings: Mapping[str, Any], where: str = "") -> Strategy:
    return _decode(_class_of(name), settings, where)


def _class_of(name: object) -> type[Strategy]:
    if not isinstance(name, str) or name not in STRATEGIES:
        raise ValueError(f"strategy={name!r} is not known; use {_names()}")
    return STRATEGIES[name]


def _names() -> str:
    return "strategy= one of " + ", ".join(STRATEGIES)


def _without(ignored: tuple[str, ...], name: object, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings less those of `ignored` that the strategy has no field for."""
    fields = _fields(_class_of(name))
    surplus = [key for key in settings if key in ignored and key not in fields]
    for key in surplus:
        warnings.warn(
            f"{key}={settings[key]} is ignored: {name} has no such parameter", stacklevel=3
        )
    return {key: value for key, value in settings.items() if key not in surplus}


def _object(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, not {value!r}")
    return value


def _layer_range(key: str) -> range:
    """The layers of a key like "3" or "0-1"."""
    first, _, last = key.partition("-")
    if not re.fullmatch(r"\d+(-\d+)?", key) or int(last or first) < int(first):
        raise ValueError(f'layers[{key!r}] must be a layer, like "3", or a range, like "0-1"')
    return range(int(first), int(last or first) + 1)


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def _decode[T](cls: type[T], settings: Mapping[str, Any], where: str) -> T:
    """A dataclass from an object of its fields."""
    fields = _fields(cls)
    for key in settings:
        if key not in fields:
            raise ValueError(
                f"{where}{key} is no parameter of {cls.__name__}; it has {', '.join(fields)}"
            )
    for key, field in fields.items():
        if key not in settings and field.default is dataclasses.MISSING:
            raise ValueError(f"{where}{key} of {cls.__name__} is missing")
    return cls(**{key: _value(fields[key].type, x, f"{where}{key}") for key, x in settings.items()})


def _value(annotation: Any, value: Any, where: str) -> Any:
    """What JSON says for a field of this type."""
    kinds: tuple[Any, ...] = typing.get_args(annotation) or (annotation,)
    objects = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    arrays = [kind for kind in kinds if hasattr(kind, "dtypes")]
    if Strategy in kinds and isinstance(value, dict) and "strategy" in value:
        settings = {key: x for key, x in value.items() if key != "strategy"}
        return _strategy(value["strategy"], settings, f"{where}.")
    if objects and isinstance(value, dict):
        return _decode(typing.cast(type, objects[0]), value, f"{where}.")
    if arrays and isinstance(value, list):
        dtype = arrays[0].dtypes[0]
        with contextlib.suppress(ValueError):  # of NumPy: the list is ragged
            values = np.asarray(value)
            if np.can_cast(values.dtype, dtype, "same_kind"):
                return jnp.asarray(values.astype(dtype))
    if type(value) is int and float in kinds and int not in kinds:
        return float(value)
    if type(value) in kinds:
        return value
    wanted = dict.fromkeys("an object" if kind in objects else _wanted(kind) for kind in kinds)
    raise ValueError(f"{where}={value!r} must be {' or '.join(wanted)}")


def _wanted(kind: Any) -> str:
    if kind in _KINDS:
        return _KINDS[kind]
    return "a list of true and false" if "bool" in kind.dtypes else "a list of numbers"


_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    types.NoneType: "null",
    Strategy: "an object that names a strategy",
}
