"""Killed at random moments and started again, training goes on bit for bit as if it had been left alone."""

import importlib
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import jaxrnn
from jaxrnn import checkpoint

PROGRAM = Path(__file__).parents[1] / "examples" / "char_lm.py"
STEPS, EVERY = 36, 3


def start(directory: Path, fill_cache: bool = False) -> subprocess.Popen:
    options = f"--hidden 4 --steps {STEPS} --every {EVERY} --checkpoint {directory} --plot {directory}.png".split()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Most of the time goes into starting, so compiled programs are kept. Only the run that is left alone adds to
        # them, because JAX does not write them atomically.
        "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0" if fill_cache else "1e9",
    }
    command = [sys.executable, "-W", "error", str(PROGRAM), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(directory: Path) -> tuple[str, dict[str, bytes]]:
    """The log, and each array of the last checkpoint. A kill after the last one was saved leaves three."""
    kept = {path.name for path in directory.iterdir()}
    assert kept - {str(STEPS - 2 * EVERY)} == {str(STEPS), str(STEPS - EVERY), "losses.log"}
    tensors = flatten_dict(checkpoint.load_tree(directory / str(STEPS)), sep=".")
    assert {"model.head.bias", "optimizer.step", "h", "c"} <= tensors.keys()
    return (directory / "losses.log").read_text(), {name: value.tobytes() for name, value in tensors.items()}


def finish(process: subprocess.Popen) -> list[str]:
    """What a run that is left alone prints, less the progress bar, whose width may differ."""
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    return output.splitlines()[1:]


def newest(directory: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max((int(path.name) for path in directory.glob("*") if path.name.isdigit()), default=0)


def kill_sometime(process: subprocess.Popen, directory: Path, moments: random.Random) -> bool:
    """Kill the process, while it starts or when it has saved a few times; False if it was done before."""
    checkpoints = moments.choice([0, 1, 1, 2])
    after = moments.uniform(0, 0.5 if checkpoints else 3)
    wanted = newest(directory) + checkpoints * EVERY
    while newest(directory) < wanted and process.poll() is None:
        time.sleep(0.002)
    time.sleep(after)
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert errors == ""
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode != 0


def killed_and_resumed(root: Path, seed: int, kills: int, expected: tuple) -> dict[str, int]:
    """Kill as often as that, in one training run after the other; all of them have to end as expected."""
    moments = random.Random(seed)
    counts = {"runs": 0, "kills": 0, "while saving": 0, "resumed": 0}
    while counts["kills"] < kills:
        directory = root / f"{seed}-{counts['runs']}"
        counts["runs"] += 1
        while newest(directory) < STEPS and counts["kills"] < kills:
            counts["resumed"] += newest(directory) > 0
            if kill_sometime(start(directory), directory, moments):
                counts["kills"] += 1
                counts["while saving"] += any(directory.glob("*tmp*"))
        assert finish(start(directory)) == expected[0]
        assert results(directory) == expected[1:]
    return counts


MOMENTUM = optax.sgd(0.1, momentum=0.9)


class Learner(nnx.Module):
    """A small one: an optimizer with a state, and a state that is carried on."""

    def __init__(self) -> None:
        self.model = jaxrnn.GRUCell(2, 3, rngs=nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.model, MOMENTUM, wrt=nnx.Param)
        self.h = nnx.Variable(jnp.zeros((4, 3), jnp.float32))

    @nnx.jit
    def train(self, x: jax.Array) -> jax.Array:
        def loss(model: jaxrnn.GRUCell) -> tuple[jax.Array, jax.Array]:
            h = model(x, self.h[...])
            return (h**2).sum(), h

        (value, h), gradient = nnx.value_and_grad(loss, has_aux=True)(self.model)
        self.h[...] = h
        self.optimizer.update(self.model, gradient)
        return value

    def validate(self, held_out: None) -> float:
        return 0.0


def test_interrupted_training_goes_on_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process to kill: what a step sees raises."""
    monkeypatch.syspath_prepend(PROGRAM.parent)
    run = importlib.import_module("resumable").run

    def batch(step: int) -> np.ndarray:
        return np.random.RandomState(step).randn(4, 2).astype(np.float32)

    def train(directory: str, interrupted_at: int | None = None) -> tuple[Any, dict[str, bytes]]:
        def batch_or_interrupt(step: int) -> np.ndarray:
            if step == interrupted_at:
                raise KeyboardInterrupt
            return batch(step)

        curve = run(Learner(), 9, batch_or_interrupt, None, tmp_path / directory, every=2)
        tensors = flatten_dict(checkpoint.load_tree(tmp_path / directory / "9"), sep=".")
        assert {"model.weight_hh", "optimizer.step", "h"} <= tensors.keys()
        return curve, {name: value.tobytes() for name, value in tensors.items()}

    with jax.numpy_dtype_promotion("standard"):
        curve, tensors = train("alone")
        for moments in ((1,), (5, 8)):
            for moment in moments:
                with pytest.raises(KeyboardInterrupt):
                    train(f"interrupted at {moments}", moment)
            assert train(f"interrupted at {moments}") == (curve, tensors)


@pytest.mark.slow
def test_kills_leave_no_trace(tmp_path: Path, thorough: bool) -> None:
    alone = tmp_path / "alone"
    expected = finish(start(alone, fill_cache=True)), *results(alone)
    assert len(expected[1].splitlines()) == STEPS
    kills, lanes = (25, 4) if thorough else (3, 1)
    with ThreadPoolExecutor(lanes) as pool:
        counts = list(pool.map(lambda seed: killed_and_resumed(tmp_path, seed, kills, expected), range(lanes)))
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    print(total)
    assert total["resumed"] > total["kills"] // 3
    assert total["while saving"] > 0 or not thorough
