"""Times our operations beside their peers and records what passed the correctness gate.

    python -m benchmarks.run --suite block_sparse_forward --lengths 8K 32K 128K
    python -m benchmarks.run --suite block_sparse_forward_backward --lengths 8K 32K
    python -m benchmarks.run --suite two_arm_step --lengths 8K 32K
    python -m benchmarks.run --suite scale --lengths 256K 512K 1024K --peers cudnn

On a GPU with torch and flash-attn-4 installed, FA4 is timed in a process of its own; JAX leaves it
a quarter of the GPU's memory unless XLA_CLIENT_MEM_FRACTION says otherwise. CUPTI takes one
subscriber a process, so the runner cannot itself run under a profiler.
"""

import importlib.util
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import tyro

from benchmarks import (
    block_sparse_forward,
    block_sparse_forward_backward,
    decode,
    model,
    records,
    scale,
    selection_statistics,
    streaming_prefill,
    two_arm_step,
    xattention,
)
from benchmarks.measure import Options, Peer
from benchmarks.shapes import SHAPES, parse_length
from sparseattn_jax.kernels.backends import Backend

Suite = Literal[
    "block_sparse_forward",
    "block_sparse_forward_backward",
    "decode",
    "xattention_select",
    "xattention_prefill",
    "selection_statistics",
    "streaming_prefill",
    "scale",
    "two_arm_step",
    "model_prefill",
    "model_decode",
]
SUITES: dict[Suite, Callable[[Options, int], Iterator[records.Record | str]]] = {
    "block_sparse_forward": block_sparse_forward.run,
    "block_sparse_forward_backward": block_sparse_forward_backward.run,
    "decode": decode.run,
    "xattention_select": xattention.run_select,
    "xattention_prefill": xattention.run_prefill,
    "selection_statistics": selection_statistics.run,
    "streaming_prefill": streaming_prefill.run,
    "scale": scale.run,
    "two_arm_step": two_arm_step.run,
    "model_prefill": model.run_prefill,
    "model_decode": model.run_decode,
}
_NEEDS: dict[Peer, tuple[str, ...]] = {
    "fa4": ("torch", "flash_attn"),
    "fa4_block_sparse": ("torch", "flash_attn"),
}


def run(
    suite: tuple[Suite, ...],
    lengths: tuple[str, ...] = ("8K", "32K", "128K"),
    out: pathlib.Path = records.RESULTS,
    shape: Literal["llama3_8b", "toy"] = "llama3_8b",
    backend: Backend | None = "mosaic_sm90",
    peers: tuple[Peer, ...] = ("cudnn", "fa4", "fa4_block_sparse"),
    timer: Literal["kernel", "queued"] | None = None,
    runs: int = 10,
    seed: int = 0,
    commit: str | None = None,
) -> int:
    """Runs suites and writes their records; the exit status is the number of missing figures.

    Args:
        suite: which suites to run.
        lengths: tokens, as in "8K".
        out: where <device>/<suite>.json is written.
        shape: one of benchmarks/shapes.py.
        backend: our backend, "None" for the default one.
        peers: whom to time beside us; those that are not installed are left out, and named.
        timer: by default "kernel" on a GPU and "queued" elsewhere; the suite scale has its own.
        runs: the fewest timed runs of each call, at least two.
        seed: of the operands and the masks.
        commit: the tree's commit, where git cannot tell.
    """
    if runs < 2:
        raise ValueError(f"runs={runs} must be at least 2: records hold a spread; 10 is usual")
    tokens = [parse_length(length) for length in lengths]
    if any(length % SHAPES[shape].block_size for length in tokens):
        raise ValueError(
            f"lengths {', '.join(lengths)} must be multiples of the shape's "
            f"block_size={SHAPES[shape].block_size}"
        )
    on_gpu = jax.default_backend() == "gpu"
    options = Options(
        shape=SHAPES[shape],
        backend=backend,
        peers=tuple(peer for peer in peers if _is_installed(peer)),
        timer=timer or ("kernel" if on_gpu else "queued"),
        runs=runs,
        seed=seed,
        origin=records.origin(commit),
    )
    missing = 0
    for name, length in itertools.product(suite, tokens):
        for figure in SUITES[name](options, length):
            print(_line(figure), flush=True)
            if isinstance(figure, str):
                missing += 1
            else:
                records.save(out, name, [figure])
    return missing


def _is_installed(peer: Peer) -> bool:
    absent = [name for name in _NEEDS.get(peer, ()) if importlib.util.find_spec(name) is None]
    if absent:
        print(f"{peer}: left out, {' and '.join(absent)} cannot be imported")
    return not absent


def _line(figure: records.Record | str) -> str:
    if isinstance(figure, str):
        return figure
    return (
        f"{figure.op} {figure.case}: density {figure.density:.3f}, ours {figure.ours_ms} ms "
        f"({figure.ours_ms_min}-{figure.ours_ms_max}, queued {figure.ours_queued_ms}), "
        f"{figure.peer} {figure.peer_ms} ms ({figure.peer_ms_min}-{figure.peer_ms_max}, "
        f"queued {figure.peer_queued_ms}), ratio {figure.ratio}, "
        f"error {figure.max_error} of {figure.max_error_allowed}"
    )


if __name__ == "__main__":
    sys.exit(min(1, tyro.cli(run)))
