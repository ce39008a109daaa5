"""Checks of public arguments: what is wrong, with the values, and what to do."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

if TYPE_CHECKING:
    from sparseattn_jax.block_mask import BlockMask
    from sparseattn_jax.pattern import SparsePattern

_DTYPES = ("bfloat16", "float16", "float32")


def checked[**P, R](*checks: Callable[..., None]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: runs checks on a call's arguments, matched by parameter name, before the call.

    It is the outermost decorator of a public function, so that a user sees these sentences
    whatever else looks at the arguments.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        wanted = [(check, list(inspect.signature(check).parameters)) for check in checks]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            for check, names in wanted:
                check(*(bound.arguments[name] for name in names))
            return function(*args, **kwargs)

        return call

    return decorate


def check_qk(q: jax.Array, k: jax.Array) -> None:
    """q is [B, T, N, H] and k is [B, S, K, H] of one dtype, and K divides N."""
    for name, array in (("q", q), ("k", k)):
        if array.ndim != 4:
            raise ValueError(
                f"{name}.shape={array.shape} must be [batch, length, heads, head_dim]; "
                "add the axes that are missing"
            )
        if array.dtype not in _DTYPES:
            raise ValueError(f"{name}.dtype={array.dtype} must be one of {_DTYPES}; cast it")
    if q.dtype != k.dtype:
        raise ValueError(f"q.dtype={q.dtype} and k.dtype={k.dtype} must agree; cast one of them")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"batch sizes of q ({q.shape[0]}) and k ({k.shape[0]}) must agree")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"head_dim of q ({q.shape[3]}) and k ({k.shape[3]}) must agree")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q.shape={q.shape} and k.shape={k.shape} must have no axis of size 0")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"num_heads={q.shape[2]} must be a multiple of num_kv_heads={k.shape[2]}; "
            "repeat or drop heads so that each kv head serves the same number of query heads"
        )


def check_kv(k: jax.Array, v: jax.Array) -> None:
    """v has k's shape and dtype."""
    if v.shape != k.shape:
        raise ValueError(f"v.shape={v.shape} must equal k.shape={k.shape}")
    if v.dtype != k.dtype:
        raise ValueError(f"v.dtype={v.dtype} and k.dtype={k.dtype} must agree; cast one of them")


def check_causal(q: jax.Array, k: jax.Array, is_causal: bool) -> None:
    """Causal queries stand at the end of the keys, so there are no more of them than keys."""
    if is_causal and q.shape[1] > k.shape[1]:
        raise ValueError(
            f"q_len={q.shape[1]} must not exceed kv_len={k.shape[1]} when is_causal: queries stand "
            "at the end of the keys; pass the keys of all queries or is_causal=False"
        )


def check_kv_lengths(k: jax.Array, kv_lengths: jax.Array | None) -> None:
    """kv_lengths is one int32 per sequence, within the keys."""
    if kv_lengths is None:
        return
    if kv_lengths.shape != k.shape[:1] or kv_lengths.dtype != jnp.int32:
        raise ValueError(
            f"kv_lengths has shape {kv_lengths.shape} and dtype {kv_lengths.dtype}; "
            f"pass int32 of shape {k.shape[:1]}, one length per sequence"
        )
    lengths = concrete(kv_lengths)
    if lengths is not None and (lengths.min() < 0 or lengths.max() > k.shape[1]):
        raise ValueError(
            f"kv_lengths={lengths.tolist()} must lie in [0, kv_len={k.shape[1]}]; clip them"
        )


def check_mask(q: jax.Array, k: jax.Array, mask: jax.Array | None) -> None:
    """A dense mask is boolean or floating, one for all, per sequence, or per sequence and head."""
    if mask is None:
        return
    wanted = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask.dtype != jnp.bool_ and not jnp.issubdtype(mask.dtype, jnp.floating):
        raise ValueError(
            f"mask.dtype={mask.dtype} must be bool (true where a query sees a key) or floating "
            "(added to the logits); cast it"
        )
    shape = mask_shape(mask)
    fits = len(shape) == 4 and shape[2:] == wanted[2:]
    if not fits or any(n not in (1, full) for n, full in zip(shape, wanted, strict=True)):
        B, N, T, S = wanted
        raise ValueError(
            f"mask.shape={mask.shape} must be [T, S], [B, T, S] or [B, N, T, S] with B={B} or 1, "
            f"N={N} or 1, T={T} and S={S}; broadcast or cut it"
        )


