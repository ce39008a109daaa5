"""What a run shows: progress while it runs, the heat-map of its gates, its summary."""

import json
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import rich.console
import rich.progress
import rich.table
from jaxtyping import Float, Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sparseattn_jax.train.evaluation import Score

_PLAIN_LINES = 20


class Progress:
    """A progress bar on a terminal, about twenty plain lines elsewhere."""

    def __init__(self, console: rich.console.Console, *, num_steps: int, start: int):
        self._console = console
        self._num_steps = num_steps
        self._last_line = start
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            # All columns together fit into a terminal of 80.
            rich.progress.BarColumn(bar_width=12),
            rich.progress.TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=start)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, record: Mapping[str, int | float]) -> None:
        """One line of metrics.jsonl."""
        step = int(record["step"])
        text = f"loss {record['loss']:.2f} | "
        if "sparsity" in record:
            text += f"sparsity {record['sparsity']:.2f}, target {record['target_sparsity']:.2f}"
        else:
            text += f"answers {record['accuracy']:.0%}"
        text += f" | {record['tokens_per_second']:.0f} tokens/s"
        self._bar.update(self._task, completed=step, description=text)
        due = step - self._last_line >= self._num_steps / _PLAIN_LINES or step == self._num_steps
        if not self._console.is_terminal and due:
            self._console.print(f"step {step}/{self._num_steps} | {text}", soft_wrap=True)
            self._last_line = step


class MetricsFile:
    """metrics.jsonl: one JSON object per logged step, none twice and none missing.

    Opened at a step, it forgets what an interrupted run wrote after it.
    """

    def __init__(self, path: pathlib.Path, *, start: int):
        kept = []
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            # A run killed while it wrote leaves a last line without its end.
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= start]
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text("".join(kept))
        unfinished.replace(path)
        self._file = path.open("a")

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, record: Mapping[str, int | float]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


class Meter:
    """Speed since it was last read, and how much of that time went by waiting for data."""

    def __init__(self, *, tokens_per_step: int, start: int):
        self._tokens_per_step = tokens_per_step
        self._step = start
        self._time = time.perf_counter()
        self._waited = 0.0

    def timed[T](self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time until each is there counts as waiting."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            yield batch

    def read(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        elapsed = now - self._time
        speed = {
            "tokens_per_second": (step - self._step) * self._tokens_per_step / elapsed,
            "data_wait": self._waited / elapsed,
        }
        self._step, self._time, self._waited = step, now, 0.0
        return speed


def draw_gates(
    path: pathlib.Path, gates: Float[np.ndarray, "L K"], mask: Int[np.ndarray, "L K"]
) -> None:
    """A heat-map of the deterministic gates; the heads that the mask keeps are outlined."""
    num_layers, num_kv_heads = gates.shape
    figure = Figure(figsize=(2.5 + 0.6 * num_kv_heads, 1.5 + 0.6 * num_layers), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(gates, vmin=0, vmax=1, cmap="coolwarm")
    for layer, head in zip(*np.nonzero(mask), strict=True):
        axes.add_patch(Rectangle((head - 0.48, layer - 0.48), 0.96, 0.96, fill=False, linewidth=2))
    axes.set_xticks(range(num_kv_heads))
    axes.set_yticks(range(num_layers))
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.set_title("gates: 1 full, 0 streaming; outlined: kept", fontsize=9)
    figure.colorbar(image)
    figure.savefig(path, bbox_inches="tight")


def summarise(
    scores: Mapping[str, list[Score]], mask: Int[np.ndarray, "L K"] | None
) -> dict[str, Any]:
    """What summary.json holds."""
    summary: dict[str, Any] = {
        "scores": {
            name: {
                "accuracy": [score.accuracy for score in group],
                "text_loss": [score.text_loss for score in group],
            }
            for name, group in scores.items()
        }
    }
    if mask is not None:
        summary["num_heads"] = mask.size
        summary["kept_heads"] = [[int(i) for i in head] for head in np.argwhere(mask)]
    return summary


def print_summary(
    console: rich.console.Console, summary: Mapping[str, Any], directory: pathlib.Path
) -> None:
    """The table at the end of a run, from what summary.json holds."""
    if "kept_heads" in summary:
        by_layer: dict[int, list[int]] = {}
        for layer, head in summary["kept_heads"]:
            by_layer.setdefault(layer, []).append(head)
        kept = "; ".join(f"layer {layer}: {heads}" for layer, heads in by_layer.items())
        count = f"{len(summary['kept_heads'])} of {summary['num_heads']}"
        console.print(f"Full attention is kept by {count} KV heads: {kept}", soft_wrap=True)
    table = rich.table.Table("attention", "right answers", "text loss, nats per byte")
    for name, values in summary["scores"].items():
        accuracy = _mean_and_range(values["accuracy"], "{:.1%}")
        table.add_row(name, accuracy, _mean_and_range(values["text_loss"], "{:.3f}"))
    console.print(table)
    console.print(f"Everything is in {directory}", soft_wrap=True)


def _mean_and_range(values: list[float], form: str) -> str:
    mean = form.format(np.mean(values))
    if len(values) == 1:
        return mean
    low, high = form.format(min(values)), form.format(max(values))
    return f"{mean} ({low} to {high}, {len(values)} draws)"
