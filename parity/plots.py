"""The pictures of a report: how large errors are, how they grow over time, and how training goes."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .compare import Histogram
from .reference import ULPS
from .style import COLORS, OURS, add_legend, set_style
from .training import Trained

COLUMNS = 3


def _grid(count: int, height: float = 2.2) -> tuple[Figure, list[Axes]]:
    """A figure of small plots, three in a row."""
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(3.4 * columns + 0.4, height * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.set_visible(False)
    for axis in axes:
        set_style(axis)
    return figure, list(axes[:count])


def _title(text: str) -> str:
    """Break a title that is wider than its plot into lines."""
    return textwrap.fill(text, 46, break_on_hyphens=False)


def errors_in_ulp(histograms: Sequence[Histogram], side: str) -> Figure:
    """Histograms of the errors in units in the last place, by kind, ours beside torch's."""
    figure, axes = _grid(len(histograms))
    positions = np.arange(len(ULPS) + 1)
    labels = ["½", *(f"{limit:,.0f}" for limit in ULPS[1:]), "more"]
    for axis, histogram in zip(axes, histograms, strict=True):
        both = {side: histogram.ours} | ({"torch": histogram.torch} if histogram.torch else {})
        width = 0.8 / len(both)
        for index, (name, counts) in enumerate(both.items()):
            share = np.array(counts) / max(1, sum(counts))
            offset = positions + (index - (len(both) - 1) / 2) * width
            axis.bar(offset, share, width, label=name, color=COLORS.get(name, OURS))
        axis.set_title(_title(f"{histogram.kind}, {sum(histogram.ours):,} numbers"), fontsize=9, loc="left")
        axis.set_xticks(positions, labels, rotation=90, fontsize=7)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    add_legend(figure, axes)
    return figure


def error_over_time(drift: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """The rms error of the output in each block of time."""
    figure, axes = _grid(len(drift))
    for axis, (name, lines) in zip(axes, drift.items(), strict=True):
        for line, values in lines.items():
            # Zero has no place on a logarithmic axis: there the line has a gap, and a dot shows what stands alone.
            shown = [value if value > 0 else math.nan for value in values]
            middle = (np.arange(len(shown)) + 0.5) / len(shown)
            axis.plot(middle, shown, label=line, color=COLORS.get(line, OURS), marker=".", markersize=3)
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.set_ylim(low / 3, high * 3)  # a decade at least: what does not grow should look so
        axis.set_xlim(0, 1)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_title(_title(name), fontsize=9, loc="left")
    add_legend(figure, axes)
    return figure


def training(runs: Iterable[Trained]) -> Figure:
    """Torch's loss and ours at each step, and the difference."""
    trained = [run for run in runs if run.curves[0]]
    figure, axes = _grid(len(trained), height=2.4)
    for axis, run in zip(axes, trained, strict=True):
        torch, ours = (np.array(curve) for curve in run.curves)
        axis.plot(torch, color=COLORS["torch"], label="torch's loss")
        axis.plot(ours, color=OURS, linestyle=(0, (2, 2)), label="our loss")
        axis.set_title(run.name.removeprefix("training-"), fontsize=9, loc="left")
        apart = axis.twinx()
        difference = np.abs(torch - ours)
        apart.plot(np.where(difference > 0, difference, np.nan), ".", color="#777777", markersize=2)
        apart.set_yscale("log")
        apart.set_ylim(1e-18, 1)
        apart.tick_params(colors="#777777", labelsize=7)
        apart.spines[["top"]].set_visible(False)
        axis.plot([], [], ".", color="#777777", label="apart (right axis)")
    add_legend(figure, axes)
    return figure
