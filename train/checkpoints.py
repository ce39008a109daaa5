"""A run's checkpoints on disk: the state, and the configuration it belongs to."""

import dataclasses
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from sparseattn_jax.train.config import TrainConfig
from sparseattn_jax.train.step import TrainState


class Checkpoints:
    """The last few checkpoints of a run. Orbax writes each whole or not at all."""

    def __init__(self, directory: pathlib.Path, *, keep: int):
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        """The step of the last whole checkpoint, None without one."""
        return self._manager.latest_step()

    def config(self, step: int) -> dict[str, Any]:
        """The configuration of the run that saved a step, as nested tables."""
        return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))[
            "config"
        ]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at a step; `like` has its shapes."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=args)["state"]

    def save(self, step: int, state: TrainState, config: TrainConfig) -> None:
        """Saves, then drops the oldest beyond those to keep."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            config=ocp.args.JsonSave(dataclasses.asdict(config)),
        )
        self._manager.save(step, args=args, force=True)

    def close(self) -> None:
        self._manager.close()
