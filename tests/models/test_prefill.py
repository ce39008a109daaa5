"""Prompts in chunks: the same logits and the same cache whatever the chunks, as simulated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseattn_jax import FlexPrefill, XAttention
from sparseattn_jax.configuration import Configuration
from sparseattn_jax.kv_cache import KVCache
from sparseattn_jax.models import prefill as module
from sparseattn_jax.models.policy import Policy
from sparseattn_jax.models.prefill import prefill
from tests.models.small_models import (
    CAPACITY,
    CHUNK_SIZE,
    CONFIG,
    EVERYTHING,
    POLICIES,
    STREAMING,
    drawn,
    prompts,
    simulated,
)

LENGTHS = (21, 9, 14)
TOKENS = np.zeros((3, 21), np.int32)
for row, prompt in zip(TOKENS, prompts(*LENGTHS), strict=True):
    row[: len(prompt)] = prompt
BATCH_LENGTHS = np.array(LENGTHS, np.int32)


def read(
    policy: Policy, chunk_size: int, lengths: tuple[int, ...] = LENGTHS, **options
) -> tuple[jax.Array, KVCache]:
    cache = policy.create_cache(CONFIG, batch=3, capacity=CAPACITY)
    of_rows = np.array(lengths, np.int32)
    return prefill(drawn()[0], TOKENS, of_rows, cache, policy, chunk_size=chunk_size, **options)


@functools.cache
def in_chunks(name: str) -> tuple[jax.Array, KVCache]:
    return read(POLICIES[name], CHUNK_SIZE)


@pytest.mark.parametrize("name", [pytest.param("everything", marks=pytest.mark.full), "streaming"])
def test_logits_are_those_of_the_simulation(name: str) -> None:
    """Some prompts end in an earlier chunk than others."""
    logits, cache = in_chunks(name)
    expected = [simulated(name, prompt, 1)[1][0] for prompt in prompts(*LENGTHS)]
    np.testing.assert_allclose(logits, np.stack(expected), atol=2e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(cache.lengths, LENGTHS)


@pytest.mark.full
@pytest.mark.parametrize("chunk_size", [32, 8, 5])
@pytest.mark.parametrize("name", ["everything", "streaming"])
def test_chunks_make_no_difference(name: str, chunk_size: int) -> None:
    logits, cache = read(POLICIES[name], chunk_size)
    expected_logits, expected_cache = in_chunks(name)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cache, expected_cache)


def chosen_by_xattention(block_size: int, chunk_size: int) -> jax.Array:
    strategy = XAttention(threshold=0.5, stride=4, block_size=block_size)
    return read(Policy.of(CONFIG, Configuration(strategy=strategy)), chunk_size)[0]


@pytest.mark.full
def test_xattention_chooses_the_same_in_chunks_of_whole_blocks() -> None:
    whole = chosen_by_xattention(4, 32)
    assert np.abs(whole - in_chunks("everything")[0]).max() > 1e-2  # something was left out
    np.testing.assert_allclose(chosen_by_xattention(4, 8), whole, atol=1e-5)


@pytest.mark.full
def test_flexprefill_chooses_by_the_chunk() -> None:
    strategy = FlexPrefill(gamma=0.5, block_size=4)
    policy = Policy.of(CONFIG, Configuration(strategy=strategy))
    assert np.abs(read(policy, 8)[0] - read(policy, 32)[0]).max() > 1e-3


def test_says_how_many_tokens_are_done() -> None:
    seen: list[int] = []
    read(STREAMING, CHUNK_SIZE, report=seen.append)
    assert seen == [16, 21]


def test_the_last_chunk_is_rounded_up_within_the_cache() -> None:
    assert module._bounds(9000, 4096, None) == [0, 4096, 8192, 9088]
    assert module._bounds(9000, 4096, 9010) == [0, 4096, 8192, 9010]
    assert module._bounds(4096, 4096, None) == [0, 4096]
    assert module._bounds(5, 100, None) == [0, 100]


def test_the_cache_is_donated() -> None:
    cache = STREAMING.create_cache(CONFIG, batch=3, capacity=CAPACITY)
    prefill(drawn()[0], TOKENS, BATCH_LENGTHS, cache, STREAMING, chunk_size=CHUNK_SIZE)
    assert cache.full_k.is_deleted() and cache.ring_v.is_deleted()


@pytest.mark.full
@pytest.mark.parametrize("start", [0, CHUNK_SIZE])
def test_the_cache_is_changed_in_place(start: int) -> None:
    graphdef, params = nnx.split(drawn()[0])
    cache = jax.eval_shape(lambda: STREAMING.create_cache(CONFIG, batch=3, capacity=65536))
    tokens = jax.ShapeDtypeStruct((3, CHUNK_SIZE), jnp.int32)
    hidden = jax.ShapeDtypeStruct((3, CONFIG.embed_dim), jnp.float32)
    arrays = tokens, jax.ShapeDtypeStruct((3,), jnp.int32), hidden, cache
    lowered = module._chunk.lower(graphdef, params, *arrays, STREAMING, start=start)
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.memory_usage()
    assert memory.temp_size_in_bytes < cache.memory_usage() / 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": TOKENS[0]}, r"tokens has shape \(21,\) .* of shape \[batch, length\]"),
        ({"tokens": TOKENS * 1.0}, "tokens has shape .* dtype float64"),
        ({"lengths": np.ones(2, np.int32)}, r"lengths has shape \(2,\) .* int32 of shape \(3,\)"),
        ({"lengths": np.int32([3, 0, 5])}, r"lengths=\[3, 0, 5\] must lie in \[1, 21\]"),
        ({"lengths": np.int32([3, 22, 5])}, r"lengths=\[3, 22, 5\] must lie in \[1, 21\]"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"batch": 2}, "cache is for 2 sequences, tokens has 3"),
        ({"capacity": 16}, "the longest prompt has 21 tokens, the cache has a capacity of 16"),
        ({"used": True}, r"cache.lengths=\[4, 4, 4\] must be 0"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_refuses(changes: dict, sentence: str) -> None:
    call = {"tokens": TOKENS, "lengths": BATCH_LENGTHS, "chunk_size": 8} | changes
    cache = EVERYTHING.create_cache(
        CONFIG, batch=call.pop("batch", 3), capacity=call.pop("capacity", 32)
    )
    if call.pop("used", False):
        cache = cache.advance(jnp.full(3, 4, jnp.int32))
    with pytest.raises(ValueError, match=sentence):
        prefill(drawn()[0], cache=cache, policy=EVERYTHING, **call)
