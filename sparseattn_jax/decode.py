"""Sparse decode: a step's queries choose pages of the cache, and attend to these alone."""

import dataclasses
from typing import Literal, NamedTuple, no_type_check, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.checks import (
    check_kv,
    check_kv_lengths,
    check_positive,
    check_qk,
    check_scale,
    checked,
    concrete,
)
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.kernels.decode_attention import decode_attention
from sparseattn_jax.kernels.page_scores import extend_bounds, page_bounds, page_scores
from sparseattn_jax.kernels.select_blocks import select_blocks


def _check_keys(k: jax.Array, page_size: int) -> None:
    check_positive(page_size=page_size)
    if k.ndim != 4 or 0 in k.shape:
        raise ValueError(
            f"k.shape={k.shape} must be [batch, length, heads, head_dim], no axis of size 0"
        )
    if not jnp.issubdtype(k.dtype, jnp.floating):
        raise ValueError(f"k.dtype={k.dtype} must be floating, as that of the queries; cast it")


def _check_new_keys(self: "PageBounds", new_keys: jax.Array, kv_lengths: jax.Array) -> None:
    batch, num_pages, *heads = self.key_min.shape
    if new_keys.shape[::2] != (batch, heads[0]) or new_keys.shape[3:] != (heads[1],):
        raise ValueError(
            f"new_keys.shape={new_keys.shape} must be [{batch}, new tokens, {heads[0]}, "
            f"{heads[1]}], as the bounds have it"
        )
    if new_keys.dtype != self.key_min.dtype:
        raise ValueError(
            f"new_keys.dtype={new_keys.dtype} must be that of the bounds, {self.key_min.dtype}; "
            "cast it"
        )
    _check_lengths(kv_lengths, batch, num_pages * self.page_size - new_keys.shape[1])


def _check_lengths(kv_lengths: jax.Array, batch: int, longest: int) -> None:
    if kv_lengths.shape != (batch,) or kv_lengths.dtype != jnp.int32:
        raise ValueError(
            f"kv_lengths has shape {kv_lengths.shape} and dtype {kv_lengths.dtype}; "
            f"pass int32 of shape ({batch},), one length per sequence"
        )
    lengths = concrete(kv_lengths)
    if lengths is not None and (lengths.min() < 0 or lengths.max() > longest):
        raise ValueError(
            f"kv_lengths={lengths.tolist()} must lie in [0, {longest}], so that all tokens are "
            "within the pages; clip them, or bound a longer cache"
        )


@jax.tree_util.register_dataclass
@no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PageBounds:
    """The channel-wise least and greatest keys of each page of a cache in order.

    They are 2 / page_size as large as the keys, and live as long as the cache does: made once by
    `of`, then extended by each step's new keys. See `kernels/page_scores`.

    Attributes:
        key_min: least keys of each page, in the keys' dtype; inf where a page has none.
        key_max: greatest keys, likewise; -inf where a page has none.
        page_size: tokens per page.
    """

    key_min: Float[Array, "B P K H"]
    key_max: Float[Array, "B P K H"]
    page_size: int = dataclasses.field(metadata={"static": True})

    @staticmethod
    @checked(_check_keys, check_kv_lengths)
    def of(
        k: Float[Array, "B S K H"],
        *,
        kv_lengths: Int32[Array, " B"] | None = None,
        page_size: int = 64,
    ) -> "PageBounds":
        """Of a whole cache, in one pass over its keys.

        Args:
            k: keys; slots past the lengths may hold anything.
            kv_lengths: tokens of each sequence so far, by default S.
            page_size: tokens per page. Smaller pages have tighter bounds, and more of them; the
                Hopper kernel of decode attention takes 64 and 128.

        Raises:
            ValueError: an argument is out of range or does not fit the others.
        """
        key_min, key_max = page_bounds(k, page_size=page_size, kv_lengths=kv_lengths)
        return PageBounds(key_min=key_min, key_max=key_max, page_size=page_size)

    @checked(_check_new_keys)
    def extend(
        self, new_keys: Float[Array, "B T K H"], *, kv_lengths: Int32[Array, " B"]
    ) -> "PageBounds":
        """After T tokens were appended to every sequence, exactly as `of` the longer cache.

        Args:
            new_keys: keys of the new tokens; the cost is in proportion to them.
            kv_lengths: tokens of each sequence before the new ones.

        Raises:
            ValueError: an argument does not fit the bounds or the others.
        """
        key_min, key_max = extend_bounds(
            self.key_min, self.key_max, new_keys, kv_lengths, page_size=self.page_size
        )
        return PageBounds(key_min=key_min, key_max=key_max, page_size=self.page_size)


