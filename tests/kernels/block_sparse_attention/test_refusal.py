"""What the Hopper kernel refuses, and the sentence that says why."""

import dataclasses

import jax.numpy as jnp
import pytest

from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.backends import DeviceFacts, UnsupportedError
from sparseattn_jax.kernels.block_sparse_attention import block_sparse_attention, mosaic_sm90
from sparseattn_jax.kernels.block_sparse_attention.tiling import CallFacts

HOPPER = DeviceFacts(platform="gpu", compute_capability=(9, 0), multiprocessors=132)
TAKEN = CallFacts(
    device=HOPPER,
    dtype=jnp.dtype(jnp.bfloat16),
    head_dim=128,
    block_q=128,
    block_kv=128,
    has_segment_ids=False,
)


def gpu(major: int, minor: int) -> DeviceFacts:
    return dataclasses.replace(HOPPER, compute_capability=(major, minor))


REFUSALS = [
    (
        {"device": DeviceFacts(platform="cpu", compute_capability=None)},
        "needs compute capability 9.x (Hopper), got no NVIDIA GPU",
    ),
    ({"device": gpu(8, 0)}, "needs compute capability 9.x (Hopper), got 8.0"),
    ({"device": gpu(10, 0)}, "needs compute capability 9.x (Hopper), got 10.0"),
    ({"dtype": jnp.dtype(jnp.float32)}, "needs bfloat16 or float16, got float32"),
    ({"head_dim": 96}, "needs head_dim 64, 128 or 256, got 96"),
    ({"block_q": 32}, "needs blocks of 64 or 128, got 32x128"),
    ({"block_kv": 32}, "needs blocks of 64 or 128, got 128x32"),
    ({"has_segment_ids": True}, "takes no segment_ids yet"),
    *(
        (
            {"device": dataclasses.replace(HOPPER, ptxas_version=(12, minor, patch))},
            f"ptxas 12.{minor}.{patch} miscompiles causal kernels; "
            "install 12.9.86 or newer, or CUDA 13",
        )
        for minor, patch in [(8, 61), (8, 93), (9, 30), (9, 41)]
    ),
]


@pytest.mark.parametrize(
    ("changed", "sentence"), REFUSALS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_refusals(changed: dict[str, object], sentence: str):
    assert mosaic_sm90.refusal(dataclasses.replace(TAKEN, **changed)) == sentence


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_is_taken(dtype: type, head_dim: int):
    facts = dataclasses.replace(TAKEN, dtype=jnp.dtype(dtype), head_dim=head_dim)
    assert mosaic_sm90.refusal(facts) is None


@pytest.mark.parametrize("version", [None, (12, 6, 85), (12, 8, 60), (12, 9, 86), (13, 0, 88)])
def test_a_ptxas_that_is_right_or_unknown_is_taken(version: tuple[int, int, int] | None):
    device = dataclasses.replace(HOPPER, ptxas_version=version)
    assert mosaic_sm90.refusal(dataclasses.replace(TAKEN, device=device)) is None


def test_the_op_raises_the_sentence():
    q = jnp.zeros((1, 64, 1, 32), jnp.bfloat16)  # refused on every device
    lists = block_lists.from_dense(jnp.ones((1, 1, 1, 1), bool))
    with pytest.raises(UnsupportedError, match="mosaic_sm90: needs "):
        block_sparse_attention(
            q,
            q,
            q,
            *lists,
            block_q=64,
            block_kv=64,
            is_causal=True,
            scale=1.0,
            backend="mosaic_sm90",
        )
