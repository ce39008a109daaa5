"""What cuDNN is not given, because it could not take it or means something else by it."""

import dataclasses

import jax.numpy as jnp
import pytest

from sparseattn_jax.kernels.backends import DeviceFacts, UnsupportedError
from sparseattn_jax.kernels.dense_attention import cudnn, dense_attention

HOPPER = DeviceFacts(platform="gpu", compute_capability=(9, 0))
FACTS = cudnn.CallFacts(
    device=HOPPER,
    dtype=jnp.dtype(jnp.bfloat16),
    head_dim=128,
    is_shifted=False,
    has_masks=False,
    needs_lse=False,
)
AMPERE = DeviceFacts(platform="gpu", compute_capability=(8, 0))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": DeviceFacts(platform="cpu", compute_capability=None)}, "got no NVIDIA GPU"),
        ({"device": DeviceFacts(platform="gpu", compute_capability=(7, 5))}, "got 7.5"),
        ({"dtype": jnp.dtype(jnp.float32)}, "needs bfloat16 or float16, got float32"),
        ({"head_dim": 100}, "multiple of 8 up to 256, got 100"),
        ({"head_dim": 256, "device": AMPERE}, "multiple of 8 up to 128, got 256"),
        ({"is_shifted": True}, "queries at the start of the keys"),
        ({"has_masks": True}, "a query that sees no key"),
        ({"needs_lse": True}, "rounds the log-sum-exp"),
    ],
)
def test_refusal(change: dict, reason: str) -> None:
    assert cudnn.refusal(FACTS) is None
    assert reason in (cudnn.refusal(dataclasses.replace(FACTS, **change)) or "")


def test_is_refused_without_a_gpu() -> None:
    q = jnp.ones((1, 8, 2, 8), jnp.bfloat16)
    with pytest.raises(UnsupportedError, match="cudnn: needs compute capability"):
        dense_attention(q, q, q, is_causal=True, scale=1.0, backend="cudnn")
