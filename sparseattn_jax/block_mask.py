"""BlockMask: the key blocks that each query block attends to."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.checks import check_positive
from sparseattn_jax.kernels import block_lists


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockMask:
    """The key/value blocks each query block attends to.

    `kv_indices[..., i, :kv_num_blocks[..., i]]` ascends strictly. Entries past the count
    repeat the row's first index (0 if the row is empty): a prefetch may load them, no kernel may
    use them. The head axis is N, or 1 for lists that all heads share.

    Listing a block says that its tokens may be seen; causality and sequence lengths are applied
    per token by the attention.

    Attributes:
        kv_indices: listed key blocks.
        kv_num_blocks: how many of them count.
        q_len: queries, T. The last query block may be partial.
        kv_len: keys, S. The last key block may be partial.
        block_q: queries per query block.
        block_kv: keys per key block.
        is_causal: whether queries, which stand at the end of the keys, see earlier keys only.
    """

    kv_indices: Int32[Array, "B #N Tb M"]
    kv_num_blocks: Int32[Array, "B #N Tb"]
    q_len: int = dataclasses.field(metadata={"static": True})
    kv_len: int = dataclasses.field(metadata={"static": True})
    block_q: int = dataclasses.field(metadata={"static": True})
    block_kv: int = dataclasses.field(metadata={"static": True})
    is_causal: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_dense(
        cls,
        keep: Bool[Array, "B #N Tb Sb"],
        *,
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_kv: int = 128,
        is_causal: bool = True,
    ) -> "BlockMask":
        """The mask that keeps the given blocks, with room for every block in each list.

        Raises:
            ValueError: `keep` has not one entry per block.
        """
        check_positive(q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv)
        num_blocks = (-(-q_len // block_q), -(-kv_len // block_kv))
        if keep.ndim != 4 or keep.shape[2:] != num_blocks or keep.dtype != jnp.bool:
            raise ValueError(
                f"keep has shape {keep.shape} and dtype {keep.dtype}; q_len={q_len}, "
                f"kv_len={kv_len} in blocks of {block_q} and {block_kv} need bool "
                f"[batch, heads or 1, {num_blocks[0]}, {num_blocks[1]}]"
            )
        indices, counts = block_lists.from_dense(keep)
        return cls(
            kv_indices=indices,
            kv_num_blocks=counts,
            q_len=q_len,
            kv_len=kv_len,
            block_q=block_q,
            block_kv=block_kv,
            is_causal=is_causal,
        )

    @classmethod
    def from_scores(
        cls,
        scores: Float[Array, "B #N Tb Sb"],
        keep: Bool[Array, "B #N Tb Sb"],
        max_blocks: int,
        *,
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_kv: int = 128,
        is_causal: bool = True,
    ) -> tuple["BlockMask", Int32[Array, "B #N"]]:
        """Keeps of each row at most `max_blocks` blocks, those of the highest score.

        Returns:
            The mask, whose lists are `max_blocks` wide, and the number of blocks dropped per head.

        Raises:
            ValueError: the shapes disagree, or max_blocks is not positive.
        """
        check_positive(max_blocks=max_blocks)
        if scores.shape != keep.shape:
            raise ValueError(f"scores.shape={scores.shape} must equal keep.shape={keep.shape}")
        kept = block_lists.keep_highest(scores, keep, max_blocks)
        mask = cls.from_dense(
            kept,
            q_len=q_len,
            kv_len=kv_len,
            block_q=block_q,
            block_kv=block_kv,
            is_causal=is_causal,
        )
        mask = dataclasses.replace(mask, kv_indices=mask.kv_indices[..., :max_blocks])
        return mask, jnp.sum(keep & ~kept, axis=(-2, -1), dtype=jnp.int32)

    @property
    def num_q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.kv_len // self.block_kv)

    def to_dense(self) -> Bool[Array, "B #N Tb Sb"]:
        """Whether each block is listed."""
        return block_lists.to_dense(self.kv_indices, self.kv_num_blocks, self.num_kv_blocks)

    def transpose(self) -> tuple[Int32[Array, "B #N Sb Tb"], Int32[Array, "B #N Sb"]]:
        """Lists of the query blocks that attend to each key block, and their counts."""
        return block_lists.transpose(self.kv_indices, self.kv_num_blocks, self.num_kv_blocks)

    def intersect(self, other: "BlockMask") -> "BlockMask":
        """The blocks that both masks list.

        Raises:
            ValueError: the masks were made for other lengths, blocks or causality.
        """
        if self._geometry() != other._geometry():
            raise ValueError(
                f"masks of {self._geometry()} and {other._geometry()} cannot be intersected; "
                "make both for the same lengths, block sizes and causality"
            )
        return BlockMask.from_dense(self.to_dense() & other.to_dense(), **self._geometry())

    def num_visible(self, kv_lengths: Int32[Array, " B"] | None = None) -> Int32[Array, "#B Tb"]:
        """How many of the first key blocks each query block sees; see `num_visible_blocks`."""
        return num_visible_blocks(**self._geometry(), kv_lengths=kv_lengths)

    def density(self) -> Float32[Array, "B #N"]:
        """Listed blocks over the blocks that causality leaves visible, per head."""
        visible = jnp.sum(self.num_visible(), dtype=jnp.float32)
        listed = jnp.sum(self.kv_num_blocks, axis=-1, dtype=jnp.float32)
        return listed / jnp.maximum(visible, 1.0)

    def __str__(self) -> str:
        """A picture per head: # listed, . not listed, + some of the blocks that share a cell."""
        geometry = ", ".join(f"{name}={value}" for name, value in self._geometry().items())
        if isinstance(self.kv_indices, Tracer) or self.kv_indices.ndim != 4:
            return f"BlockMask({geometry}, kv_indices={self.kv_indices})"
        dense = np.asarray(self.to_dense())
        density = np.asarray(self.density())
        lines = [f"BlockMask({geometry})"]
        heads = [divmod(head, dense.shape[1]) for head in range(dense.shape[0] * dense.shape[1])]
        for batch, head in heads[:_HEADS_DRAWN]:
            lines.append(f"sequence {batch}, head {head}, density {density[batch, head]:.3f}")
            lines.extend(_draw(dense[batch, head]))
        if len(heads) > _HEADS_DRAWN:
            lines.append(f"and {len(heads) - _HEADS_DRAWN} more heads")
        return "\n".join(lines)

    def _geometry(self) -> dict[str, Any]:
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata.get("static")
        }


