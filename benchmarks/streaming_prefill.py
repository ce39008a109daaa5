"""Suite streaming_prefill: windows exact to the token, beside dense attention.

The peer `cudnn_window` is cuDNN's attention to the recent keys alone, without the sinks.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Array

from benchmarks import gate
from benchmarks.block_sparse_forward import random_operands
from benchmarks.measure import Measured, Options, dense_peers, measured, on_rows
from benchmarks.records import Record
from benchmarks.shapes import format_length
from sparseattn_jax import streaming_prefill

SINK_SIZE, RECENT_SIZE = 128, 1024


def run(options: Options, length: int) -> Iterator[Record | str]:
    """Records of one length, and sentences about what could not be recorded."""
    q, k, v = random_operands(options.shape, length, seed=options.seed)
    rows = gate.sample_rows(length, options.shape.block_size, seed=options.seed)

    def time(attend: Callable[..., Array], sink_size: int, recent_size: int) -> Measured:
        keys = np.arange(length)
        keep = (keys < sink_size) | (keys > rows[:, None] - recent_size)
        judge = functools.partial(
            gate.judge, q=q, k=k, v=v, rows=rows, keep=keep[None], block_size=1
        )
        return measured(attend, (q, k, v), on_rows(judge, rows), options)

    ours = time(
        jax.jit(
            functools.partial(
                streaming_prefill,
                sink_size=SINK_SIZE,
                recent_size=RECENT_SIZE,
                block_size=options.shape.block_size,
                exact=True,
                backend=options.backend,
            )
        ),
        SINK_SIZE,
        RECENT_SIZE,
    )
    peers = {name: time(attend, 0, length) for name, attend in dense_peers(options).items()}
    if "cudnn" in peers:
        peers["cudnn_window"] = time(jax.jit(_cudnn_window), 0, RECENT_SIZE)
    seen = np.minimum(np.arange(1, length + 1), SINK_SIZE + RECENT_SIZE).sum()
    for peer, theirs in peers.items():
        yield options.record(
            op="streaming_prefill",
            case=f"{format_length(length)} sink={SINK_SIZE} recent={RECENT_SIZE}",
            inputs=f"{options.shape}, causal, random normal q/k/v; density of tokens, not blocks",
            density=float(seen / (length * (length + 1) / 2)),
            ours=ours,
            peer=peer,
            theirs=theirs,
        )


def _cudnn_window(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=(RECENT_SIZE - 1, 0), implementation="cudnn"
    )
