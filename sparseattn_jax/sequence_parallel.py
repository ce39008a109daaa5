"""Attention over sequences that are spread over devices: all-to-all from tokens to heads and back.

Source: DeepSpeed-Ulysses (arXiv:2309.14509) section 3. A rank holds T / P tokens of all heads; for
the attention it gets all tokens of some heads, so that any attention, sparse or dense, runs inside
as on one device, selection included; then the outputs go back. Two things are added: every rank has
whole groups of a kv head and its query heads, whatever the numbers, and a kv head is sent once to
each rank that needs it, never once per query head.

It is of use without a `seq` axis too, of size 1 then: kernels cannot be split by the compiler, but
here each device calls them for its own sequences and heads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32, Shaped

from sparseattn_jax.checks import (
    check_kv,
    check_kv_lengths,
    check_positive,
    check_qk,
    check_segment_ids,
    checked,
)


def _check_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> None:
    check_positive(num_heads=num_heads, num_kv_heads=num_kv_heads, num_ranks=num_ranks)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}; "
            "repeat or drop heads so that each kv head serves the same number of query heads"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class HeadLayout:
    """Which heads each rank attends with: as many kv heads each, with their query heads in order.

    With no more ranks than kv heads, each rank has the next ceil(K / P) kv heads and all their
    query heads. With more ranks, up to P // K of them share a kv head, whose group of query heads
    is cut in equal parts. Where numbers do not divide, the last head is repeated as padding: it
    costs what a real head does, strategies never see zeros, and its output is dropped. Ranks work
    at the same time, so what padding costs is the heads per rank over an even share:

        query / kv heads      2 ranks    4 ranks    8 ranks    16 ranks
        32 / 8                16 of 16   8 of 8     4 of 4     2 of 2
        9 / 3                 6 of 4.5   3 of 2.25  2 of 1.1   1 of 0.6
        28 / 4                14 of 14   7 of 7     4 of 3.5   2 of 1.75

    Attributes:
        num_heads: query heads, N.
        num_kv_heads: K.
        num_ranks: P.
        sharing: ranks that share a kv head.
        kv_per_rank: kv heads of each rank.
        group: query heads of each of them.
    """

    num_heads: int
    num_kv_heads: int
    num_ranks: int
    sharing: int
    kv_per_rank: int
    group: int

    @staticmethod
    @checked(_check_heads)
    def of(num_heads: int, num_kv_heads: int, num_ranks: int) -> "HeadLayout":
        """The layout with the fewest query heads per rank, and of those the fewest kv heads sent.

        Raises:
            ValueError: a number is not positive, or kv heads serve unequal numbers of query heads.
        """
        whole_group = num_heads // num_kv_heads
        group = -(-whole_group // max(1, num_ranks // num_kv_heads))
        sharing = -(-whole_group // group)
        return HeadLayout(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            num_ranks=num_ranks,
            sharing=sharing,
            kv_per_rank=-(-num_kv_heads * sharing // num_ranks),
            group=group,
        )

    @property
    def padding(self) -> float:
        """The share of the ranks' query heads, and so of the work, that is padding."""
        return 1 - self.num_heads / (self.num_ranks * self.kv_per_rank * self.group)

    def spread_queries(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """What is by query head, for all ranks one after the other."""
        x = _split(x, axis, self.num_kv_heads)
        x = _repeat_last(x, axis + 1, self.sharing * self.group)
        return self._pad_kv(_split(_merge(x, axis), axis, self.num_kv_heads * self.sharing), axis)

    def spread_kv(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """What is by kv head, for all ranks one after the other."""
        x = jnp.repeat(_split(x, axis, self.num_kv_heads), self.sharing, axis + 1)
        return self._pad_kv(_split(_merge(x, axis), axis, self.num_kv_heads * self.sharing), axis)

    def collect_queries(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """What `spread_queries` spread."""
        x = _split(x, axis, self.num_ranks * self.kv_per_rank)
        x = jax.lax.slice_in_dim(x, 0, self.num_kv_heads * self.sharing, axis=axis)
        x = _split(_merge(x, axis), axis, self.num_kv_heads)
        group = self.num_heads // self.num_kv_heads
        return _merge(jax.lax.slice_in_dim(x, 0, group, axis=axis + 1), axis)

    def _pad_kv(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """As many kv heads as the ranks hold, with what is theirs along the next axis."""
        return _merge(_repeat_last(x, axis, self.num_ranks * self.kv_per_rank), axis)


@dataclasses.dataclass(frozen=True)
class _Axes:
    """The axes of a mesh that this attention knows, by what is spread over them."""

    mesh: Mesh
    seq: str
    batch: tuple[str, ...]
    head: str | None

    def size(self, *names: str | None) -> int:
        return math.prod(self.mesh.shape[name] for name in names if name is not None)

    def spec(self, *dimensions: str) -> PartitionSpec:
        by_dimension = {
            "batch": self.batch,
            "seq": self.seq,
            "head": self.head,
            "rank": (self.seq,) if self.head is None else (self.head, self.seq),
        }
        return PartitionSpec(*(by_dimension[dimension] for dimension in dimensions))

    def check_operands(self, q: jax.Array, k: jax.Array) -> None:
        """Everything is cut in equal parts."""
        for name, length in (("q_len", q.shape[1]), ("kv_len", k.shape[1])):
            if length % self.size(self.seq):
                raise ValueError(
                    f"{name}={length} must be a multiple of the {self.size(self.seq)} ranks of "
                    f"mesh axis {self.seq!r}; pad it, and pass kv_lengths"
                )
        if q.shape[0] % self.size(*self.batch):
            raise ValueError(
                f"batch={q.shape[0]} must be a multiple of the {self.size(*self.batch)} devices of "
                f"mesh axes {self.batch}; pass other batch_axes, () for none, or a larger batch"
            )
        if k.shape[2] % self.size(self.head):
            raise ValueError(
                f"num_kv_heads={k.shape[2]} must be a multiple of the {self.size(self.head)} "
                f"devices of mesh axis {self.head!r}; pass head_axis=None, by which these repeat "
                "each other's work, or give the devices to another axis"
            )


def _check_mesh(
    mesh: Mesh, seq_axis: str, batch_axes: Sequence[str], head_axis: str | None
) -> None:
    if seq_axis not in mesh.shape:
        raise ValueError(
            f"seq_axis={seq_axis!r} is none of the mesh's axes {mesh.axis_names}; name one, of "
            "size 1 if sequences are whole"
        )
    named = [seq_axis, *batch_axes, *([] if head_axis is None else [head_axis])]
    if len(set(named)) < len(named):
        raise ValueError(
            f"seq_axis={seq_axis!r}, batch_axes={tuple(batch_axes)} and head_axis={head_axis!r} "
            "must be different axes"
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"mesh has axis_types={mesh.axis_types}; all must be AxisType.Auto: pass "
            "axis_types=(AxisType.Auto,) * number of axes to jax.make_mesh"
        )


@checked(_check_mesh)
def wrap(
    attend: Callable[..., Any],
    mesh: Mesh,
    *,
    seq_axis: str = "seq",
    batch_axes: Sequence[str] = ("data", "fsdp"),
    head_axis: str | None = "model",
) -> Callable[..., Any]:
    """An attention function for operands that are spread over a mesh.

    Its call is that of `attend`:

        wrapped(q, k, v, *inputs, kv_lengths=None, segment_ids=None, **options)

    with q [B, T, N, H] and k, v [B, S, K, H] of all devices together, B over `batch_axes`, T and S
    over `seq_axis`, N and K over `head_axis`. `attend` gets all tokens of its device's sequences
    and heads, and what it returns, arrays [B, T, N, ...], comes back spread as q is. So
    `xattention_prefill` can be wrapped, and so can a model's attention.

    Inputs and options are pytrees, as a strategy. Their arrays are per head, by query head [N, ...]
    or by kv head [K, ...], and each device gets those of its heads; or they have no axes, and all
    devices get them. Whatever else they hold is passed on. kv_lengths [B] and segment_ids [B, S]
    go to all devices that hold the sequence; they are passed on if they are given.

    Gradients are those of `attend` on one device, also for inputs that are shared by devices. The
    work that is lost to padding is that of `HeadLayout`. Call it under `jax.jit`.

    Args:
        attend: the attention; traced once, for the heads of one device.
        mesh: of `AxisType.Auto` axes. Devices along axes that are not named here repeat each
            other's work.
        seq_axis: the mesh axis that tokens are spread over.
        batch_axes: those that sequences are spread over; the mesh may lack some.
        head_axis: the one that heads are spread over before; the mesh may lack it. None for none.

    Raises:
        ValueError: the mesh lacks seq_axis, has axes that are not Auto, or axes are named twice.
            The call: lengths, batch or kv heads do not divide by the devices, an array is of
            neither number of heads, or `attend` returns something else than arrays [B, T, N, ...].
    """
    axes = _Axes(
        mesh=mesh,
        seq=seq_axis,
        batch=tuple(name for name in batch_axes if name in mesh.shape),
        head=head_axis if head_axis in mesh.shape else None,
    )

    @checked(check_qk, check_kv, check_kv_lengths, check_segment_ids, axes.check_operands)
    def wrapped(
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        /,
        *inputs: Any,
        kv_lengths: Int32[Array, " B"] | None = None,
        segment_ids: Int32[Array, "B S"] | None = None,
        **options: Any,
    ) -> Any:
        given = {"kv_lengths": kv_lengths, "segment_ids": segment_ids}
        per_sequence = {name: x for name, x in given.items() if x is not None}
        return _attend(attend, axes, (q, k, v), per_sequence, (inputs, options))

    return wrapped


def _attend(
    attend: Callable[..., Any],
    axes: _Axes,
    operands: tuple[Array, Array, Array],
    per_sequence: dict[str, Array],
    others: tuple[tuple, dict[str, Any]],
) -> Any:
    """The call of a wrapped function; `others` are its inputs and options."""
    num_shards = axes.size(axes.head)
    num_heads, num_kv_heads = operands[0].shape[2], operands[1].shape[2]
    layout = HeadLayout.of(num_heads // num_shards, num_kv_heads // num_shards, axes.size(axes.seq))
    leaves, structure = jax.tree.flatten_with_path(others)
    places = [i for i, (_, leaf) in enumerate(leaves) if isinstance(leaf, Array | np.ndarray)]
    per_head = [_spread(*leaves[i], layout, num_heads, num_kv_heads, num_shards) for i in places]

    def attend_here(q, k, v, per_sequence, per_head):
        values = [leaf for _, leaf in leaves]
        for i, value in zip(places, per_head, strict=True):
            values[i] = value
        inputs, options = structure.unflatten(values)
        return attend(q, k, v, *inputs, **per_sequence, **options)

    tokens = axes.spec("batch", "seq", "head")
    by_heads = jax.shard_map(
        functools.partial(_by_heads, attend_here, layout, axes.seq),
        mesh=axes.mesh,
        in_specs=(
            *(tokens, tokens, tokens, axes.spec("batch")),
            [axes.spec("rank") if x.ndim else axes.spec() for x in per_head],
        ),
        out_specs=tokens,
        # Kernels and loops inside know nothing of the mesh.
        check_vma=False,
    )
    return by_heads(*operands, per_sequence, per_head)


def _spread(
    path: tuple,
    leaf: Shaped[Array, "..."] | Shaped[np.ndarray, "..."],
    layout: HeadLayout,
    num_heads: int,
    num_kv_heads: int,
    num_shards: int,
) -> Shaped[Array, "..."]:
    """A per-head array for all devices one after the other."""
    x = jnp.asarray(leaf)
    if x.ndim == 0:
        return x
    if x.shape[0] not in (num_heads, num_kv_heads):
        (where, *_), inside = path[1:2], path[2:]
        name = f"inputs[{where.idx}]" if hasattr(where, "idx") else str(where.key)
        raise ValueError(
            f"{name}{jax.tree_util.keystr(inside)} has shape {x.shape}; arrays are by query head, "
            f"of first axis {num_heads}, by kv head, {num_kv_heads}, or have no axes; broadcast it"
        )
    spread = layout.spread_queries if x.shape[0] == num_heads else layout.spread_kv
    return _merge(spread(_split(x, 0, num_shards), 1), 0)


def _by_heads(
    attend: Callable[..., Any],
    layout: HeadLayout,
    seq_axis: str,
    q: Float[Array, "B T_rank N H"],
    k: Float[Array, "B S_rank K H"],
    v: Float[Array, "B S_rank K H"],
    per_sequence: dict[str, Array],
    per_head: list[Array],
) -> Any:
    """One device's part: tokens to heads, attention, heads to tokens."""
    to_heads = functools.partial(
        jax.lax.all_to_all, axis_name=seq_axis, split_axis=2, concat_axis=1, tiled=True
    )
    q = to_heads(layout.spread_queries(q, 2))
    k, v = (to_heads(layout.spread_kv(x, 2)) for x in (k, v))

    def to_tokens(x: Array) -> Array:
        if x.shape[:3] != q.shape[:3]:
            raise ValueError(
                f"attend returned shape {x.shape}; all it returns must begin with q's "
                f"[batch, length, heads], here {q.shape[:3]}"
            )
        x = jax.lax.all_to_all(x, seq_axis, split_axis=1, concat_axis=2, tiled=True)
        return layout.collect_queries(x, 2)

    return jax.tree.map(to_tokens, attend(q, k, v, per_sequence, per_head))


def _split(x: Array, axis: int, parts: int) -> Array:
    """The axis as two, the first of so many."""
    return x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])


def _merge(x: Array, axis: int) -> Array:
    """The axis and the next one as one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _repeat_last(x: Array, axis: int, size: int) -> Array:
    """The axis at that size, by copies of its last entry."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, size - x.shape[axis]
    return jnp.pad(x, widths, mode="edge")
