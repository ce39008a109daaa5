"""Compiles programs to sm_90a for an H100, on a machine without a GPU, and prints what they take.

    JAX_PLATFORMS=cpu MOSAIC_GPU_DUMP_TO=FOLDER MOSAIC_GPU_DUMP_PTXAS=1 \\
        python -m tests.kernels.aot_compile MODULE

MODULE.PROGRAMS maps names to (function, abstract arguments). The Python that runs this needs a
CUDA plugin of its jax (jax-cuda13-plugin, jax-cuda13-pjrt; no other package of CUDA) and ptxas on
the PATH. Prints one line of JSON per program.
"""

import importlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84978434048
  clock_rate_ghz: 1.98
}
"""


def compile_for_h100(
    device: jax.Device,  # pyright: ignore[reportInvalidTypeForm] an alias that jax assigns
    function: Callable[..., Any],
    arguments: Sequence[jax.ShapeDtypeStruct],
) -> str:
    """What ptxas says of the kernels of a program."""
    folder = pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    for dump in folder.iterdir():
        dump.unlink()
    sharding = jax.sharding.SingleDeviceSharding(device)
    program = jax.jit(function, in_shardings=sharding, out_shardings=sharding)
    program.trace(*arguments).lower().compile()
    return "\n".join(dump.read_text() for dump in sorted(folder.glob("*.ptxas")))


def figures(ptxas: str) -> dict[str, int]:
    """Registers per thread, bytes that did not fit into them, and kernels that wait in vain.

    Where registers are short ptxas lets each product of the tensor cores wait for the one before.
    """
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", ptxas)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", ptxas)]
    return {
        "registers": max(registers),
        "spilled": max(spills),
        "serialized": ptxas.count("wgmma.mma_async instructions are serialized"),
        "kernels": len(registers),
    }


def main() -> None:
    """Compiles the programs of the module that is named on the command line."""
    programs = importlib.import_module(sys.argv[1]).PROGRAMS
    topology = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1")
    for name, (function, arguments) in programs.items():
        said = compile_for_h100(topology.devices[0], function, arguments)
        print(json.dumps({"name": name, **figures(said)}), flush=True)


if __name__ == "__main__":
    main()
