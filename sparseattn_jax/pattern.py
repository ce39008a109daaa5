"""SparsePattern: what a strategy selects."""

import dataclasses
import typing

import jax
from jaxtyping import Array, Int32

from sparseattn_jax.block_mask import BlockMask


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SparsePattern:
    """The keys that each query attends to.

    Attributes:
        blocks: listed key blocks.
        num_dropped: blocks lost to a capacity, per head; 0 unless the caller set `max_blocks`.
    """

    blocks: BlockMask
    num_dropped: Int32[Array, "B #N"]