def num_visible_blocks(
    *,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    kv_lengths: Int32[Array, " B"] | None = None,
) -> Int32[Array, "#B Tb"]:
    """How many of the first key blocks each query block sees.

    A block is visible iff it holds a valid key and, if causal, its first key is at or before the
    position of the query block's last valid query. A block of padding queries sees nothing.
    """
    if kv_lengths is None:
        kv_lengths = jnp.full(1, kv_len, jnp.int32)
    lengths = kv_lengths[:, None]
    starts = np.arange(0, q_len, block_q, dtype=np.int32)[None, :]
    if not is_causal:
        return jnp.broadcast_to(-(-lengths // block_kv), (len(kv_lengths), starts.size))
    starts = starts + (kv_len - q_len)
    ends = jnp.minimum(np.minimum(starts + block_q, kv_len), lengths)
    return jnp.where(ends > starts, -(-jnp.maximum(ends, 0) // block_kv), 0)


_HEADS_DRAWN = 8
_CELLS_DRAWN = 64


def _draw(blocks: Bool[np.ndarray, "Tb Sb"]) -> list[str]:
    step = -(-max(blocks.shape) // _CELLS_DRAWN)
    rows = []
    for top in range(0, blocks.shape[0], step):
        cells = [
            blocks[top : top + step, left : left + step] for left in range(0, blocks.shape[1], step)
        ]
        rows.append("".join("#" if c.all() else "+" if c.any() else "." for c in cells))
    return rows
