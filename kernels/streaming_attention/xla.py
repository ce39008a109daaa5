"""Streaming attention in plain XLA: the meaning of the op, on any device.

Queries go in chunks. A chunk reads the sinks and a slice of the keys as long as the window and the
chunk; memory holds the scores of one chunk at a time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.kernels.products import matmul
from sparseattn_jax.kernels.softmax import gradient_terms, softmax

# Sums over the sinks and over the band, the two sets of keys of _Geometry.
type _KeySums = tuple[Float32[Array, "B sink K H"], Float32[Array, "B band K H"]]


@functools.partial(jax.jit, static_argnames=("sink_size", "recent_size", "scale"))
def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sink_sizes: Int32[Array, " N"] | None,
    recent_sizes: Int32[Array, " N"] | None,
    kv_lengths: Int32[Array, " B"] | None,
    *,
    sink_size: int,
    recent_size: int,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Output and log-sum-exp; the arguments are those of the op."""
    geometry = _Geometry.of(q, k, sink_size, recent_size)
    sees = _Visibility.of(geometry, sink_sizes, recent_sizes, kv_lengths)
    k_sinks, k_band = geometry.sinks_and_band(k)
    v_sinks, v_band = geometry.sinks_and_band(v)

    def attend(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        index, queries = chunk
        keys = geometry.keys_of_chunk(k_sinks, k_band, index)
        values = geometry.keys_of_chunk(v_sinks, v_band, index)
        scores = _scores(queries, keys, sees.keys_of_chunk(index), scale)
        weights, lse = softmax(scores)
        out = matmul("bkgqs,bskh->bqkgh", weights, values)
        return out.astype(q.dtype), jnp.moveaxis(lse, 3, 1)

    indices = jnp.arange(geometry.num_chunks, dtype=jnp.int32)
    out, lse = lax.map(attend, (indices, geometry.to_chunks(q)))
    return geometry.from_chunks(out), geometry.from_chunks(lse)


@functools.partial(jax.jit, static_argnames=("sink_size", "recent_size", "scale"))
def run_vjp(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sink_sizes: Int32[Array, " N"] | None,
    recent_sizes: Int32[Array, " N"] | None,
    kv_lengths: Int32[Array, " B"] | None,
    out: Float[Array, "B T N H"],
    lse: Float32[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    d_lse: Float32[Array, "B T N"],
    *,
    sink_size: int,
    recent_size: int,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of q, k and v, deterministic: chunks add to keys one after another."""
    geometry = _Geometry.of(q, k, sink_size, recent_size)
    sees = _Visibility.of(geometry, sink_sizes, recent_sizes, kv_lengths)
    k_sinks, k_band = geometry.sinks_and_band(k)
    v_sinks, v_band = geometry.sinks_and_band(v)
    finite_lse, delta = gradient_terms(out, lse, d_out, d_lse)

    def visit(
        carry: tuple[_KeySums, _KeySums], chunk: tuple[Array, ...]
    ) -> tuple[tuple[_KeySums, _KeySums], Array]:
        index, queries, d_rows, row_lse, row_delta = chunk
        keys = geometry.keys_of_chunk(k_sinks, k_band, index)
        values = geometry.keys_of_chunk(v_sinks, v_band, index)
        scores = _scores(queries, keys, sees.keys_of_chunk(index), scale)
        weights = jnp.exp(scores - jnp.moveaxis(row_lse, 1, 3)[..., None])
        d_weights = matmul("bqkgh,bskh->bkgqs", d_rows, values)
        d_scores = weights * (d_weights - jnp.moveaxis(row_delta, 1, 3)[..., None]) * scale
        d_k, d_v = carry
        d_k = geometry.add_keys(d_k, index, matmul("bkgqs,bqkgh->bskh", d_scores, queries))
        d_v = geometry.add_keys(d_v, index, matmul("bkgqs,bqkgh->bskh", weights, d_rows))
        return (d_k, d_v), matmul("bkgqs,bskh->bqkgh", d_scores, keys)

    rows = (geometry.to_chunks(x) for x in (q, d_out, finite_lse, delta))
    indices = jnp.arange(geometry.num_chunks, dtype=jnp.int32)
    zeros = (jnp.zeros(k_sinks.shape, jnp.float32), jnp.zeros(k_band.shape, jnp.float32))
    (d_k, d_v), d_q = lax.scan(visit, (zeros, zeros), (indices, *rows))
    return (
        geometry.from_chunks(d_q).astype(q.dtype),
        geometry.all_keys(*d_k).astype(k.dtype),
        geometry.all_keys(*d_v).astype(v.dtype),
    )


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """How queries are cut into chunks, and which keys a chunk reads.

    The band is all keys that are recent to any query: keys S - T - (recent - 1) to S - 1, padded
    with zeros where they would stand before key 0 and, for the last chunk's missing queries, after
    key S - 1. Chunk c reads `width` keys of it from c * chunk_size on.
    """

    q_len: int
    kv_len: int
    group: int
    sink: int
    recent: int
    chunk_size: int

    @classmethod
    def of(cls, q: Array, k: Array, sink_size: int, recent_size: int) -> "_Geometry":
        q_len, kv_len = q.shape[1], k.shape[1]
        sink, recent = min(sink_size, kv_len), min(recent_size, kv_len)
        return cls(
            q_len=q_len,
            kv_len=kv_len,
            group=q.shape[2] // k.shape[2],
            sink=sink,
            recent=recent,
            # A chunk wider than the window would mask most of what it reads.
            chunk_size=min(q_len, max(16, min(sink + recent, 128))),
        )

    @property
    def num_chunks(self) -> int:
        return -(-self.q_len // self.chunk_size)

    @property
    def width(self) -> int:
        return self.recent - 1 + self.chunk_size

    @property
    def band_start(self) -> int:
        """The position of the band's first key, negative if that is padding."""
        return self.kv_len - self.q_len - self.recent + 1

    @property
    def missing_queries(self) -> int:
        return self.num_chunks * self.chunk_size - self.q_len

    def to_chunks(self, x: Array) -> Array:
        """[B, T, N, ...] to [chunks, B, chunk_size, K, group, ...], zero-padded at the end."""
        batch, _, heads, *rest = x.shape
        padding = [(0, 0), (0, self.missing_queries)] + [(0, 0)] * (x.ndim - 2)
        shape = (batch, self.num_chunks, self.chunk_size, heads // self.group, self.group, *rest)
        return jnp.moveaxis(jnp.pad(x, padding).reshape(shape), 1, 0)

    def from_chunks(self, chunks: Array) -> Array:
        """[chunks, B, chunk_size, K, group, ...] to [B, T, N, ...]."""
        _, batch, _, kv_heads, group, *rest = chunks.shape
        x = jnp.moveaxis(chunks, 0, 1).reshape(batch, -1, kv_heads * group, *rest)
        return x[:, : self.q_len]

    def sinks_and_band(self, x: Array) -> tuple[Array, Array]:
        """The sinks and the band of keys or values."""
        before = max(0, -self.band_start)
        padding = ((0, 0), (before, self.missing_queries), (0, 0), (0, 0))
        return x[:, : self.sink], jnp.pad(x[:, max(0, self.band_start) :], padding)

    def keys_of_chunk(self, sinks: Array, band: Array, index: Array) -> Array:
        """What a chunk reads: the sinks, then its slice of the band."""
        part = lax.dynamic_slice_in_dim(band, index * self.chunk_size, self.width, axis=1)
        return jnp.concatenate([sinks, part], axis=1)

    def add_keys(self, sums: _KeySums, index: Array, addends: Array) -> _KeySums:
        """Adds what belongs to a chunk's keys, in the order of `keys_of_chunk`."""
        sinks, band = sums
        start = index * self.chunk_size
        part = lax.dynamic_slice_in_dim(band, start, self.width, axis=1) + addends[:, self.sink :]
        band = lax.dynamic_update_slice_in_dim(band, part, start, axis=1)
        return sinks + addends[:, : self.sink], band

    def all_keys(self, sinks: Array, band: Array) -> Array:
        """The sum of sinks and band in their places, [B, S, K, H]."""
        rest = ((0, 0), (0, self.kv_len - self.sink), (0, 0), (0, 0))
        end = self.kv_len - self.band_start
        band = band[:, max(0, -self.band_start) : end]
        before = ((0, 0), (max(0, self.band_start), 0), (0, 0), (0, 0))
        return jnp.pad(sinks, rest) + jnp.pad(band, before)


@dataclasses.dataclass(frozen=True)
class _Visibility:
    """Which of the keys that a chunk reads each of its queries sees.

    Attributes:
        geometry: the chunks.
        sink: per head [1, K, group, 1, 1], or one for all.
        recent: likewise.
        lengths: [B, 1, 1, 1, 1], or S.
    """

    geometry: _Geometry
    sink: Array | int
    recent: Array | int
    lengths: Array | int

    @classmethod
    def of(
        cls,
        geometry: _Geometry,
        sink_sizes: Array | None,
        recent_sizes: Array | None,
        kv_lengths: Array | None,
    ) -> "_Visibility":
        def per_head(sizes: Array | None, bound: int) -> Array | int:
            if sizes is None:
                return bound
            return jnp.clip(sizes, 0, bound).reshape(1, -1, geometry.group, 1, 1)

        return cls(
            geometry=geometry,
            sink=per_head(sink_sizes, geometry.sink),
            recent=per_head(recent_sizes, geometry.recent),
            lengths=geometry.kv_len
            if kv_lengths is None
            else kv_lengths[:, None, None, None, None],
        )

    def keys_of_chunk(self, index: Array) -> Bool[Array, "#B #K #group chunk keys"]:
        """In the order of `_Geometry.keys_of_chunk`."""
        geometry = self.geometry
        first = index * geometry.chunk_size
        queries = first + jnp.arange(geometry.chunk_size, dtype=jnp.int32)
        queries = (queries + geometry.kv_len - geometry.q_len)[None, None, None, :, None]
        sinks = jnp.arange(geometry.sink, dtype=jnp.int32)
        band = first + geometry.band_start + jnp.arange(geometry.width, dtype=jnp.int32)
        keys = jnp.concatenate([sinks, band])[None, None, None, None, :]
        is_in_band = (jnp.arange(keys.size) >= geometry.sink)[None, None, None, None, :]
        is_recent = keys > queries - self.recent
        # A sink that is recent too is counted in the band.
        seen_as_sink = (keys < self.sink) & ~is_recent
        seen_in_band = is_recent & (keys >= 0) & (keys <= queries)
        return jnp.where(is_in_band, seen_in_band, seen_as_sink) & (queries < self.lengths)


def _scores(
    queries: Float[Array, "B chunk K group H"],
    keys: Float[Array, "B keys K H"],
    visible: Bool[Array, "#B #K #group chunk keys"],
    scale: float,
) -> Float32[Array, "B K group chunk keys"]:
    """Scaled logits, -inf where a query does not see a key."""
    logits = matmul("bqkgh,bskh->bkgqs", queries, keys)
    return jnp.where(visible, logits * scale, -jnp.inf)
