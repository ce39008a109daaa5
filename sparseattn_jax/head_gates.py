"""Gates of kv heads, DuoAttention's and PruLong's files of them, and which heads are to retrieve.

A gate says how much a kv head needs all keys: 1 for a retrieval head, 0 for a streaming one. The
files have one line per layer and between tabs one number per kv head.

    published = read_duo_attention("patterns/some-model")
    heads = sparsify_by_quantile(published.gates, 0.5)
    strategy = DuoAttention(
        retrieval=Full(),
        retrieval_heads=jnp.asarray(heads[layer]),
        sink_size=published.sink_size,
        recent_size=published.recent_size,
    )
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64

_GATES = "full_attention_heads.tsv"
_CONFIG = "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadGates:
    """What DuoAttention learned for a model.

    Attributes:
        gates: of all layers and kv heads, in [0, 1].
        sink_size: first keys that streaming heads see, at training.
        recent_size: keys before and at each query's position, likewise.
    """

    gates: Float[np.ndarray, "L K"]
    sink_size: int
    recent_size: int


def read_duo_attention(folder: str | pathlib.Path) -> HeadGates:
    """Reads a folder of DuoAttention: gates, and the sizes that config.json has among others.

    Raises:
        ValueError: a file is not of this format; says where.
    """
    path = pathlib.Path(folder) / _CONFIG
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a JSON object with sink_size and recent_size")
    return HeadGates(
        gates=read_gates(pathlib.Path(folder) / _GATES),
        sink_size=_size(path, config, "sink_size", least=0),
        recent_size=_size(path, config, "recent_size", least=1),
    )


def write_duo_attention(folder: str | pathlib.Path, gates: HeadGates) -> None:
    """Writes a folder that DuoAttention's loader and `read_duo_attention` read; may exist."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.savetxt(folder / _GATES, gates.gates, delimiter="\t")
    sizes = {"sink_size": gates.sink_size, "recent_size": gates.recent_size}
    (folder / _CONFIG).write_text(json.dumps(sizes, indent=4) + "\n")


def read_gates(path: str | pathlib.Path) -> Float64[np.ndarray, "L K"]:
    """Reads a file of gates, such as full_attention_heads.tsv; clips them to [0, 1], as Duo does.

    Raises:
        ValueError: the file holds something else; says in which line.
    """
    return np.clip(_read_numbers(pathlib.Path(path)), 0.0, 1.0)


def read_head_masks(path: str | pathlib.Path) -> Bool[np.ndarray, "L K"]:
    """Reads PruLong's masks, each 0 or 1: which heads are to retrieve.

    Raises:
        ValueError: the file holds something else; says in which line.
    """
    numbers = _read_numbers(pathlib.Path(path))
    for layer, line in enumerate(numbers):
        for number in line:
            if number not in (0.0, 1.0):
                raise ValueError(
                    f"{path}, line {layer + 1}: {number} must be 0 or 1; read gates with "
                    "read_gates, and sparsify them"
                )
    return numbers == 1.0


def write_head_masks(path: str | pathlib.Path, masks: Bool[np.ndarray, "L K"]) -> None:
    """Writes PruLong's masks, which `read_head_masks` and, as gates, `read_gates` read."""
    np.savetxt(path, masks.astype(int), fmt="%d", delimiter="\t")


def sparsify_by_quantile(
    gates: Float[np.ndarray, "L K"], sparsity: float
) -> Bool[np.ndarray, "L K"]:
    """The heads of the highest gates over all layers; among equals the first.

    Args:
        gates: of all layers and kv heads, or anything that ranks them.
        sparsity: share of the heads that are to stream, as nearly as their number allows.

    Returns:
        Which heads are to retrieve. Duo takes those at or above the quantile of that share, of
        gates with noise against ties: the same heads, but for one where the numbers are odd.

    Raises:
        ValueError: sparsity is no share, or a gate is not a number.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity} must lie in [0, 1]")
    _check_gates(gates)
    num_kept = gates.size - round(gates.size * sparsity)
    is_kept = np.zeros(gates.size, bool)
    is_kept[np.argsort(-gates.ravel(), kind="stable")[:num_kept]] = True
    return is_kept.reshape(gates.shape)


def sparsify_by_threshold(
    gates: Float[np.ndarray, "L K"], threshold: float
) -> Bool[np.ndarray, "L K"]:
    """The heads whose gates are at least `threshold`: those that are to retrieve.

    Raises:
        ValueError: threshold is not in [0, 1], or a gate is not a number.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must lie in [0, 1], where gates are")
    _check_gates(gates)
    return gates >= threshold


def _check_gates(gates: Float[np.ndarray, "L K"]) -> None:
    if np.isnan(gates).any():
        layer, head = np.argwhere(np.isnan(gates))[0]
        raise ValueError(f"gates[{layer}, {head}] is not a number; gates lie in [0, 1]")


def _read_numbers(path: pathlib.Path) -> Float64[np.ndarray, "L K"]:
    lines = path.read_text().splitlines()
    if not lines:
        raise ValueError(f"{path} is empty; it must have a line of kv heads for each layer")
    rows: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        rows.append([_number(entry, f"{path}, line {number}") for entry in line.split("\t")])
        if len(rows[-1]) != len(rows[0]):
            raise ValueError(
                f"{path}, line {number} has {len(rows[-1])} kv heads, line 1 has {len(rows[0])}; "
                "all layers must have the same"
            )
    return np.array(rows)


def _number(entry: str, where: str) -> float:
    try:
        number = float(entry)
    except ValueError:
        number = np.nan
    if not np.isfinite(number):
        raise ValueError(f"{where}: {entry!r} must be a number; lines are numbers between tabs")
    return number


def _size(path: pathlib.Path, config: dict[str, Any], name: str, *, least: int) -> int:
    size = config.get(name)
    if type(size) is not int or size < least:
        raise ValueError(f"{path}: {name}={size!r} must be an integer of at least {least}")
    return size
