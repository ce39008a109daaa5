"""Suite scale: XAttention's whole prefill call at lengths that fill a GPU, 256K to 1M tokens.

    python -m benchmarks.run --suite scale --lengths 256K 512K 1024K --peers cudnn

Beside times the records hold memory: that of the arguments, results and temporaries of each
compiled call, ours and dense attention's. Lists have a capacity, without which those of 1M tokens
would take 8.6 GB; a figure is recorded only if no block was dropped. Calls are awaited one by one:
the results of several would not fit.
"""

import dataclasses
from collections.abc import Iterator

from benchmarks import xattention
from benchmarks.measure import Options
from benchmarks.records import Record
from sparseattn_jax import XAttention

STRIDE = 16
MAX_BLOCKS = 1024


def run(options: Options, length: int) -> Iterator[Record | str]:
    """Records of one length, and sentences about what could not be recorded."""
    strategy = XAttention(
        threshold=xattention.THRESHOLD,
        stride=STRIDE,
        block_size=options.shape.block_size,
        max_blocks=MAX_BLOCKS,
    )
    options = dataclasses.replace(options, timer="single")
    return xattention.prefill_figures("scale", [strategy], options, length)