def mask_shape(mask: jax.Array) -> tuple[int, ...]:
    """The shape of a dense mask with axes for batch and heads, where it has none."""
    if mask.ndim == 3:
        return mask.shape[0], 1, *mask.shape[1:]
    return (1,) * (4 - mask.ndim) + mask.shape


def check_segment_ids(k: jax.Array, segment_ids: jax.Array | None) -> None:
    """segment_ids is one int32 per key."""
    if segment_ids is None:
        return
    if segment_ids.shape != k.shape[:2] or segment_ids.dtype != jnp.int32:
        raise ValueError(
            f"segment_ids has shape {segment_ids.shape} and dtype {segment_ids.dtype}; "
            f"pass int32 of shape {k.shape[:2]}, one id per key position"
        )


def check_block_mask(q: jax.Array, k: jax.Array, block_mask: "BlockMask") -> None:
    """The mask was made for these lengths, sequences and heads."""
    lengths = (q.shape[1], k.shape[1])
    if (block_mask.q_len, block_mask.kv_len) != lengths:
        raise ValueError(
            f"block_mask is for q_len={block_mask.q_len}, kv_len={block_mask.kv_len}, but q and k "
            f"have lengths {lengths[0]} and {lengths[1]}; make a mask for these"
        )
    check_causal(q, k, block_mask.is_causal)
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    if batch != q.shape[0] or heads not in (1, q.shape[2]):
        raise ValueError(
            f"block_mask is for batch={batch}, heads={heads}, but q has batch={q.shape[0]}, "
            f"heads={q.shape[2]}; give it that batch, and that many heads or 1"
        )


def check_pattern(q: jax.Array, k: jax.Array, pattern: "SparsePattern") -> None:
    """The pattern's blocks, columns and windows were selected for these lengths and heads."""
    check_block_mask(q, k, pattern.blocks)
    (batch, _, heads, _), kv_len = q.shape, k.shape[1]
    columns, windows = pattern.columns, pattern.windows
    if columns is not None and (*columns.counts.shape, columns.kv_len) != (batch, heads, kv_len):
        raise ValueError(
            f"pattern.columns is for [batch, heads]={list(columns.counts.shape)} and "
            f"kv_len={columns.kv_len}, but q and k have {[batch, heads]} and {kv_len}; select "
            "for these"
        )
    if windows is None:
        return
    if windows.sinks.shape != (heads,) or windows.recents.shape != (heads,):
        raise ValueError(
            f"pattern.windows has sinks of shape {windows.sinks.shape} and recents of shape "
            f"{windows.recents.shape}; give both one entry for each of the {heads} query heads"
        )
    if not pattern.blocks.is_causal:
        raise ValueError(
            "pattern.blocks.is_causal=False: windows look back from each query; "
            "select for a causal call, or without windows"
        )


def check_threshold(q: jax.Array, threshold: float | jax.Array) -> None:
    """A threshold is a share, one for all query heads or one for each."""
    check_share(q, threshold=threshold)


def check_share(q: jax.Array, **shares: float | jax.Array) -> None:
    """Every share of a softmax mass is one for all query heads or one for each, in [0, 1]."""
    for name, share in shares.items():
        if np.shape(share) not in ((), (q.shape[2],)):
            raise ValueError(
                f"{name} has shape {np.shape(share)}; "
                f"pass a scalar, or one per query head, of shape ({q.shape[2]},)"
            )
        values = concrete(share)
        if values is not None and not np.all((values >= 0) & (values <= 1)):
            raise ValueError(
                f"{name}={values.tolist()} must lie in [0, 1]: it is the share of the softmax "
                "mass to keep"
            )


def check_scale(scale: float | None) -> None:
    """The factor of the logits is positive: kernels take the largest logit before they scale."""
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale} must be positive; negate q instead")


def check_positive(**sizes: int) -> None:
    """Every size is a positive int."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def concrete(value: object) -> np.ndarray | None:
    """The value as NumPy, or None while it is traced: its range can only be checked untraced."""
    return None if isinstance(value, Tracer) else np.asarray(value)
