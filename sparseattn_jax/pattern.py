"""SparsePattern: what a strategy selects."""

import dataclasses
import typing

import jax
from jaxtyping import Array, Int32

from sparseattn_jax.block_mask import BlockMask


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenColumns:
    """Single keys that all queries of a head attend to, beside the listed blocks.

    `indices[..., :counts]` ascends strictly. Entries past the count repeat the head's first index
    (0 if it has none). A column inside a block that is listed for a query counts once.

    Attributes:
        indices: key positions of each query head.
        counts: how many of them count.
        kv_len: keys, S.
    """

    indices: Int32[Array, "B N C"]
    counts: Int32[Array, "B N"]
    kv_len: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeadWindows:
    """What each query head sees of its listed blocks, exact to the token; needs causality.

    Attributes:
        sinks: a query sees the first `sinks` keys of the sequence,
        recents: and the last `recents` up to its own, that one included; S for no window.
    """

    sinks: Int32[Array, " N"]
    recents: Int32[Array, " N"]


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SparsePattern:
    """The keys that each query attends to.

    Attributes:
        blocks: listed key blocks.
        num_dropped: blocks lost to a capacity, per head; 0 unless the caller set `max_blocks`.
        columns: single keys per head, outside the windows too.
        windows: what heads see of their blocks, by default all.
    """

    blocks: BlockMask
    num_dropped: Int32[Array, "B #N"]
    columns: TokenColumns | None = None
    windows: HeadWindows | None = None
