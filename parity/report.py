"""The report of a comparison: a table, a verdict in words, and the same as JSON."""

import dataclasses
import itertools
import platform
from collections.abc import Sequence
from typing import Any

import flax
import jax
import numpy as np
from rich.console import Console
from rich.markup import escape

import jaxrnn

from .cases import ENOUGH, LONG
from .compare import Histogram, Outcome, Row, histograms, pool, products_are_float32
from .sides import precision
from .tables import new_table, print_table
from .training import STEPS, Trained

# Of a table of rows: by attribute, the heading and the form of a number.
COLUMNS = {
    "count": ("numbers", "{:,}"),
    "float64": ("float64\nworst", "{:.1e}"),
    "worst": ("{dtype}\nworst", "{:.1e}"),
    "rms": ("{dtype}\nrms", "{:.1e}"),
    "torch_worst": ("torch's\nworst", "{:.1e}"),
    "torch_rms": ("torch's\nrms", "{:.1e}"),
    "ratio": ("rms\nratio", "{:.2f}"),
}


@dataclasses.dataclass
class Report:
    """The judgement of a run.

    Attributes:
        side: the side that was compared with torch.
        rows: one for each kind, quantity and less exact dtype.
        overall: one for everything, for each less exact dtype.
        failures: the failures by case, or by kind and quantity; empty if all is well.
        places: the place and the likely cause of the failure, of the first failing case of each kind.
        cases: the number of cases that were compared.
        training: the results of the training runs.
        histograms: errors by their size.
        drift: the error over time of long sequences and of failures: `{"RNN-long in float32": {"torch": [...]}}`.
        environment: versions and the device.
        limits: the limits in float64 of the cases that set one.
    """

    side: str
    rows: list[Row]
    overall: list[Row]
    failures: dict[str, str]
    places: dict[str, str]
    cases: int
    training: list[Trained]
    histograms: list[Histogram]
    drift: dict[str, dict[str, list[float]]]
    environment: dict[str, str]
    limits: dict[str, float]

    @classmethod
    def of(
        cls,
        side: str,
        outcomes: Sequence[Outcome],
        training: Sequence[Trained],
        torch: str,
        places: dict[str, str] | None = None,
        ratios: bool = True,
    ) -> "Report":
        """Judge the outcomes. `torch` is the version of torch; rms errors are judged if `ratios` is set."""
        rows, overall = pool(outcomes)
        failures = {outcome.case.name: outcome.failure() for outcome in outcomes}
        if ratios:
            failures |= {row.name: row.failure() for row in (*rows, *overall)}
        failures |= {run.name: run.failure() for run in training}
        failures = {name: failure for name, failure in failures.items() if failure}
        places = places or {}
        shown = [o for o in outcomes if (o.case.steps or 0) >= LONG or o.case.name in places or o.case.alone]
        return cls(
            side=side,
            rows=rows,
            overall=overall,
            failures=failures,
            places=places,
            cases=len(outcomes),
            training=list(training),
            histograms=histograms(outcomes),
            drift={name: lines for outcome in shown for name, lines in _drift(outcome, side).items()},
            environment=_environment(torch),
            limits={outcome.case.name: outcome.case.limit for outcome in outcomes if outcome.case.limit is not None},
        )

    @property
    def verdict(self) -> str:
        torch = f"torch {self.environment['torch']}"
        if self.failures:
            cases = self.cases + len(self.training)
            return f"{self.side} does not give what {torch} gives: {len(self.failures)} failures in {cases} cases."
        count = sum(row.count for row in self.overall)
        words = [
            f"{self.side} gives what {torch} gives"
            + (f": {self.cases} case{'s' * (self.cases > 1)}, {count:,} numbers." if count else ".")
        ]
        exact = [row.float64 for row in self.overall if row.float64 is not None]
        if exact:
            words.append(f"In float64 they are at most {max(exact):.1e} apart.")
        if self.limits:
            name = max(self.limits, key=lambda name: self.limits[name])
            words.append(
                f"Up to {self.limits[name]:.0e} counts as right for {name}, because torch's own results change "
                "about as much when hidden units are renumbered."
            )
        for overall in self.overall:
            if overall.worst is None:
                continue
            words.append(f"In {overall.dtype} they are at most {overall.worst:.1e} from the truth.")
            if overall.dtype == "float32" and not products_are_float32():
                words.append(
                    "Products are less exact than float32 here, JAX's default, so torch's error is no measure."
                )
                continue
            judged = [row for row in self.rows if row.dtype == overall.dtype and row.ratio is not None]
            if judged and overall.ratio is not None:
                top = max(judged, key=lambda row: row.ratio or 0.0)
                words.append(f"The rms {overall.dtype} error is {overall.ratio:.2f} of torch's own,")
                words.append(f"at worst {top.ratio:.2f} for one kind and quantity, {top.name}.")
            else:
                words.append(
                    f"Too few numbers to compare {overall.dtype} errors with torch's: it takes {ENOUGH:,} of a kind."
                )
        if self.training:
            losses, weights = (max(getattr(run, what) for run in self.training) for what in ("losses", "weights"))
            words.append(f"{len(self.training)} trainings of {STEPS} steps stay together:")
            words.append(f"losses at most {losses:.1e} apart, and the last weights {weights:.1e}.")
        return " ".join(words)

    @staticmethod
    def columns(overall: Row) -> list[str]:
        """The columns of a table that are not empty: if the less exact dtype was not run, the first two."""
        return [name for name in COLUMNS if name in ("count", "float64") or overall.worst is not None]

    @staticmethod
    def cell(row: Row, name: str) -> str:
        value = getattr(row, name)
        return "" if value is None else COLUMNS[name][1].format(value)

    def json(self) -> dict[str, Any]:
        """The report in JSON's types."""
        tables = {
            name: [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows]
            for name, rows in (("rows", self.rows), ("overall", self.overall))
        }
        return dataclasses.asdict(self) | {"passed": not self.failures, "verdict": self.verdict} | tables

    def show(self, console: Console) -> None:
        for overall in self.overall:
            dtype = overall.dtype
            shown = [name for name in self.columns(overall) if name != "torch_worst"]  # which fit into 80 columns
            dtypes = f"float64 and {dtype}" if "worst" in shown else "float64"
            title = f"{self.side}: errors against torch's float64, in {dtypes}"
            table = new_table(title, ["quantity"], (COLUMNS[name][0].format(dtype=dtype) for name in shown))
            table.columns[0].min_width = 15  # the longest name of a quantity
            rows = [row for row in (*self.rows, overall) if row.dtype == dtype]
            for kind, group in itertools.groupby(rows, lambda row: row.kind):
                table.add_section()
                table.add_row(escape(kind), style="bold")
                for row in group:
                    cells = [self.cell(row, name) for name in shown]
                    table.add_row(f" {row.quantity}", *cells, style="red" if row.name in self.failures else "")
            print_table(table, console)
        if self.training:
            title = f"training for {STEPS} steps in float64, in step with torch"
            headings = "loss at\nfirst", "torch's\nlast", "our\nlast", "losses\napart", "weights\napart"
            table = new_table(title, ["run"], headings)
            for run in self.training:
                means = (f"{mean:.4f}" for mean in (run.first, run.torch, run.ours))
                style = "red" if run.name in self.failures else ""
                table.add_row(run.name, *means, f"{run.losses:.1e}", f"{run.weights:.1e}", style=style)
            print_table(table, console)
        for name, failure in self.failures.items():
            console.print(f"[red]FAIL[/] {escape(name)}: ", failure, sep="", highlight=False, soft_wrap=True)
        for name, place in self.places.items():
            console.print(f"[red]WHERE[/] {escape(name)}: ", place, sep="", highlight=False, soft_wrap=True)
        console.print(self.verdict, style="red" if self.failures else "green", highlight=False)
        console.print(", ".join(f"{name} {value}" for name, value in self.environment.items()), highlight=False)


