"""The tiles that the kernels choose fit a multiprocessor and divide the blocks."""

import dataclasses
import itertools

import jax.numpy as jnp
import pytest

from sparseattn_jax.kernels import mosaic
from sparseattn_jax.kernels.block_sparse_attention import tiling

SHAPES = list(itertools.product((64, 128, 256), (64, 128), (64, 128)))
WARPGROUP_THREADS = 128


@pytest.mark.parametrize(("head_dim", "block_q", "block_kv"), SHAPES)
def test_the_choice_fits_a_multiprocessor(head_dim: int, block_q: int, block_kv: int):
    config = tiling.tile_config(head_dim, block_q, block_kv)
    for dtype in (jnp.bfloat16, jnp.float16):
        used = tiling.shared_memory_bytes(config, head_dim, jnp.dtype(dtype))
        assert used <= mosaic.SHARED_MEMORY_BYTES
    assert config.threads * WARPGROUP_THREADS <= 1024


@pytest.mark.parametrize(("head_dim", "block_q", "block_kv"), SHAPES)
def test_the_choice_divides_the_blocks(head_dim: int, block_q: int, block_kv: int):
    config = tiling.tile_config(head_dim, block_q, block_kv)
    assert block_kv % config.kv_tile == 0
    assert config.warpgroups * mosaic.WARPGROUP_ROWS == block_q


def test_shared_memory_is_that_of_the_tiles_and_barriers():
    config = tiling.tile_config(128, 128, 128)
    tile = 128 * 128 * 2
    barriers = 2 * (2 + 2 + 2)  # filled and freed, of each q, k and v slot
    used = tiling.shared_memory_bytes(config, 128, jnp.dtype(jnp.bfloat16))
    assert used == (1 + 2 + 2 + 1) * tile + 8 * barriers


def test_two_stages_of_wide_heads_do_not_fit():
    config = dataclasses.replace(tiling.tile_config(256, 128, 128), kv_tile=128)
    used = tiling.shared_memory_bytes(config, 256, jnp.dtype(jnp.bfloat16))
    assert used > mosaic.SHARED_MEMORY_BYTES


@pytest.mark.parametrize("kv_tile", [0, 60, 264])
def test_a_tile_that_wgmma_does_not_take_raises(kv_tile: int):
    config = tiling.tile_config(128, 128, 128)
    with pytest.raises(ValueError, match=f"kv_tile={kv_tile} must be a multiple of 8 up to 256"):
        dataclasses.replace(config, kv_tile=kv_tile)


@pytest.mark.parametrize("name", ["workers", "warpgroups", "k_stages", "v_stages"])
def test_a_count_below_one_raises(name: str):
    config = tiling.tile_config(128, 128, 128)
    with pytest.raises(ValueError, match=rf"{name}=0.*every count must be at least 1"):
        dataclasses.replace(config, **{name: 0})


def test_a_row_that_is_no_multiple_of_the_swizzle_raises():
    with pytest.raises(ValueError, match="the last axis must be a multiple of 64"):
        mosaic.tiles((64, 96), jnp.dtype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("head_dim", "block_kv"), list(itertools.product((64, 128, 256), (64, 128)))
)
def test_the_choice_of_the_backward_fits_a_multiprocessor(head_dim: int, block_kv: int):
    config = tiling.vjp_config(head_dim, block_kv)
    for dtype in (jnp.bfloat16, jnp.float16):
        used = tiling.vjp_shared_memory_bytes(config, head_dim, jnp.dtype(dtype))
        assert used <= mosaic.SHARED_MEMORY_BYTES
    assert block_kv % config.kv_tile == 0


def test_shared_memory_of_the_backward_is_that_of_the_tiles_and_barriers():
    config = tiling.vjp_config(128, 128)
    keys_and_values, queries, d_out, d_scores = 2 * 128, 3 * 64, 2 * 64, 2 * 64
    tiles = (keys_and_values + queries + d_out + d_scores) * 128 * 2
    d_q, statistics = 64 * 128 * 4, 2 * 2 * 64 * 4
    numbers = 1024  # no array takes less
    barriers = 2 * (1 + 3 + 2 + 2) + 1
    used = tiling.vjp_shared_memory_bytes(config, 128, jnp.dtype(jnp.bfloat16))
    assert used == tiles + d_q + statistics + numbers + 8 * barriers


def test_a_key_tile_of_the_backward_that_no_warpgroups_share_raises():
    config = tiling.vjp_config(128, 128)
    with pytest.raises(ValueError, match="kv_tile=256 must be 64 or 128"):
        dataclasses.replace(config, kv_tile=256)


@pytest.mark.parametrize("name", ["q_stages", "d_out_stages"])
def test_a_count_of_the_backward_below_one_raises(name: str):
    config = tiling.vjp_config(128, 128)
    with pytest.raises(ValueError, match=rf"{name}=0.*every count must be at least 1"):
        dataclasses.replace(config, **{name: 0})
