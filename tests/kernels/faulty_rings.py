"""Rings with faults of synchronisation, to be planted in a Hopper kernel."""

from typing import Any

import jax
import pytest

from sparseattn_jax.kernels.mosaic import Ring


class FreedWhileRead(Ring):
    """Frees a slot where its product is issued, not where it has been waited for."""

    def tile(self, step: jax.Array) -> Any:
        super().free(step)
        return super().tile(step)

    def free(self, step: jax.Array) -> None:
        """Has been freed."""


class FreedOnArrival(Ring):
    """Frees a slot before its first use."""

    def wait(self, step: jax.Array) -> None:
        super().wait(step)
        super().free(step)

    def free(self, step: jax.Array) -> None:
        """Has been freed."""


class ReadWithoutWait(Ring):
    """Reads a slot whether its tile is there or not."""

    def wait(self, step: jax.Array) -> None:
        """Does not."""


class FilledWithoutWait(Ring):
    """Fills a slot whether it is free or not."""

    def claim(self, step: jax.Array) -> None:
        """Does not wait."""


def plant(monkeypatch: pytest.MonkeyPatch, name: str, fault: type[Ring]) -> None:
    """Makes the kernels' ring of this name a faulty one."""
    original = Ring.of.__func__

    def of(cls: type[Ring], refs: dict[str, Any], ring_name: str, *place: Any) -> Ring:
        good = original(cls, refs, ring_name, *place)
        return fault(**vars(good)) if ring_name == name else good

    monkeypatch.setattr(Ring, "of", classmethod(of))
