"""The results of torch for each case, computed here or recorded in parity/recorded.

A record is a dict of arrays, with one row for each of the case's measured arrays, in their order:

    truth   torch's float64 results, all numbers in a row
    digest  instead of `truth` where that is large: the norm, and projections on fixed vectors of +1 and -1

and, if the case has a less exact dtype, how far torch's own results in it are off: see `measure`.
"""

import math
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import training
from .cases import CASES, KINDS, Case, NamedArrays
from .sides import run_torch
from .training import RUNS, Run

RECORDED = Path(__file__).parent / "recorded"
PROJECTIONS = 4
# Errors are counted by size, in units in the last place: up to 1/2, 1, 2 and so on, and above the last.
ULPS = tuple(2.0**power for power in range(-1, 13))
BLOCKS = 64  # of time, at most


def errors(result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The errors of a result.

    Returns:
        Three numbers: how many numbers there are; the sum of their squared errors, relative to the rms of the truth,
        so that arrays of any scale can be pooled; and the largest error, scaled by max(1, largest of the truth).
    """
    if result.shape != truth.shape:
        raise ValueError(f"a result should have shape {truth.shape}, got {result.shape}")
    difference = result.astype(np.float64) - truth
    rms = math.sqrt(np.mean(truth**2)) or 1.0
    worst = np.max(np.abs(difference)) / max(1.0, np.max(np.abs(truth)))
    return np.array([truth.size, np.sum((difference / rms) ** 2), worst])


def ulps(result: np.ndarray, truth: np.ndarray, dtype: str) -> np.ndarray:
    """A histogram of the errors, in units in the last place of the true number in a dtype, with the limits `ULPS`."""
    format = jnp.finfo(dtype)
    exponent = np.maximum(np.frexp(truth)[1] - 1, format.minexp)
    difference = np.abs(result.astype(np.float64) - truth)
    # What should be zero is right, or further off than any unit counts.
    error = np.where((truth == 0) & (difference > 0), np.inf, difference * 2.0 ** (format.nmant - exponent))
    # NaN comes after all numbers.
    return np.bincount(np.searchsorted(ULPS, error.ravel()), minlength=len(ULPS) + 1)


def over_time(case: Case, result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The rms error of an output in each of up to 64 blocks of time, relative to the rms of the true output."""
    axis = 1 if case.arguments.get("batch_first") and case.batch is not None else 0
    squares = np.moveaxis((result.astype(np.float64) - truth) ** 2, axis, 0)
    blocks = np.array_split(squares, min(BLOCKS, len(squares)))
    return np.sqrt([np.mean(block) for block in blocks]) / (math.sqrt(np.mean(truth**2)) or 1.0)


def measure(case: Case, results: NamedArrays, truth: NamedArrays, dtype: str) -> NamedArrays:
    """The errors of results in a dtype. Results and truth are in the order of `case.measured()`.

    Returns:
        `errors`, a row of three numbers for each array (see `errors`); `ulps`, of all numbers together; and
        `over_time`, of the output if there is one.
    """
    measured = {
        "errors": np.stack([errors(results[name], truth[name]) for name in truth]),
        "ulps": sum((ulps(results[name], truth[name], dtype) for name in truth), np.zeros(len(ULPS) + 1, int)),
    }
    if "output" in truth:
        measured["over_time"] = over_time(case, results["output"], truth["output"])
    return measured


def digest(array: np.ndarray) -> np.ndarray:
    """The norm of an array, and its projections on fixed vectors of +1 and -1."""
    bits = np.random.RandomState(0).bytes(PROJECTIONS * array.size // 8 + 1)
    signs = np.unpackbits(np.frombuffer(bits, np.uint8))[: PROJECTIONS * array.size].reshape(PROJECTIONS, array.size)
    return np.array([np.linalg.norm(array), *((2.0 * row - 1.0) @ array.ravel() for row in signs)])


def live(case: Case, *, full: bool = True, device: str = "cpu") -> NamedArrays:
    """The record of a case from torch here, on one of torch's devices; with a digest of the truth unless `full`."""
    found = run_torch(case, "float64", device)
    truth = {name: found[name] for name in case.measured()}
    record = measure(case, run_torch(case, case.inexact, device), truth, case.inexact) if case.inexact else {}
    if full:
        record["truth"] = np.concatenate([array.ravel() for array in truth.values()])
    else:
        record["digest"] = np.stack([digest(array) for array in truth.values()])
    return record


def truth_of(case: Case, record: NamedArrays) -> NamedArrays | None:
    """The float64 results by name, if the record has them in full."""
    if "truth" not in record:
        return None
    shapes = case.measured()
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    parts = np.split(record["truth"], ends[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def record() -> list[Path]:
    """Record every case's results from torch here, one file for each kind.

    The same torch gives the same bytes on the same processor.
    """
    import torch

    records = {
        kind: {case.name: live(case, full=case.small) for case in CASES.values() if case.kind == kind} for kind in KINDS
    }
    records["training"] = {run.name: training.run_torch(run) for run in RUNS.values()}
    paths = []
    for file, by_name in records.items():
        arrays: Any = {f"{name}/{key}": array for name, record in by_name.items() for key, array in record.items()}
        paths.append(RECORDED / f"{file}.npz")
        np.savez_compressed(paths[-1], torch_version=np.array(torch.__version__), **arrays)
    return paths


class Recorded:
    """The recorded results; torch is not needed."""

    def __init__(self) -> None:
        self._files = {kind: np.load(RECORDED / f"{kind}.npz") for kind in (*KINDS, "training")}
        self._lock = threading.Lock()  # NumPy's archives are not to be read by two threads at a time
        self.versions = sorted({str(file["torch_version"]) for file in self._files.values()})

    def __call__(self, case: Case) -> NamedArrays:
        file = self._files[case.kind]
        names = [f"{case.name}/{name}" for name in ("truth", "digest", "errors", "ulps", "over_time")]
        with self._lock:
            found = {name.rpartition("/")[2]: file[name] for name in names if name in file}
        if not found:
            raise KeyError(f"no recorded results of {case.name}: run `python -m parity record`")
        return found

    def training(self, run: Run) -> NamedArrays:
        """The record of a training run, see `parity.training`."""
        file = self._files["training"]
        names = ["losses", "masks", *run.shapes()]
        if any(f"{run.name}/{name}" not in file for name in names):
            raise KeyError(f"no recorded results of {run.name}: run `python -m parity record`")
        with self._lock:
            return {name: file[f"{run.name}/{name}"] for name in names}
