"""The two-pool cache: full heads keep every token, streaming heads sinks and a ring of recent ones.

Each pair of a layer and kv head, for each sequence, is one row of one of two pools, so that layers
may have any numbers of full heads under one scan, and no weights are permuted. Everything is
traced but the sizes: a cache is a carry of `lax.scan` and `lax.while_loop`, updated in place.

Source: DuoAttention (arXiv:2410.10819) section 2.3, with two differences. Every query of a
streaming head sees the first sink_size tokens and the last recent_size ones up to its own, as in
training; there the window grows with the chunk. Recent tokens lie in a ring; there they move.
"""

import dataclasses
import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from sparseattn_jax.checks import check_kv, check_positive, checked, concrete
from sparseattn_jax.decode import PageBounds
from sparseattn_jax.kernels.decode_attention.tiling import TILE_ROWS
from sparseattn_jax.kv_pools import Pool, Window

_DTYPES = ("bfloat16", "float16", "float32")


def _check_sizes(
    num_layers: int,
    batch: int,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    sink_size: int,
    recent_size: int,
    page_size: int | None,
    dtype: DTypeLike,
    is_full: np.ndarray | jax.Array | None,
) -> None:
    check_positive(
        num_layers=num_layers,
        batch=batch,
        capacity=capacity,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        recent_size=recent_size,
        page_size=1 if page_size is None else page_size,
    )
    if sink_size < 0:
        raise ValueError(f"sink_size={sink_size} must not be negative; 0 keeps no sinks")
    if jnp.dtype(dtype) not in _DTYPES:
        raise ValueError(f"dtype={jnp.dtype(dtype)} must be one of {_DTYPES}")
    if is_full is None:
        return
    if isinstance(is_full, Tracer):
        raise ValueError("is_full must not be traced: it sizes the pools; pass a NumPy array")
    wanted = num_layers, num_kv_heads
    if np.shape(is_full) != wanted or np.asarray(is_full).dtype != np.bool_:
        raise ValueError(
            f"is_full has shape {np.shape(is_full)} and dtype {np.asarray(is_full).dtype}; pass "
            f"bool of shape {wanted}, one per layer and kv head"
        )


def check_layer(cache: "KVCache", layer: int | jax.Array) -> None:
    """layer is one index of the cache."""
    index, num_layers = concrete(layer), len(cache.rows)
    if index is not None and not (index.shape == () and 0 <= index < num_layers):
        raise ValueError(f"layer={index.tolist()} must be one index in [0, {num_layers})")


def _check_layer(self: "KVCache", layer: int | jax.Array) -> None:
    check_layer(self, layer)


def _check_num_new(self: "KVCache", num_new: jax.Array) -> None:
    if num_new.shape != self.lengths.shape or num_new.dtype != jnp.int32:
        raise ValueError(
            f"num_new has shape {num_new.shape} and dtype {num_new.dtype}; pass int32 of shape "
            f"{self.lengths.shape}, the new tokens of each sequence"
        )
    counts = concrete(num_new)
    if counts is not None and counts.min() < 0:
        raise ValueError(f"num_new={counts.tolist()} must not be negative; 0 for none")
    lengths = concrete(self.lengths)
    if counts is None or lengths is None or not self.full_k.shape[0]:
        return
    if (lengths + counts).max() > self.capacity:
        raise ValueError(
            f"num_new={counts.tolist()} tokens after lengths={lengths.tolist()} exceed "
            f"capacity={self.capacity}; create a larger cache, or stop those sequences"
        )


def _check_new(self: "KVCache", k: jax.Array, num_new: jax.Array) -> None:
    batch, num_kv_heads, head_dim = len(self.lengths), self.rows.shape[1], self.full_k.shape[2]
    if k.ndim != 4 or (k.shape[0], *k.shape[2:]) != (batch, num_kv_heads, head_dim):
        raise ValueError(
            f"k.shape={k.shape} must be [{batch}, new tokens, {num_kv_heads}, {head_dim}], "
            "as the cache was created"
        )
    if k.dtype != self.full_k.dtype:
        raise ValueError(f"k.dtype={k.dtype} must be that of the cache, {self.full_k.dtype}; cast")
    counts = concrete(num_new)
    if counts is not None and counts.max() > k.shape[1]:
        raise ValueError(
            f"num_new={counts.tolist()} must not exceed the {k.shape[1]} new tokens of k"
        )


def _check_length(self: "KVCache", k: jax.Array, num_new: jax.Array, length: int) -> None:
    start = length - k.shape[1]
    if start < 0 or (self.full_k.shape[0] and length > self.capacity):
        raise ValueError(
            f"length={length} must lie in [{k.shape[1]}, capacity={self.capacity}]: the chunk's "
            f"{k.shape[1]} tokens are its last"
        )
    lengths, counts = concrete(self.lengths), concrete(num_new)
    if lengths is None or counts is None:
        return
    if np.any((lengths != start) & (counts > 0)):
        raise ValueError(
            f"lengths={lengths.tolist()} must be length - {k.shape[1]} = {start} wherever num_new="
            f"{counts.tolist()} is not 0: a chunk begins at one position for all sequences"
        )


