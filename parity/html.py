"""A report as one HTML file with everything in it: no script, no style sheet and no picture from elsewhere."""

import base64
import io
import itertools
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.figure import Figure

from . import plots
from .cases import ENOUGH
from .compare import DTYPES, LARGEST, LARGEST_ROUNDED, RATIO, RATIO_OVERALL, products_are_float32
from .report import COLUMNS, Report
from .style import STYLE
from .training import STEPS

TEMPLATE = Path(__file__).with_name("report.html")


def write(path: Path, report: Report, command: str, scope: str) -> None:
    """Write the report of a run that was started with this command line.

    Args:
        path: the file.
        report: what was found.
        command: the command line.
        scope: what was compared: "suite", a "part" of it, or the user's "model".
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    tables = [
        (overall, [(kind, list(rows)) for kind, rows in itertools.groupby(rows, lambda row: row.kind)])
        for overall in report.overall
        for rows in [[row for row in (*report.rows, overall) if row.dtype == overall.dtype]]
    ]
    path.write_text(
        environment.from_string(TEMPLATE.read_text()).render(
            report=report,
            command=command,
            tables=tables,
            pictures=_pictures(report),
            columns=COLUMNS,
            scope=scope,
            steps=STEPS,
            limits=_limits(),
            ratios=(RATIO, RATIO_OVERALL),
            enough=ENOUGH,
        )
    )


def _limits() -> dict[str, float]:
    """The largest scaled error that counts as right, by dtype."""
    return LARGEST if products_are_float32() else LARGEST | {"float32": LARGEST_ROUNDED}


@matplotlib.rc_context(STYLE)
def _pictures(report: Report) -> dict[str, str]:
    """The pictures by what they show, as addresses that hold an SVG."""
    found = {}
    for dtype in DTYPES:
        chosen = [histogram for histogram in report.histograms if histogram.dtype == dtype]
        if chosen:
            found[f"errors in {dtype}"] = plots.errors_in_ulp(chosen, report.side)
    if report.drift:
        found["drift"] = plots.error_over_time(report.drift)
    if any(run.curves[0] for run in report.training):
        found["training"] = plots.training(report.training)
    return {name: _address(figure) for name, figure in found.items()}


def _address(figure: Figure) -> str:
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})  # the same report, the same bytes
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.getvalue()).decode()}"