def line(group: str, outcomes: Sequence[Outcome]) -> str:
    """One line about a group of cases."""
    count = f"{len(outcomes)} case{'s' * (len(outcomes) > 1)}"
    failed = [outcome for outcome in outcomes if outcome.failure()]
    if failed:
        return f"[red]{group}: {len(failed)} of {count} failed[/], the first is {failed[0].case.name}"
    worst: dict[str, float] = {}
    for outcome in outcomes:
        for dtype, errors in outcome.errors.items():
            worst[dtype] = max(worst.get(dtype, 0.0), float(errors[:, 2].max()))
    return f"{group}: {count}, at most " + ", ".join(f"{error:.1e} off in {dtype}" for dtype, error in worst.items())


def _drift(outcome: Outcome, side: str) -> dict[str, dict[str, list[float]]]:
    """The error over time in the dtype that is off, if one is, or else in the case's less exact dtype."""
    dtype = outcome.off[0] if outcome.off else outcome.case.inexact or "float64"
    ours = outcome.measured.get(dtype, {})
    if "over_time" not in ours:
        return {}
    lines = {side: ours["over_time"].tolist()}
    if dtype == outcome.case.inexact and outcome.torch:
        lines["torch"] = outcome.torch["over_time"].tolist()
    return {f"{outcome.case.name} in {dtype}": lines}


def _environment(torch: str) -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "torch": torch,
        "jaxrnn": jaxrnn.__version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": f"{device.platform} ({device.device_kind})",
        "precision": precision(),
    }
