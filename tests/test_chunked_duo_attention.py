"""DuoAttention in chunks of a prefill, then token by token: all as one dense simulation has it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from sparseattn_jax import DuoAttention, Full, prefill_attention
from sparseattn_jax.kernels.decode_attention import decode_attention
from tests.oracles import attention as oracle
from tests.oracles import streaming

B, N, K, H = 2, 4, 2, 16
SINK, RECENT = 5, 12
PREFILL, LENGTH, CAPACITY = 70, 100, 128  # the ring goes round twice while decoding
CHUNKS = (0, 32, 33, PREFILL)
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def operands() -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    shapes = (B, LENGTH, N, H), (B, LENGTH, K, H), (B, LENGTH, K, H)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return q, k, v


@pytest.fixture(scope="module")
def simulated(operands: tuple[Array, Array, Array]) -> np.ndarray:
    """Of all tokens at once: kv head 0 sees everything, kv head 1 its window."""
    sizes = {
        "sink_sizes": [LENGTH, LENGTH, SINK, SINK],
        "recent_sizes": [LENGTH, LENGTH, RECENT, RECENT],
    }
    keep = streaming.visible_pairs(B, LENGTH, LENGTH, **sizes)
    return oracle.attention(*operands, keep)[0]


def test_chunks_of_a_prefill(operands: tuple[Array, Array, Array], simulated: np.ndarray):
    q, k, v = operands
    strategy = DuoAttention(
        retrieval=Full(block_size=16),
        retrieval_heads=jnp.array([True, False]),
        sink_size=SINK,
        recent_size=RECENT,
    )
    outs = [
        prefill_attention(q[:, start:stop], k[:, :stop], v[:, :stop], strategy)
        for start, stop in itertools.pairwise(CHUNKS)
    ]
    np.testing.assert_allclose(
        jnp.concatenate(outs, axis=1), simulated[:, :PREFILL], atol=TOLERANCE
    )


def test_decode_over_two_caches(operands: tuple[Array, Array, Array], simulated: np.ndarray):
    """The retrieval head's holds every token, the streaming head's sinks and a ring."""
    q, k, v = operands
    step = jax.jit(decode_attention)
    for length in range(PREFILL + 1, LENGTH + 1):
        of_full, of_ring = q[:, length - 1 : length, :2], q[:, length - 1 : length, 2:]
        lengths = jnp.full(B, length, jnp.int32)
        full = (_static(x[:, :length, :1]) for x in (k, v))
        out, _ = step(of_full, *full, kv_lengths=lengths)
        tokens = _tokens_in_ring(length)
        ring = (x[:, tokens, 1:] for x in (k, v))
        positions = jnp.broadcast_to(jnp.asarray(tokens), (B, tokens.size))
        ring_out, _ = step(of_ring, *ring, kv_lengths=lengths, kv_positions=positions)
        found = jnp.concatenate([out, ring_out], axis=2)
        np.testing.assert_allclose(
            found, simulated[:, length - 1 : length], atol=TOLERANCE, err_msg=f"{length=}"
        )


@pytest.mark.parametrize("length", [PREFILL + 1, LENGTH])
def test_static_and_growing_caches_agree(operands: tuple[Array, Array, Array], length: int):
    q, k, v = operands
    queries, lengths = q[:, length - 1 : length], jnp.full(B, length, jnp.int32)
    attend = functools.partial(decode_attention, queries, kv_lengths=lengths)
    growing = attend(k[:, :length], v[:, :length])
    static = attend(*(_static(x[:, :length]) for x in (k, v)))
    for one, other in zip(growing, static, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)


def _static(x: Array) -> Array:
    """In a cache of fixed capacity, whose free slots hold what must not be seen."""
    free = ((0, 0), (0, CAPACITY - x.shape[1]), (0, 0), (0, 0))
    return jnp.pad(x, free, constant_values=1e3)


def _tokens_in_ring(length: int) -> np.ndarray:
    """The token of each slot after so many were written: sinks, then a ring."""
    tokens = np.zeros(SINK + RECENT, np.int32)
    for token in range(length):
        tokens[token if token < SINK else SINK + (token - SINK) % RECENT] = token
    return tokens
