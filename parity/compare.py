"""Measure one side against torch, case by case, and judge."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from jaxrnn.cells import RNN_RELU

from .cases import ENOUGH, KINDS, Case, NamedArrays, quantity
from .reference import digest, measure, truth_of
from .sides import Side, precision

# The largest error of a case, scaled by max(1, largest of the truth). In float32 that finds what is wrong, not what
# is inaccurate: correct results, torch's own too, come as far as 1.3e-6. In 16 bits it is eps, one rounding at worst.
LARGEST = {"float64": 1e-12, "float32": 4e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}
DTYPES = tuple(LARGEST)
# A case with a larger limit in float64 hides mistakes.
JUDGED = 1e-6
# The same in float32 where products are not. With bfloat16's, the worst there are, it comes to 0.009; of relu to 0.3 in
# gradients, where a rounding crosses its kink: there only what is grossly wrong can be seen.
LARGEST_ROUNDED, LARGEST_ACROSS_A_KINK = 2.0**-6, 1.0
# The rms error in a less exact dtype by torch's own, both against torch's float64: for each kind and quantity, and for
# all. The aim is 1.5 and 1.25; in float32 on a CPU three rows of LSTM, which torch runs through oneDNN, miss it at 1.55
# to 1.63. A tanh of one unit in the last place instead of XLA's changes that by 0.03, and costs a third of the speed.
RATIO = 1.75
RATIO_OVERALL = 1.25


def products_are_float32() -> bool:
    """Whether products are computed in full float32; by default only a CPU does."""
    return precision() == "highest" or jax.default_backend() == "cpu"


def largest(case: Case, dtype: str) -> float:
    """The largest error that counts as right, scaled by max(1, largest of the truth)."""
    limit = {"float64": case.limit, "float32": case.float32_limit}.get(dtype)
    if dtype != "float32" or products_are_float32():
        return LARGEST[dtype] if limit is None else limit
    return LARGEST_ACROSS_A_KINK if KINDS[case.kind].cell == RNN_RELU else LARGEST_ROUNDED


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The errors of one case.

    Attributes:
        case: the case.
        measured: the errors in each dtype, see `reference.measure`; against a digest, the key "errors" only.
        record: the results of torch, see `parity.reference`.
        problem: the exception that kept the case from being measured, if any.
    """

    case: Case
    measured: dict[str, NamedArrays] = dataclasses.field(default_factory=dict)
    record: NamedArrays = dataclasses.field(default_factory=dict)
    problem: str = ""

    @property
    def torch(self) -> NamedArrays:
        """The errors of torch's results in the case's less exact dtype; empty if it has none."""
        return self.record if "errors" in self.record else {}

    @property
    def errors(self) -> dict[str, np.ndarray]:
        """The errors in each dtype, a row for each array in `case.measured()`."""
        return {dtype: arrays["errors"] for dtype, arrays in self.measured.items()}

    @property
    def off(self) -> tuple[str, int] | None:
        """The first dtype in which an array is too far off, and the number of the worst."""
        for dtype, rows in self.errors.items():
            worst = int(np.argmax(rows[:, 2]))  # NaN counts as the largest
            if not rows[worst, 2] <= largest(self.case, dtype):
                return dtype, worst
        return None

    def failure(self) -> str:
        """The failure of the case, with its worst array; empty if there is none."""
        if (limit := self.case.limit) is not None and limit > JUDGED:
            cause = f"torch's own results change by up to {limit:.0e} when hidden units are renumbered"
            return f"not to be judged: {cause}. Give inputs of fewer steps"
        if self.problem or self.off is None:
            return self.problem
        dtype, worst = self.off
        name, error = list(self.case.measured())[worst], self.errors[dtype][worst, 2]
        return f"{name} in {dtype} is off by {error:.2g}, more than {largest(self.case, dtype):.0e}"


def compare(case: Case, record: NamedArrays, side: Side, dtypes: Sequence[str] = DTYPES) -> Outcome:
    """Run a case on a side, and measure the results against torch's.

    Args:
        case: the case.
        record: the results of torch, see `parity.reference`.
        side: a value of `parity.sides.SIDES`.
        dtypes: which of the case's dtypes to run. If only a digest of the truth is known, float64 is always run: once
            it has matched the digest, it is the truth for the other dtype.
    """
    truth = truth_of(case, record)
    measured: dict[str, NamedArrays] = {}
    try:
        if truth is None:
            truth = _checked_results(case, side, "float64")
            pairs = [(array, digest(array), row) for array, row in zip(truth.values(), record["digest"], strict=True)]
            rows = [(array.size, 0.0, np.max(np.abs(ours - row)) / row[0]) for array, ours, row in pairs]
            measured["float64"] = {"errors": np.array(rows)}
        for dtype in case.dtypes:
            if dtype in dtypes and dtype not in measured:
                measured[dtype] = measure(case, _checked_results(case, side, dtype), truth, dtype)
    except Exception as problem:  # a case that breaks is a case that fails; the others go on
        return Outcome(case, problem=f"{type(problem).__name__}: {problem}".splitlines()[0])
    return Outcome(case, measured, record)