class PageLists(NamedTuple):
    """The pages that each kv head attends to, as `kernels/decode_attention` takes them.

    Attributes:
        kv_indices: pages in ascending order; entries past the count repeat the first (0 if none).
        kv_num_blocks: how many entries count; 0 for a sequence without tokens.
        num_dropped: pages that a kv head would have kept without `top_k`.
    """

    kv_indices: Int32[Array, "B K M"]
    kv_num_blocks: Int32[Array, "B K"]
    num_dropped: Int32[Array, "B K"]


def _check_bounds(q: jax.Array, bounds: PageBounds) -> None:
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(
            f"q.shape={q.shape} must be [batch, new tokens, heads, head_dim], no axis of size 0"
        )
    batch, _, num_kv_heads, head_dim = bounds.key_min.shape
    if (q.shape[0], q.shape[3]) != (batch, head_dim) or q.shape[2] % num_kv_heads:
        raise ValueError(
            f"q.shape={q.shape} does not fit bounds of batch={batch}, num_kv_heads={num_kv_heads}, "
            f"head_dim={head_dim}; bound the keys that these queries read"
        )


def _check_selector(self: "QuestPages", q: jax.Array, bounds: PageBounds) -> None:
    check_positive(num_recent=self.num_recent)
    if self.num_first < 0:
        raise ValueError(f"num_first={self.num_first} must not be negative; 0 for none")
    num_pages, num_kv_heads = bounds.key_min.shape[1:3]
    spanned = -(-(q.shape[1] - 1) // bounds.page_size)
    least = min(self.num_first + self.num_recent + spanned, num_pages)
    if self.top_k is not None and self.top_k < least:
        raise ValueError(
            f"top_k={self.top_k} must be at least {least}, to hold num_first={self.num_first} and "
            f"num_recent={self.num_recent} pages and those of {q.shape[1]} queries; raise it, or "
            "pass None for no limit"
        )
    if self.top_p is None:
        return
    if jnp.shape(self.top_p) not in ((), (num_kv_heads,)):
        raise ValueError(
            f"top_p has shape {jnp.shape(self.top_p)}; pass a scalar, or one per kv head, of shape "
            f"({num_kv_heads},)"
        )
    shares = concrete(self.top_p)
    if shares is not None and not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(
            f"top_p={shares.tolist()} must lie in [0, 1]: it is the share of the estimated softmax "
            "mass to keep"
        )


def _check_tokens(kv_lengths: jax.Array, bounds: PageBounds) -> None:
    batch, num_pages = bounds.key_min.shape[:2]
    _check_lengths(kv_lengths, batch, num_pages * bounds.page_size)


@jax.tree_util.register_dataclass
@no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestPages:
    """Pages of the cache by upper bounds of their logits, Quest (arXiv:2406.10774) section 3.

    For each query, the softmax of its scaled bounds over the pages that it sees estimates the share
    of each page, as if all pages had as many keys and every key the page's bound for its logit. A
    page's share for a kv head is the mean over the query heads and tokens that read it: so no query
    head outshouts the others of its group by larger logits. Pages rank by that share, equal ones
    by position; for one query per kv head this is the paper's order.

    The first `num_first` pages and the recent ones are kept in any case, and count towards both
    limits. The paper leaves the first two layers of a model dense.

    Attributes:
        top_k: pages that a kv head keeps at most, and the capacity of its list; None for no limit.
            The paper's rule, with a budget of top_k * page_size tokens.
        top_p: keeps the fewest pages, by rank, whose shares reach this part of their sum, in
            [0, 1]; one for all, or one per kv head. 1 keeps all, None sets no such limit. It is
            no promise of true mass: bounds exceed logits by more on some pages than on others, and
            the exponential makes much of it. A step of the structured generator that keeps 0.9
            of the estimate has about 0.7 of the true mass.
        num_first: first pages that are kept in any case.
        num_recent: recent pages likewise: 1 keeps those that hold the step's queries, so that each
            sees itself; every further one adds the page before.
    """

    top_k: int | None = dataclasses.field(default=64, metadata={"static": True})
    top_p: float | Float32[Array, ""] | Float32[Array, " K"] | None = None
    num_first: int = dataclasses.field(default=1, metadata={"static": True})
    num_recent: int = dataclasses.field(default=1, metadata={"static": True})

    @checked(_check_bounds, _check_selector, check_scale, _check_tokens)
    def select(
        self,
        q: Float[Array, "B T N H"],
        bounds: PageBounds,
        *,
        kv_lengths: Int32[Array, " B"],
        scale: float | None = None,
    ) -> PageLists:
        """Lists pages per kv head; has no gradient, and reads no keys but the bounds.

        Args:
            q: queries of the last T tokens; head n reads kv head n // (N // K).
            bounds: of the cache, these queries' own keys included.
            kv_lengths: tokens of each sequence so far, these queries' own included.
            scale: positive factor of the logits, by default H ** -0.5.

        Raises:
            ValueError: an argument or a field is out of range or does not fit the others.
        """
        num_pages, num_kv_heads = bounds.key_min.shape[1:3]
        pages = jnp.arange(num_pages, dtype=jnp.int32)[None]
        starts = pages * bounds.page_size
        first_position = kv_lengths - q.shape[1]
        positions = first_position[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        log_shares = _log_shares(
            page_scores(q, bounds.key_min, bounds.key_max),
            starts[:, None] <= positions[..., None],
            num_kv_heads,
            q.shape[3] ** -0.5 if scale is None else scale,
        )
        if self.top_p is None:
            # Any rising function ranks alike; this one keeps apart shares too small for float32.
            threshold, ranks = jnp.float32(1.0), 1.0 / (1.0 - log_shares)
        else:
            threshold, ranks = jnp.asarray(self.top_p, jnp.float32), jnp.exp(log_shares)
        recent = first_position // bounds.page_size - (self.num_recent - 1)
        forced = (pages < self.num_first) | (pages >= recent[:, None])
        visible = starts < kv_lengths[:, None]
        indices, counts, num_dropped = select_blocks(
            ranks[:, :, None],
            jnp.broadcast_to(threshold, (num_kv_heads,)),
            forced[:, None, None],
            visible[:, None, None],
            max_blocks=self.top_k,
        )
        return PageLists(indices[:, :, 0], counts[:, :, 0], num_dropped)


def _log_shares(
    scores: Float32[Array, "B T N P"],
    visible: Bool[Array, "B T P"],
    num_kv_heads: int,
    scale: float,
) -> Float32[Array, "B K P"]:
    """The logarithm of each page's share, at most 0; -inf where no query sees the page."""
    batch, q_len, num_heads, num_pages = scores.shape
    logits = jnp.where(visible[:, :, None], scores * scale, -jnp.inf)
    totals = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    logits -= jnp.where(jnp.isneginf(totals), 0.0, totals)
    logits = logits.reshape(batch, q_len, num_kv_heads, -1, num_pages)
    num_queries = q_len * num_heads // num_kv_heads
    return jnp.minimum(jax.nn.logsumexp(logits, axis=(1, 3)) - jnp.log(num_queries), 0.0)


def _check_cache(k: jax.Array, bounds: PageBounds) -> None:
    batch, kv_len, *heads = k.shape
    wanted = (batch, -(-kv_len // bounds.page_size), *heads)
    if bounds.key_min.shape != wanted or bounds.key_min.dtype != k.dtype:
        raise ValueError(
            f"bounds of shape {bounds.key_min.shape} and dtype {bounds.key_min.dtype} are not of "
            f"k with shape {k.shape} and dtype {k.dtype}: pages of {bounds.page_size} tokens give "
            f"{wanted}; make them by PageBounds.of(k)"
        )


@overload
def sparse_decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    pages: QuestPages,
    bounds: PageBounds,
    *,
    kv_lengths: Int32[Array, " B"],
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: Backend | None = None,
) -> Float[Array, "B T N H"]: ...


@overload
def sparse_decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    pages: QuestPages,
    bounds: PageBounds,
    *,
    kv_lengths: Int32[Array, " B"],
    scale: float | None = None,
    return_lse: Literal[True],
    backend: Backend | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]: ...


@checked(check_qk, check_kv, check_scale, check_kv_lengths, _check_cache)
def sparse_decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    pages: QuestPages,
    bounds: PageBounds,
    *,
    kv_lengths: Int32[Array, " B"],
    scale: float | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Attention of the last T tokens to the pages of a cache that they choose; has no gradient.

    Reads the bounds, and the keys and values of the listed pages only. Query t of a sequence of L
    tokens stands at position L - T + t and sees the tokens of the listed pages up to its own.

    Args:
        q: queries of the last T tokens, one or a few; head n reads kv head n // (N // K).
        k: keys of the cache, in order, these queries' own included. Other slots may hold any
            finite value.
        v: values of the cache, likewise.
        pages: chooses the pages.
        bounds: of k, kept up by `PageBounds.extend`.
        kv_lengths: tokens of each sequence so far, these queries' own included.
        scale: positive factor of the logits, by default H ** -0.5.
        return_lse: whether to return the log-sum-exp too.
        backend: of the attention; the selection takes the best backend that runs.

    Returns:
        The output in q's dtype, or (output, log-sum-exp); 0 and -inf for queries before the first
        token.

    Raises:
        ValueError: an argument is out of range or does not fit the others.
        UnsupportedError: the named backend cannot run this call.
    """
    lists = pages.select(q, bounds, kv_lengths=kv_lengths, scale=scale)
    out, lse = decode_attention(
        q,
        k,
        v,
        kv_lengths=kv_lengths,
        kv_indices=lists.kv_indices,
        kv_num_blocks=lists.kv_num_blocks,
        block_kv=bounds.page_size,
        scale=scale,
        backend=backend,
    )
    return (out, lse) if return_lse else out
