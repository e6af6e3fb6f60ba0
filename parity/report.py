"""Say what a comparison found: a table, a verdict in words, and the same as JSON."""

import dataclasses
import itertools
import platform
from collections.abc import Sequence
from typing import Any

import flax
import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import jaxrnn
from parity.cases import ENOUGH
from parity.compare import RATIO_OVERALL, Outcome, Row, pool

HEADINGS = ("numbers", "float64\nworst", "float32\nworst", "float32\nrms", "torch's\nrms", "ratio\nof rms")


@dataclasses.dataclass
class Report:
    """The judgement of a run.

    Attributes:
        side: which side was compared with torch.
        rows: one for each kind and quantity.
        overall: one for everything.
        failures: what failed, by case or by kind and quantity; empty if all is well.
        cases: how many cases were compared.
        environment: versions and the device.
    """

    side: str
    rows: list[Row]
    overall: Row
    failures: dict[str, str]
    cases: int
    environment: dict[str, str]

    @classmethod
    def of(cls, side: str, outcomes: Sequence[Outcome], torch: str) -> "Report":
        """Judge the outcomes. `torch` says which torch they were compared with."""
        rows, overall = pool(outcomes)
        failures = {outcome.case.name: outcome.failure() for outcome in outcomes}
        failures |= {_name(row): row.failure() for row in rows} | {_name(overall): overall.failure(RATIO_OVERALL)}
        failures = {name: failure for name, failure in failures.items() if failure}
        return cls(side, rows, overall, failures, len(outcomes), _environment(torch))

    @property
    def verdict(self) -> str:
        torch = f"torch {self.environment['torch']}"
        if self.failures:
            return f"{self.side} does not give what {torch} gives: {len(self.failures)} failures in {self.cases} cases."
        words = [f"{self.side} gives what {torch} gives: {self.cases} cases, {self.overall.count:,} numbers."]
        if self.overall.float64 is not None:
            words.append(f"In float64 they are at most {self.overall.float64:.1e} apart.")
        if self.overall.float32 is not None:
            words.append(f"In float32 they are at most {self.overall.float32:.1e} from the truth.")
            judged = [row for row in self.rows if row.ratio is not None]
            if judged:
                top = max(judged, key=lambda row: row.ratio or 0.0)
                words.append(f"The rms float32 error is {self.overall.ratio:.2f} of torch's own,")
                words.append(f"at worst {top.ratio:.2f} for one kind and quantity, {_name(top)}.")
            else:
                words.append(f"{ENOUGH:,} numbers of one quantity, enough to compare float32 errors, are not here.")
        return " ".join(words)

    def json(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        rows = [dataclasses.asdict(row) | {"ratio": row.ratio} for row in (*self.rows, self.overall)]
        return dataclasses.asdict(self) | {
            "passed": not self.failures,
            "verdict": self.verdict,
            "rows": rows[:-1],
            "overall": rows[-1],
        }

    def show(self, console: Console) -> None:
        title = f"{self.side}: errors against torch's float64"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("quantity", no_wrap=True)
        for heading in HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        for kind, rows in itertools.groupby((*self.rows, self.overall), lambda row: row.kind):
            table.add_section()
            table.add_row(kind, style="bold")
            for row in rows:
                numbers = (row.float64, row.float32, row.rms, row.torch_rms)
                cells = [f"{row.count:,}", *("" if number is None else f"{number:.1e}" for number in numbers)]
                cells.append("" if row.ratio is None else f"{row.ratio:.2f}")
                table.add_row(f" {row.quantity}", *cells, style="red" if _name(row) in self.failures else "")
        console.print(table)
        for name, failure in self.failures.items():
            console.print(f"[red]FAIL[/] {name}: ", failure, sep="", highlight=False, soft_wrap=True)
        console.print(self.verdict, style="red" if self.failures else "green", highlight=False)
        console.print(", ".join(f"{name} {value}" for name, value in self.environment.items()), highlight=False)


def _name(row: Row) -> str:
    return f"{row.kind} {row.quantity}"


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
    }
