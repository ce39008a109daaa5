"""Which implementation of an op runs: the only code that knows devices' capabilities."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

Backend = Literal["mosaic_sm90", "cudnn", "xla"]


class UnsupportedError(NotImplementedError):
    """A named backend cannot run this call; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What the device that will run a call can do.

    Attributes:
        platform: jax's name of the platform: "cpu", "gpu" or "tpu".
        compute_capability: (major, minor) of an NVIDIA GPU, else None.
        multiprocessors: how many an NVIDIA GPU has, else None.
    """

    platform: str
    compute_capability: tuple[int, int] | None
    multiprocessors: int | None = None


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
    )


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


def _device(*operands: jax.Array) -> jax.Device:
    for operand in operands:
        if isinstance(operand, jax.Array) and not isinstance(operand, jax.core.Tracer):
            return next(iter(operand.devices()))
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]
