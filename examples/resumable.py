"""A training loop that may be killed at any moment, and started again goes on as if nothing had happened; and its plot.

For that a checkpoint holds everything that training changes, and what a step sees depends on nothing but its number.
`char_lm.py` trains with it, and `tests/test_resume.py` kills it.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from flax import nnx
from rich.progress import Progress

Curve = list[list[float]]  # of each step its loss and, where it was measured, that of the held-out data after it


def advance(learner: Any, step: int, steps: int, batch: Callable[[int], Any], held_out: Any) -> list[float]:
    """Make a step: its loss, and at every tenth of the way that of the held-out data."""
    losses = [float(learner.train(batch(step)))]
    if (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps:
        losses.append(float(learner.validate(held_out)))
    return losses


def run(
    learner: Any,
    steps: int,
    batch: Callable[[int], Any],
    held_out: Any,
    directory: Path | None = None,
    every: int = 100,
) -> Curve:
    """Train from the newest checkpoint in a directory, or from the start if there is none.

    Args:
        learner: an nnx.Module that has all that training changes: the model, the optimizer, and whatever is carried
            on. `train(batch)` makes a step and returns its loss, `validate(held_out)` returns a loss.
        steps: when training is over.
        batch: the batch of a step, counted from 0.
        held_out: what to validate on.
        directory: where the last two checkpoints are kept, and beside them `losses.log`: a line for each step, exact,
            as `float.fromhex` reads it. None keeps nothing.
        every: the number of steps from one checkpoint to the next.

    Returns:
        The losses of all steps, those before the checkpoint too.
    """
    # A kill leaves nothing half done under the name of a checkpoint. Orbax writes one under another name, renames it
    # when it is complete, and cleans up next time. One that is to go is moved away first, and only there taken apart.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, cleanup_tmp_directories=True, enable_async_checkpointing=False, todelete_subdir="old"
    )
    with tempfile.TemporaryDirectory() as nowhere:
        directory = (directory or Path(nowhere)).resolve()
        shutil.rmtree(directory / "old", ignore_errors=True)
        with (
            ocp.CheckpointManager(directory, options=options) as manager,
            open(directory / "losses.log", "a+", buffering=1) as log,  # by lines, so that no checkpoint is ahead of it
            Progress() as progress,
        ):
            if start := manager.latest_step() or 0:
                nnx.update(learner, manager.restore(start, args=ocp.args.StandardRestore(nnx.state(learner))))
            log.seek(0)
            lines = log.readlines()[:start]
            log.truncate(sum(map(len, lines)))  # what came after the checkpoint comes again
            curve = [[float.fromhex(loss) for loss in line.split()] for line in lines]
            bar = progress.add_task("jax", total=steps, completed=start)
            for step in range(start, steps):
                curve.append(advance(learner, step, steps, batch, held_out))
                print(*map(float.hex, curve[-1]), file=log)
                if (step + 1) % every == 0 or step + 1 == steps:
                    manager.save(step + 1, args=ocp.args.StandardSave(nnx.state(learner)))
                    shutil.rmtree(directory / "old", ignore_errors=True)
                progress.advance(bar)
    return curve


def plot(curves: Mapping[str, Curve], path: Path, unit: str) -> None:
    """Draw the losses of each step and, over them, those of the held-out data."""
    from matplotlib.figure import Figure  # here, since it takes a while

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for (name, curve), color, marker in zip(curves.items(), ("#1f5fbf", "#d9730d"), ("o-", "x--"), strict=False):
        held_out = [(step, losses[1]) for step, losses in enumerate(curve, 1) if len(losses) == 2]
        losses_of_batches = [losses[0] for losses in curve]
        axis.plot(
            range(1, len(curve) + 1),
            losses_of_batches,
            color=color,
            alpha=0.3,
            linewidth=0.7,
            label=f"{name}, each batch",
        )
        axis.plot(*zip(*held_out, strict=True), marker, color=color, label=f"{name}, held out")
    axis.set(xlabel="step", ylabel=unit)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
