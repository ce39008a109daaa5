"""Which implementation of an op runs: the only code that knows devices' capabilities."""

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike

Backend = Literal["mosaic_sm90", "cudnn", "xla"]
Model = Literal["h100", "h200"]

# The first and last ptxas that miscompile wgmma under a causal mask.
_MISCOMPILES = ((12, 8, 61), (12, 9, 41))


class UnsupportedError(NotImplementedError):
    """A named backend cannot run this call; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What the device that will run a call can do.

    Attributes:
        platform: jax's name of the platform: "cpu", "gpu" or "tpu".
        compute_capability: (major, minor) of an NVIDIA GPU, else None.
        multiprocessors: how many an NVIDIA GPU has, else None.
        ptxas_version: of the assembler that compiles kernels for an NVIDIA GPU, if it was found.
        model: of a GPU for which tables of tiles are measured, else None.
    """

    platform: str
    compute_capability: tuple[int, int] | None
    multiprocessors: int | None = None
    ptxas_version: tuple[int, int, int] | None = None
    model: Model | None = None


@dataclasses.dataclass(frozen=True)
class Implementation[Facts]:
    """One backend of an op.

    Attributes:
        run: the implementation; every backend of an op takes the same arguments.
        refusal: None if `run` can take a call with these facts, else the reason, for people.
    """

    run: Callable[..., Any]
    refusal: Callable[[Facts], str | None]


def never_refuses(facts: object) -> None:
    """The refusal of an implementation that runs everywhere."""


def hopper_refusal(device: DeviceFacts, dtype: DTypeLike | None = None) -> str | None:
    """Why no Hopper kernel can run on this device; None if one can.

    A `dtype` is that of operands that the tensor cores multiply.
    """
    capability = device.compute_capability
    if capability is None or capability[0] != 9:
        found = "no NVIDIA GPU" if capability is None else f"{capability[0]}.{capability[1]}"
        return f"needs compute capability 9.x (Hopper), got {found}"
    if dtype is not None and jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {jnp.dtype(dtype).name}"
    ptxas = device.ptxas_version
    if ptxas is not None and _MISCOMPILES[0] <= ptxas <= _MISCOMPILES[1]:
        found = ".".join(map(str, ptxas))
        return f"ptxas {found} miscompiles causal kernels; install 12.9.86 or newer, or CUDA 13"
    return None


def device_facts(*operands: jax.Array) -> DeviceFacts:
    """Facts of the device that holds `operands`; of the default device while they are traced."""
    device = _device(*operands)
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability is None:
        return DeviceFacts(platform=device.platform, compute_capability=None)
    major, minor = str(capability).split(".")
    return DeviceFacts(
        platform="gpu",
        compute_capability=(int(major), int(minor)),
        multiprocessors=device.core_count,
        ptxas_version=_ptxas_version(_ptxas()),
        model=_model(device.device_kind),
    )


def multiprocessors(*operands: jax.Array) -> int:
    """Those of the device that will run; of an H100 where there is none, as when only lowering."""
    return device_facts(*operands).multiprocessors or 132


def device_model(*operands: jax.Array) -> Model | None:
    """Whose measured tiles hold; None where the rules do, as when only lowering or interpreting."""
    return device_facts(*operands).model


def choose[Facts](
    table: Mapping[Backend, Implementation[Facts]], requested: Backend | None, facts: Facts
) -> Implementation[Facts]:
    """The requested implementation, or without a request the first that does not refuse.

    Raises:
        UnsupportedError: the requested backend does not exist for this op or refuses the call.
    """
    if requested is None:
        return next(entry for entry in table.values() if entry.refusal(facts) is None)
    if requested not in table:
        raise UnsupportedError(
            f"backend={requested!r}: this op has {', '.join(table)}; pass one of them or None"
        )
    reason = table[requested].refusal(facts)
    if reason is not None:
        raise UnsupportedError(f"{requested}: {reason}")
    return table[requested]


def _device(*operands: jax.Array) -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    for operand in operands:
        if isinstance(operand, jax.Array) and not isinstance(operand, Tracer):
            return next(iter(operand.devices()))
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]


def _model(device_kind: str) -> Model | None:
    """Of "NVIDIA H100 80GB HBM3" h100; of a GH200 none."""
    words = device_kind.lower().split()
    return next((model for model in get_args(Model) if model in words), None)


def _ptxas() -> str | None:
    """The ptxas that XLA and Mosaic GPU of jax 0.11 run: the first where they look."""
    nvidia = importlib.util.find_spec("nvidia")
    packages = [] if nvidia is None else list(nvidia.submodule_search_locations or ())
    roots = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", "/opt/cuda"]
    roots += [os.path.join(package, "cuda_nvcc") for package in packages]
    roots += [os.path.join(package, "cu13") for package in packages]
    folders = [*os.get_exec_path(), *(os.path.join(root, "bin") for root in roots if root)]
    return shutil.which("ptxas", path=os.pathsep.join(folders))


@functools.cache
def _ptxas_version(ptxas: str | None) -> tuple[int, int, int] | None:
    if ptxas is None:
        return None
    said = subprocess.run([ptxas, "--version"], stdout=subprocess.PIPE, text=True, check=False)
    found = re.search(r"\bV(\d+)\.(\d+)\.(\d+)\b", said.stdout)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))
