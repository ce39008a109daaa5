"""The tiles that the kernel chooses, and the calls that it refuses with a sentence."""

import dataclasses

import jax.numpy as jnp
import pytest

from sparseattn_jax.kernels import mosaic
from sparseattn_jax.kernels.backends import DeviceFacts, UnsupportedError
from sparseattn_jax.kernels.decode_attention import decode_attention, mosaic_sm90, tiling
from sparseattn_jax.kernels.decode_attention.tiling import CallFacts

HOPPER = DeviceFacts(platform="gpu", compute_capability=(9, 0), multiprocessors=132)
TAKEN = CallFacts(
    device=HOPPER,
    dtype=jnp.dtype(jnp.bfloat16),
    head_dim=128,
    q_len=1,
    group=4,
    capacity=1024,
    block_kv=None,
)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("block_kv", [None, 64, 128])
def test_the_choice_fits_a_multiprocessor(head_dim: int, block_kv: int | None):
    config = tiling.tile_config(head_dim, block_kv)
    used = tiling.shared_memory_bytes(config, head_dim)
    tile = config.workers * config.kv_tile * head_dim * 2
    assert mosaic.SHARED_MEMORY_BYTES - tile < used <= mosaic.SHARED_MEMORY_BYTES
    assert config.stages * tile >= 128 * 1024
    assert (block_kv or 128) % config.kv_tile == 0


@pytest.mark.parametrize(
    ("group", "rows"), [(1, 8), (2, 8), (3, 16), (4, 8), (6, 16), (7, 16), (8, 8), (12, 16)]
)
def test_the_rows_of_a_group_hold_it_wherever_it_begins(group: int, rows: int):
    assert tiling.padded_group(group) == rows
    firsts = [tiling.first_row(head, group) for head in range(16)]
    assert all(8 * (head * group // 8) + firsts[head] == head * group for head in range(16))
    assert max(firsts) + group <= rows


@pytest.mark.parametrize("kv_tile", [0, 60, 264])
def test_a_tile_that_wgmma_does_not_take_raises(kv_tile: int):
    with pytest.raises(ValueError, match=f"kv_tile={kv_tile} must be a multiple of 8 up to 256"):
        tiling.TileConfig(workers=1, kv_tile=kv_tile, stages=2)


@pytest.mark.parametrize(("workers", "stages"), [(0, 2), (1, 1)])
def test_a_count_that_is_too_low_raises(workers: int, stages: int):
    with pytest.raises(ValueError, match="at least 1 worker, and stages for a key and a value"):
        tiling.TileConfig(workers=workers, kv_tile=64, stages=stages)


REFUSALS = [
    (
        {"device": DeviceFacts(platform="cpu", compute_capability=None)},
        "needs compute capability 9.x (Hopper), got no NVIDIA GPU",
    ),
    (
        {"device": dataclasses.replace(HOPPER, compute_capability=(10, 0))},
        "needs compute capability 9.x (Hopper), got 10.0",
    ),
    ({"dtype": jnp.dtype(jnp.float32)}, "needs bfloat16 or float16, got float32"),
    ({"head_dim": 96}, "needs head_dim 64, 128 or 256, got 96"),
    ({"block_kv": 32}, "needs blocks of 64 or 128, got 32"),
    ({"capacity": 1001}, "needs a cache capacity that is a multiple of 8, got 1001"),
    (
        {"q_len": 5, "group": 12},
        "takes 64 rows of queries per kv head, got 80: 5 tokens of 12 heads, in tiles of 8 rows",
    ),
    (
        {"device": dataclasses.replace(HOPPER, ptxas_version=(12, 8, 93))},
        "ptxas 12.8.93 miscompiles causal kernels; install 12.9.86 or newer, or CUDA 13",
    ),
]


@pytest.mark.parametrize(
    ("changed", "sentence"), REFUSALS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_refusals(changed: dict[str, object], sentence: str):
    assert mosaic_sm90.refusal(dataclasses.replace(TAKEN, **changed)) == sentence


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("q_len", "group"), [(1, 64), (8, 8), (4, 10)])
def test_what_is_taken(dtype: type, head_dim: int, q_len: int, group: int):
    facts = dataclasses.replace(
        TAKEN, dtype=jnp.dtype(dtype), head_dim=head_dim, q_len=q_len, group=group, block_kv=64
    )
    assert mosaic_sm90.refusal(facts) is None


def test_the_op_raises_the_sentence():
    x = jnp.zeros((1, 8, 1, 32), jnp.bfloat16)  # refused on every device
    with pytest.raises(UnsupportedError, match="mosaic_sm90: needs "):
        decode_attention(x[:, :1], x, x, kv_lengths=jnp.array([8]), backend="mosaic_sm90")