def _checked_results(case: Case, side: Side, dtype: str) -> NamedArrays:
    """A side's results in the order of `case.measured()`, once their names, shapes and dtype are right."""
    results = side(case, dtype)
    expected = case.measured()
    found = {name: array.shape for name, array in results.items()}
    if found != expected:
        raise ValueError(f"the results should be {expected}, got {found}")
    dtypes = {str(array.dtype) for array in results.values()}
    if dtypes != {dtype}:
        raise TypeError(f"the results should be {dtype}, got {sorted(dtypes)}")
    return {name: results[name] for name in expected}


@dataclasses.dataclass
class Row:
    """The errors of one kind and quantity over all cases with one less exact dtype, see `reference.errors`.

    Attributes:
        kind: a case's `group`, which is its kind, but for long sequences.
        dtype: the less exact dtype; float32 if none was run.
        quantity: see `parity.cases.quantity`.
        count: how many numbers were compared.
        float64: the largest float64 error.
        inexact: how many numbers were compared in `dtype`.
        worst: the largest error in `dtype`.
        rms: the rms error in `dtype`.
        torch_worst: torch's own largest error in `dtype`.
        torch_rms: torch's own rms error in `dtype`.
    """

    kind: str
    dtype: str
    quantity: str
    count: int = 0
    float64: float | None = None
    inexact: int = 0
    worst: float | None = None
    rms: float | None = None
    torch_worst: float | None = None
    torch_rms: float | None = None

    @property
    def name(self) -> str:
        return f"{self.kind} {self.quantity}" + ("" if self.dtype == "float32" else f" in {self.dtype}")

    @property
    def ratio(self) -> float | None:
        """Our rms error by torch's, or None if too few numbers were measured for a judgement."""
        if self.rms is None or self.torch_rms is None or self.inexact < ENOUGH:
            return None
        return self.rms / self.torch_rms if self.torch_rms else math.inf if self.rms else 1.0

    def failure(self) -> str:
        """The failure of the row as a whole; empty if there is none."""
        if self.dtype == "float32" and not products_are_float32():
            return ""  # torch's error comes from float32 products
        limit = RATIO_OVERALL if self.kind == EVERYTHING[0] else RATIO
        if self.ratio is None or self.ratio <= limit:
            return ""
        return f"the rms {self.dtype} error is {self.ratio:.2f} of torch's own, more than {limit}"


@dataclasses.dataclass
class Histogram:
    """A histogram of the errors of a group in units in the last place, with the limits of `reference.ULPS`.

    Attributes:
        kind: a case's `group`.
        dtype: the dtype that was run, whose units are counted.
        ours: counts, one for each limit and one above the last limit.
        torch: the counts of torch's results; None in float64, where they are the truth.
    """

    kind: str
    dtype: str
    ours: list[int]
    torch: list[int] | None


def histograms(outcomes: Iterable[Outcome]) -> list[Histogram]:
    """A histogram for each group of cases and dtype, but not of digests."""
    counts: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    for outcome in outcomes:
        for dtype, measured in outcome.measured.items():
            if "ulps" in measured:
                torch = outcome.torch["ulps"] if dtype == outcome.case.inexact and outcome.torch else 0
                ours, theirs = counts.get((outcome.case.group, dtype), (0, 0))
                counts[outcome.case.group, dtype] = (ours + measured["ulps"], theirs + torch * np.ones(1, int))
    return [
        Histogram(kind, dtype, ours.tolist(), theirs.tolist() if theirs.any() else None)
        for (kind, dtype), (ours, theirs) in counts.items()
    ]


EVERYTHING = ("all kinds", "all quantities")


def pool(outcomes: Iterable[Outcome]) -> tuple[list[Row], list[Row]]:
    """The rows of each kind, dtype and quantity, in the order of the cases, and the rows of each dtype overall."""
    groups: dict[tuple[str, str, str], list[tuple[NamedArrays, np.ndarray | None]]] = {}
    overall: dict[tuple[str, str, str], list[tuple[NamedArrays, np.ndarray | None]]] = {}
    for outcome in outcomes:
        dtype = outcome.case.inexact or "float32"
        for index, name in enumerate(outcome.case.measured()):
            ours = {dtype: rows[index] for dtype, rows in outcome.errors.items()}
            entry = (ours, outcome.torch["errors"][index] if outcome.torch else None)
            if ours:
                groups.setdefault((outcome.case.group, dtype, quantity(name)), []).append(entry)
                overall.setdefault((EVERYTHING[0], dtype, EVERYTHING[1]), []).append(entry)
    rows, everything = ([_row(*key, entries) for key, entries in table.items()] for table in (groups, overall))
    return rows, everything


def _row(kind: str, dtype: str, name: str, entries: list[tuple[NamedArrays, np.ndarray | None]]) -> Row:
    row = Row(kind, dtype, name)
    double = np.array([ours["float64"] for ours, _ in entries if "float64" in ours])
    pairs = [(ours[dtype], torch) for ours, torch in entries if dtype in ours and torch is not None]
    if len(double):
        row.count, row.float64 = int(double[:, 0].sum()), float(double[:, 2].max())
    if pairs:
        ours, torch = (np.array(table) for table in zip(*pairs, strict=True))
        row.inexact = int(ours[:, 0].sum())
        row.count = max(row.count, row.inexact)
        row.worst, row.torch_worst = float(ours[:, 2].max()), float(torch[:, 2].max())
        row.rms, row.torch_rms = (math.sqrt(table[:, 1].sum() / row.inexact) for table in (ours, torch))
    return row