@jax.tree_util.register_dataclass
@no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of all layers, of a fixed capacity, with a length per sequence.

    One token, or a chunk of them, goes through all layers: each appends its keys and values, then
    attends; after the last layer `advance` counts them. Keys are cached after the rotary embedding,
    so where a token lies makes no difference.

    A layer with a sliding window is one whose heads all stream, in a cache with sink_size=0 and
    recent_size=window: all streaming heads of a cache have the same window.

    What does not fit is not written: beyond the capacity full heads miss tokens. Untraced calls
    raise before that happens; traced code calls `check_room` outside, or looks at `room`.

    Attributes:
        full_k: keys of the full heads, a row per (layer, kv head, sequence); slot p of a row holds
            the token at position p.
        full_v: values, likewise.
        ring_k: keys of the streaming heads: the sinks, then the ring. The token at position p lies
            in slot p, or from the sinks on in slot sink_size + (p - sink_size) % recent_size.
        ring_v: values, likewise.
        lengths: tokens of each sequence so far.
        rows: of each layer and kv head, the row of the first sequence, in the pool of its kind.
        is_full: whether the head is full.
        bounds: of the pages of full heads, for `decode_attention(pages=...)`: their batch are the
            rows of full_k, and they have one head. None for none.
        sink_size: first tokens that streaming heads keep.
        recent_size: recent tokens that they keep.
    """

    full_k: Float[Array, "R S H"]
    full_v: Float[Array, "R S H"]
    ring_k: Float[Array, "U W H"]
    ring_v: Float[Array, "U W H"]
    lengths: Int32[Array, " B"]
    rows: Int32[Array, "L K"]
    is_full: Bool[Array, "L K"]
    bounds: PageBounds | None
    sink_size: int = dataclasses.field(metadata={"static": True})
    recent_size: int = dataclasses.field(metadata={"static": True})

    @staticmethod
    @checked(_check_sizes)
    def create(
        *,
        num_layers: int,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
        is_full: Bool[np.ndarray, "L K"] | None = None,
        sink_size: int = 128,
        recent_size: int = 1024,
        page_size: int | None = None,
    ) -> "KVCache":
        """An empty cache.

        Args:
            num_layers: L.
            batch: sequences, B.
            capacity: tokens that each sequence can have. Rows have that many slots or up to 7 more,
                since the Hopper kernel takes multiples of 8.
            num_kv_heads: K.
            head_dim: H.
            dtype: bfloat16, float16 or float32.
            is_full: which kv heads keep every token; the others stream. Concrete, as it sizes the
                pools. By default all are full.
            sink_size: first tokens that streaming heads keep; 0 for none.
            recent_size: recent tokens that they keep, the newest counted.
            page_size: keeps bounds of full heads' pages of so many tokens, 2 / page_size as large
                as their keys; the Hopper kernel takes 64 and 128.

        Raises:
            ValueError: an argument is out of range or does not fit the others.
        """
        kinds = np.ones((num_layers, num_kv_heads), bool) if is_full is None else is_full
        # The n-th head of a kind, over all layers, has the kind's rows from n * batch on.
        rank_full, rank_ring = (np.cumsum(kind).reshape(kind.shape) - 1 for kind in (kinds, ~kinds))

        def pool(num_heads: int, slots: int) -> tuple[Array, Array]:
            shape = num_heads * batch, -(-slots // TILE_ROWS) * TILE_ROWS, head_dim
            return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

        full_k, full_v = pool(int(kinds.sum()), capacity)
        ring_k, ring_v = pool(int((~kinds).sum()), sink_size + recent_size)
        bounds = None
        if page_size is not None:
            shape = len(full_k), -(-full_k.shape[1] // page_size), 1, head_dim
            bounds = PageBounds(
                key_min=jnp.full(shape, jnp.inf, dtype),
                key_max=jnp.full(shape, -jnp.inf, dtype),
                page_size=page_size,
            )
        return KVCache(
            full_k=full_k,
            full_v=full_v,
            ring_k=ring_k,
            ring_v=ring_v,
            lengths=jnp.zeros(batch, jnp.int32),
            rows=jnp.asarray(np.where(kinds, rank_full, rank_ring) * batch, jnp.int32),
            is_full=jnp.asarray(kinds),
            bounds=bounds,
            sink_size=sink_size,
            recent_size=recent_size,
        )

    @property
    def capacity(self) -> int:
        """Tokens that a row of a full head has slots for."""
        return self.full_k.shape[1]

    def memory_usage(self) -> int:
        """Bytes of both pools and of bounds; also of shapes alone, as by `jax.eval_shape`."""
        arrays = self.full_k, self.full_v, self.ring_k, self.ring_v, self.bounds
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(arrays))

    def room(self) -> Int32[Array, " B"]:
        """Tokens of each sequence that full heads still take; negative after they missed some."""
        return self.capacity - self.lengths

    @checked(_check_num_new)
    def check_room(self, num_new: Int32[Array, " B"]) -> None:
        """Raises a ValueError if so many tokens do not fit; says nothing about traced ones."""

    @checked(_check_layer, _check_num_new, _check_new, check_kv)
    def append(
        self,
        layer: int | Int32[Array, ""],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        num_new: Int32[Array, " B"],
    ) -> "KVCache":
        """With a layer's keys and values of the next tokens; the lengths stay.

        Args:
            layer: index of the layer.
            k: keys of the tokens at positions lengths, lengths + 1, ...
            v: values.
            num_new: how many of the T tokens of each sequence are real; the others, behind them,
                are padding and are not written.

        Raises:
            ValueError: an argument is out of range or does not fit the cache; or, untraced, the
                tokens exceed the capacity.
        """
        full, ring = self.pools(layer)
        offsets = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
        positions = self.lengths[:, None] + offsets
        is_new = offsets < num_new[:, None]
        full = full.write(k, v, positions, is_new & (positions < self.capacity))
        full = full.bound(k, self.lengths, num_new)
        # Of new tokens that share a slot of the ring only the last stays.
        window = self._window
        stays = window.holds(positions, (self.lengths + num_new)[:, None])
        ring = ring.write(k, v, window.slots(positions), is_new & stays)
        return dataclasses.replace(
            self, full_k=full.k, full_v=full.v, ring_k=ring.k, ring_v=ring.v, bounds=full.bounds
        )

    @checked(_check_layer, _check_num_new, _check_new, _check_length, check_kv)
    def extend(
        self,
        layer: int | Int32[Array, ""],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        num_new: Int32[Array, " B"],
        *,
        length: int,
    ) -> tuple["KVCache", Float[Array, "B length K H"], Float[Array, "B length K H"]]:
        """`append` of a chunk of a prefill, and all that its queries attend to, in order.

        Streaming heads get the sinks, the recent_size tokens before the chunk, read before the
        chunk takes their slots, and the whole chunk: all that the window of any of its queries
        holds. So `prefill_attention(q, keys, values, strategy, kv_lengths=lengths + num_new)` is
        exact where the strategy is DuoAttention with retrieval_heads=is_full[layer] and the sizes
        of the cache. Others are for layers without streaming heads.

        Args:
            layer: index of the layer.
            k: keys of the chunk.
            v: values.
            num_new: how many of the T tokens of each sequence are real, as of `append`.
            length: static; positions to return, the chunk's T tokens the last of them. So every
                sequence with new tokens has length - T so far, and each start of a chunk is a
                program of its own.

        Returns:
            The cache, and keys and values by position. What no query sees, past lengths + num_new
            or outside the windows of streaming heads, is finite.

        Raises:
            ValueError: as of `append`; or length does not fit.
        """
        if length == k.shape[1]:
            return self.append(layer, k, v, num_new), k, v
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        if not len(self.ring_k):
            cache = self.append(layer, k, v, num_new)
            return cache, *cache.pools(layer)[0].read(positions)
        past = self.pools(layer)[1].read(jnp.arange(self.ring_k.shape[1], dtype=jnp.int32)[None])
        # Read before they are written, or else the compiler copies the rings.
        past, ring_k, ring_v = lax.optimization_barrier((past, self.ring_k, self.ring_v))
        cache = dataclasses.replace(self, ring_k=ring_k, ring_v=ring_v)
        cache = cache.append(layer, k, v, num_new)
        in_order = functools.partial(self._window.in_order, lengths=self.lengths, length=length)
        keys, values = in_order(past[0], k), in_order(past[1], v)
        if not len(self.full_k):
            return cache, keys, values
        of_full = cache.pools(layer)[0].read(positions)
        is_full = self.is_full[layer][None, None, :, None]
        return cache, jnp.where(is_full, of_full[0], keys), jnp.where(is_full, of_full[1], values)

    def advance(self, num_new: Int32[Array, " B"]) -> "KVCache":
        """With the tokens counted that every layer has appended.

        Raises:
            ValueError: untraced, they exceed the capacity.
        """
        self.check_room(num_new)
        return dataclasses.replace(self, lengths=self.lengths + num_new)

    def pools(self, layer: int | Int32[Array, ""]) -> tuple[Pool, Pool]:
        """A layer's heads in both pools: the full ones, and those that stream."""
        batch = jnp.arange(len(self.lengths), dtype=jnp.int32)
        rows, is_full = self.rows[layer][None] + batch[:, None], self.is_full[layer]
        full = Pool(self.full_k, self.full_v, rows, is_full, self.bounds)
        return full, Pool(self.ring_k, self.ring_v, rows, ~is_full)

    @property
    def _window(self) -> Window:
        return Window(self.sink_size, self.recent_size)
