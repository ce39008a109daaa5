"""Dense attention by cuDNN, through `jax.nn.dot_product_attention`, where its meaning is ours."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseattn_jax.kernels.backends import DeviceFacts


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallFacts:
    """What a backend needs to know to accept or refuse a call.

    Attributes:
        device: the device that will run it.
        dtype: of q, k and v.
        head_dim: of q, k and v.
        is_shifted: whether the call is causal with fewer queries than keys.
        has_masks: whether anything but causality hides keys.
        needs_lse: whether the log-sum-exp is asked for.
    """

    device: DeviceFacts
    dtype: jnp.dtype
    head_dim: int
    is_shifted: bool
    has_masks: bool
    needs_lse: bool


def refusal(facts: CallFacts) -> str | None:
    """Why cuDNN cannot take a call with these facts; None if it can."""
    capability = facts.device.compute_capability
    if capability is None or capability < (8, 0):
        found = "no NVIDIA GPU" if capability is None else f"{capability[0]}.{capability[1]}"
        return f"needs compute capability 8.0 or higher, got {found}"
    if facts.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {facts.dtype.name}"
    widest = 256 if capability >= (9, 0) else 128
    if facts.head_dim % 8 or facts.head_dim > widest:
        return f"needs a head_dim that is a multiple of 8 up to {widest}, got {facts.head_dim}"
    if facts.is_shifted:
        return "puts causal queries at the start of the keys, where ours stand at their end"
    if facts.has_masks:
        return "gives a query that sees no key an output, where ours is 0; pass no mask or lengths"
    if facts.needs_lse:
        return "rounds the log-sum-exp to q's dtype; do without it"
    return None


def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: None,
    kv_lengths: None,
    segment_ids: None,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Float[Array, "B T N H"], None]:
    """The output, for calls that `refusal` lets through; its gradients are cuDNN's too."""
    del mask, kv_lengths, segment_ids
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=is_causal, implementation="cudnn"
    )
    return out, None
