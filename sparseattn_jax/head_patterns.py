"""What MInference does with each query head, and the published JSON files that say so."""

import dataclasses
import json
import pathlib
import typing
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

HeadKind = Literal["vertical_and_slash", "block_sparse", "stream_llm", "tri_shape"]
"""How a head selects, by its name in the files, and what its two sizes are:

- vertical_and_slash: key columns, and distances;
- block_sparse: key blocks of a query block, and a number that is not used;
- stream_llm, the A-shape: first keys, and recent keys of each query;
- tri_shape: those of an A-shape, whose last queries see everything. Published files do not have it.
"""

KINDS: tuple[HeadKind, ...] = typing.get_args(HeadKind)


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeadPatterns:
    """Kind and sizes of every query head: of one layer, or of all, along a leading axis.

    Attributes:
        kinds: positions in KINDS.
        sizes: the two sizes of each head.
        max_columns: the most columns of any vertical_and_slash head, on which shapes depend.
    """

    kinds: Int32[Array, "*layers N"]
    sizes: Int32[Array, "*layers N 2"]
    max_columns: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls, heads: Sequence[tuple[HeadKind, int, int]], *, max_columns: int | None = None
    ) -> "HeadPatterns":
        """The patterns of one layer, from a kind and two sizes for each query head.

        Raises:
            ValueError: a kind is not known, or a size is out of range.
        """
        for head, (kind, first, second) in enumerate(heads):
            _check_entry(f"head {head}", kind, first, second)
        columns = [first for kind, first, _ in heads if kind == "vertical_and_slash"]
        return cls(
            kinds=jnp.array([KINDS.index(kind) for kind, _, _ in heads], jnp.int32),
            sizes=jnp.array([sizes for _, *sizes in heads], jnp.int32),
            max_columns=max(columns, default=0) if max_columns is None else max_columns,
        )

    def layer(self, index: int) -> "HeadPatterns":
        """The patterns of one of the layers."""
        return jax.tree.map(lambda x: x[index], self)


def read_head_patterns(path: str | pathlib.Path, *, num_heads: int) -> HeadPatterns:
    """Reads a file in MInference's format: all layers, to scan over or to take one by one.

    The file is a list with a dictionary per layer, from a head's number, as a string, to
    `[kind, first size, second size, score]`. A head without an entry is vertical_and_slash with
    1000 columns and 6096 distances. Scores are not kept.

    Args:
        path: of the file.
        num_heads: query heads of the model.

    Raises:
        ValueError: the file does not have this format; says where.
    """
    layers = json.loads(pathlib.Path(path).read_text())
    if not isinstance(layers, list) or not layers or not all(isinstance(x, dict) for x in layers):
        raise ValueError(f"{path} must be a JSON list with a dictionary of heads for each layer")
    patterns = [
        HeadPatterns.of(_heads_of(entries, f"{path}, layer {layer}", num_heads))
        for layer, entries in enumerate(layers)
    ]
    return stack_layers(patterns)


def write_head_patterns(
    path: str | pathlib.Path,
    patterns: HeadPatterns,
    scores: Float[np.ndarray, "layers N"] | None = None,
) -> None:
    """Writes all layers' patterns in MInference's format; see `read_head_patterns`.

    Args:
        path: of the file.
        patterns: of all layers.
        scores: what the file says about each head beside its pattern, by default 0.

    Raises:
        ValueError: the patterns are those of a single layer.
    """
    kinds, sizes = np.asarray(patterns.kinds), np.asarray(patterns.sizes)
    if kinds.ndim != 2:
        raise ValueError(
            f"patterns.kinds has shape {kinds.shape}, a file needs [layers, N]; "
            "join the layers with stack_layers"
        )
    scores = np.zeros(kinds.shape) if scores is None else np.asarray(scores)
    layers = [
        {
            str(head): [KINDS[kinds[layer, head]], *sizes[layer, head].tolist(), float(score)]
            for head, score in enumerate(scores[layer])
        }
        for layer in range(len(kinds))
    ]
    pathlib.Path(path).write_text(json.dumps(layers))


def stack_layers(layers: Sequence[HeadPatterns]) -> HeadPatterns:
    """The patterns of all layers, from those of each."""
    most = max(patterns.max_columns for patterns in layers)
    layers = [dataclasses.replace(patterns, max_columns=most) for patterns in layers]
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


_DEFAULT = ("vertical_and_slash", 1000, 6096)


def _heads_of(
    entries: dict[str, Any], where: str, num_heads: int
) -> list[tuple[HeadKind, int, int]]:
    """The entries of one layer, checked, in the order of the heads."""
    heads: list[tuple[HeadKind, int, int]] = [_DEFAULT] * num_heads
    for head, entry in entries.items():
        if not head.isdecimal() or int(head) >= num_heads:
            raise ValueError(
                f"{where}: head {head!r} must be a number below num_heads={num_heads}; "
                "is the file one of another model?"
            )
        if not isinstance(entry, list) or len(entry) not in (3, 4):
            raise ValueError(f"{where}, head {head}: {entry} must be [kind, size, size, score]")
        kind, first, second = entry[:3]
        _check_entry(f"{where}, head {head}", kind, first, second)
        heads[int(head)] = (kind, int(first), int(second))
    return heads


def _check_entry(where: str, kind: object, first: object, second: object) -> None:
    if kind not in KINDS:
        raise ValueError(f"{where}: kind {kind!r} must be one of {', '.join(KINDS)}")
    least = (1, 0) if kind == "block_sparse" else (0, 1)
    for size, bound in zip((first, second), least, strict=True):
        if not isinstance(size, int) or not bound <= size < 2**31:
            raise ValueError(
                f"{where}: the sizes of {kind}, {first} and {second}, must be integers of at "
                f"least {least[0]} and {least[1]}"
            )
