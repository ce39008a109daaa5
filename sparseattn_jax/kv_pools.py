"""A layer's heads in a pool of cache rows: what is written there, read, and attended to.

`sparseattn_jax/kv_cache.py` is made of two such pools.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.decode import PageBounds, QuestPages
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.kernels.decode_attention import decode_attention
from sparseattn_jax.kernels.page_scores import page_bounds


class Window(NamedTuple):
    """The tokens that streaming heads keep, and where in a row: sinks, then a ring of recent ones.

    Attributes:
        sink_size: first tokens.
        recent_size: recent tokens, the newest counted.
    """

    sink_size: int
    recent_size: int

    def slots(self, positions: Int32[Array, "#B T"]) -> Int32[Array, "#B T"]:
        """Where the token at a position lies."""
        in_ring = self.sink_size + (positions - self.sink_size) % self.recent_size
        return jnp.where(positions < self.sink_size, positions, in_ring)

    def holds(
        self, positions: Int32[Array, "#B T"], lengths: Int32[Array, "B 1"]
    ) -> Bool[Array, "B T"]:
        """Whether a token is kept once there are so many; of positions below the length."""
        return (positions < self.sink_size) | (positions >= lengths - self.recent_size)

    def in_order(
        self,
        kept: Float[Array, "B W K H"],
        new: Float[Array, "B T K H"],
        *,
        lengths: Int32[Array, " B"],
        length: int,
    ) -> Float[Array, "B length K H"]:
        """The tokens in a row's slots, and new ones behind them, by position; others are 0."""
        tokens = jnp.concatenate([kept, new], axis=1)
        positions, before = jnp.arange(length, dtype=jnp.int32)[None], lengths[:, None]
        in_row = jnp.where(self.holds(positions, before), self.slots(positions), tokens.shape[1])
        sources = jnp.where(positions < before, in_row, kept.shape[1] + positions - before)
        sequences = jnp.arange(len(lengths), dtype=jnp.int32)[:, None]
        return tokens.at[sequences, sources].get(mode="fill", fill_value=0)


class Pool(NamedTuple):
    """One layer's view of a pool, whose rows are those of all layers.

    Attributes:
        k: keys; slot s of row r.
        v: values.
        rows: of each sequence and head; means nothing where the head is in another pool.
        is_here: whether the head is in this pool.
        bounds: of the keys' pages, whose batch are the rows and which have one head.
    """

    k: Float[Array, "R S H"]
    v: Float[Array, "R S H"]
    rows: Int32[Array, "B K"]
    is_here: Bool[Array, " K"]
    bounds: PageBounds | None = None

    def write(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        slots: Int32[Array, "B T"],
        is_kept: Bool[Array, "B T"],
    ) -> "Pool":
        """With the tokens that are kept in their slots, no two of them in one."""
        if not len(self.k):
            return self
        # Targets past the end are dropped. They differ too, so that the writes need no order.
        dropped = self.k.shape[1] + jnp.arange(slots.shape[1], dtype=jnp.int32)[None]
        where = self._target_rows()[:, None], jnp.where(is_kept, slots, dropped)[..., None]
        return self._replace(
            k=self.k.at[where].set(k, mode="drop", unique_indices=True),
            v=self.v.at[where].set(v, mode="drop", unique_indices=True),
        )

    def bound(
        self,
        k: Float[Array, "B T K H"],
        lengths: Int32[Array, " B"],
        num_new: Int32[Array, " B"],
    ) -> "Pool":
        """With the bounds, if there are any, of the pages that hold the first num_new keys too."""
        if self.bounds is None or not len(self.k):
            return self
        size, num_tokens = self.bounds.page_size, k.shape[1]
        # A first page that had keys before gets its first new one in their stead.
        before = lengths % size
        slots = jnp.arange(num_tokens + size - 1, dtype=jnp.int32)[None]
        tokens = jnp.clip(slots - before[:, None], 0, num_tokens - 1)
        used = jnp.where(num_new > 0, before + num_new, 0)
        paged = jnp.take_along_axis(k, tokens[..., None, None], axis=1)
        least, greatest = page_bounds(paged, page_size=size, kv_lengths=used)
        pages = (lengths // size)[:, None] + jnp.arange(least.shape[1], dtype=jnp.int32)[None]
        where = self._target_rows()[:, None], pages[..., None], 0
        bounds = PageBounds(
            key_min=self.bounds.key_min.at[where].min(least, mode="drop", unique_indices=True),
            key_max=self.bounds.key_max.at[where].max(greatest, mode="drop", unique_indices=True),
            page_size=size,
        )
        return self._replace(bounds=bounds)

    def read(
        self, slots: Int32[Array, "1 n"]
    ) -> tuple[Float[Array, "B n K H"], Float[Array, "B n K H"]]:
        """Keys and values of some slots; of heads that are not here any finite ones."""
        where = self.rows[:, None], slots[..., None]
        return self.k.at[where].get(mode="clip"), self.v.at[where].get(mode="clip")

    def attend(
        self,
        q: Float[Array, "B T N H"],
        lengths: Int32[Array, " B"],
        *,
        pages: QuestPages | None,
        scale: float | None,
        backend: Backend | None,
    ) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
        """Output and log-sum-exp over the first slots of each row; 0 and -inf of other heads."""
        (B, T, N, H), K = q.shape, self.rows.shape[1]
        if not len(self.k):
            return jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
        lists = {}
        if pages is not None and self.bounds is not None:
            listed = pages.select(q, self._bounds_of_heads(), kv_lengths=lengths, scale=scale)
            lists["kv_indices"] = listed.kv_indices.reshape(B * K, 1, -1)
            lists["kv_num_blocks"] = self._if_here(listed.kv_num_blocks)[:, None]
            lists["block_kv"] = self.bounds.page_size
        out, lse = decode_attention(
            jnp.swapaxes(q.reshape(B, T, K, N // K, H), 1, 2).reshape(B * K, T, N // K, H),
            self.k[:, :, None],
            self.v[:, :, None],
            kv_lengths=self._if_here(jnp.broadcast_to(lengths[:, None], (B, K))),
            kv_rows=self._if_here(self.rows),
            **lists,
            scale=scale,
            backend=backend,
        )
        out = jnp.swapaxes(out.reshape(B, K, T, N // K, H), 1, 2).reshape(q.shape)
        return out, jnp.swapaxes(lse.reshape(B, K, T, N // K), 1, 2).reshape(q.shape[:3])

    def _target_rows(self) -> Int32[Array, "B K"]:
        """Of heads that are not here, rows past the end, each another."""
        outside = len(self.k) + jnp.arange(self.rows.size, dtype=jnp.int32)
        return jnp.where(self.is_here[None], self.rows, outside.reshape(self.rows.shape))

    def _bounds_of_heads(self) -> PageBounds:
        """Of this layer alone, as if it had a cache [B, S, K, H]."""
        assert self.bounds is not None
        pages = jnp.arange(self.bounds.key_min.shape[1], dtype=jnp.int32)[None, :, None]
        where = self._if_here(self.rows).reshape(self.rows.shape)[:, None], pages, 0
        return PageBounds(
            key_min=self.bounds.key_min[where],
            key_max=self.bounds.key_max[where],
            page_size=self.bounds.page_size,
        )

    def _if_here(self, of_heads: Int32[Array, "B K"]) -> Int32[Array, " BK"]:
        """A number of each head, 0 for those that are not here."""
        return jnp.where(self.is_here[None], of_heads, 0).reshape(-1)
