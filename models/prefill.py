"""The prompt: tokens in chunks through the model, into the cache, by a policy."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, PyTree

from sparseattn_jax.attention import prefill_attention
from sparseattn_jax.checks import check_positive, checked
from sparseattn_jax.kv_cache import KVCache
from sparseattn_jax.models.llama import Llama
from sparseattn_jax.models.policy import Policy, PrefillAttention

CHUNK_SIZE = 8192

# Of the last chunk's size, so that prompts of many lengths share few programs.
_SIZE_STEP = 128


def _check_prompts(
    tokens: np.ndarray | jax.Array, lengths: np.ndarray | jax.Array, cache: KVCache, chunk_size: int
) -> None:
    check_positive(chunk_size=chunk_size)
    if tokens.ndim != 2 or tokens.dtype != np.int32:
        raise ValueError(
            f"tokens has shape {tokens.shape} and dtype {tokens.dtype}; it must be int32 of shape "
            "[batch, length]"
        )
    batch, length = tokens.shape
    if lengths.shape != (batch,) or lengths.dtype != np.int32:
        raise ValueError(
            f"lengths has shape {lengths.shape} and dtype {lengths.dtype}; pass int32 of shape "
            f"({batch},), the length of each prompt"
        )
    if lengths.min() < 1 or lengths.max() > length:
        raise ValueError(
            f"lengths={lengths.tolist()} must lie in [1, {length}]: a prompt has a token at least, "
            "and no more than its row"
        )
    if cache.lengths.shape != (batch,):
        raise ValueError(
            f"cache is for {len(cache.lengths)} sequences, tokens has {batch}; create one for these"
        )
    if np.any(np.asarray(cache.lengths)):
        raise ValueError(
            f"cache.lengths={np.asarray(cache.lengths).tolist()} must be 0: prompts are read from "
            "their first token on; create an empty cache"
        )
    slots = _slots(cache)
    if slots is not None and length > slots:
        raise ValueError(
            f"the longest prompt has {length} tokens, the cache has a capacity of {slots}; create "
            "a larger one"
        )


@checked(_check_prompts)
def prefill(
    model: Llama,
    tokens: Int32[np.ndarray, "B T"] | Int32[Array, "B T"],
    lengths: Int32[np.ndarray, " B"] | Int32[Array, " B"],
    cache: KVCache,
    policy: Policy,
    *,
    chunk_size: int = CHUNK_SIZE,
    attention: PrefillAttention = prefill_attention,
    report: Callable[[int], None] | None = None,
) -> tuple[Float32[Array, "B V"], KVCache]:
    """Reads prompts into an empty cache, which is donated; every chunk honours the policy.

    Attention to every token, or to windows exact to the token, does not depend on the chunks. Nor
    does what strategies select that judge each block of queries by itself, as XAttention and block
    windows do, if chunk_size is a multiple of their block_size. FlexPrefill and MInference judge by
    the last queries they get, which are those of the chunk. A dynamic rotary scaling depends on the
    chunks too, beyond the length that it begins at: as in transformers, keys keep the frequencies
    of their call.

    Args:
        model: the model.
        tokens: of the prompts, each followed by any tokens as padding.
        lengths: tokens of each prompt, at least 1.
        cache: made by `policy.create_cache`; of no use afterwards.
        policy: what the layers attend to.
        chunk_size: tokens at a time. A program is compiled for each start and size of a chunk; the
            size of the last one is rounded up to a multiple of 128.
        attention: by a strategy; on several devices prefill_attention wrapped by
            `sequence_parallel.wrap`, for which starts and sizes of chunks divide by the devices.
        report: is told how many of the T tokens are done, after each chunk.

    Returns:
        The logits of the token that follows each prompt, and the cache.

    Raises:
        ValueError: an argument is out of range or does not fit the others.
    """
    tokens, lengths = np.asarray(tokens), np.asarray(lengths)
    graphdef, params = nnx.split(model)
    batch, length = tokens.shape
    hidden = jnp.zeros((batch, model.config.embed_dim), model.config.dtype)
    for start, stop in itertools.pairwise(_bounds(length, chunk_size, _slots(cache))):
        chunk = np.zeros((batch, stop - start), np.int32)
        chunk[:, : length - start] = tokens[:, start:stop]
        hidden, cache = _chunk(
            *(graphdef, params, jnp.asarray(chunk), jnp.asarray(lengths), hidden, cache, policy),
            start=start,
            attention=attention,
        )
        if report is not None:
            jax.block_until_ready(hidden)
            report(min(stop, length))
    return _logits(graphdef, params, hidden), cache


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "start", "attention"),
    donate_argnames=("hidden", "cache"),
)
def _chunk(
    graphdef: nnx.GraphDef,
    params: PyTree,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
    hidden: Float[Array, "B D"],
    cache: KVCache,
    policy: Policy,
    *,
    start: int,
    attention: PrefillAttention,
) -> tuple[Float[Array, "B D"], KVCache]:
    """The hidden states of the prompts' last tokens, as far as they are in this chunk or before."""
    model = nnx.merge(graphdef, params)
    size = tokens.shape[1]
    num_new = jnp.clip(lengths - start, 0, size)
    # The greatest position is a token's, for rotary embeddings that depend on it.
    positions = jnp.minimum(jnp.arange(start, start + size, dtype=jnp.int32), lengths.max() - 1)
    states, cache = model.cached_hidden_states(
        tokens,
        cache,
        runs=policy.prefill_runs(num_new, length=start + size, attention=attention),
        positions=jnp.broadcast_to(positions, tokens.shape),
    )
    last = lengths - 1 - start
    found = jnp.take_along_axis(states, jnp.clip(last, 0, size - 1)[:, None, None], axis=1)[:, 0]
    is_here = (last >= 0) & (last < size)
    return jnp.where(is_here[:, None], found, hidden), cache.advance(num_new)


@functools.partial(jax.jit, static_argnames="graphdef")
def _logits(
    graphdef: nnx.GraphDef, params: PyTree, hidden: Float[Array, "B D"]
) -> Float32[Array, "B V"]:
    return nnx.merge(graphdef, params).logits(hidden[:, None])[:, 0]


def _slots(cache: KVCache) -> int | None:
    """Tokens that the cache has room for, None if all its heads stream."""
    return cache.capacity if cache.full_k.shape[0] else None


def _bounds(length: int, chunk_size: int, slots: int | None) -> list[int]:
    """Where chunks begin, and the end of the last one, which may lie behind the prompts'."""
    bounds = list(range(0, length, chunk_size))
    rest = length - bounds[-1]
    end = bounds[-1] + min(chunk_size, -(-rest // _SIZE_STEP) * _SIZE_STEP)
    return [*bounds, end if slots is None else min(end, slots)]
