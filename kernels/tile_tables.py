"""What the measured tables of tiles are made of; see `benchmarks/autotune.py`."""

import dataclasses
from collections.abc import Mapping

type Key = tuple[str | int | bool | None, ...]
"""The device's model, and what the choice depends on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The fastest candidate for a key.

    Attributes:
        config: the fields of the op's config.
        ms: geometric mean of its times over the measured cases.
        rule_ms: that of the rule's config, in the same run.
        origin: device, versions, commit and date of the run.
    """

    config: Mapping[str, int | bool]
    ms: float
    rule_ms: float
    origin: Mapping[str, str]


def measured_or[Config](
    rule: Config, rows: Mapping[Key, Row], model: str | None, *key: int | bool | None
) -> Config:
    """The config that was measured for a key on this model of device, or else the rule's."""
    row = rows.get((model, *key))
    return rule if row is None else type(rule)(**row.config)
