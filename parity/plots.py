"""The pictures of a report, as SVG: how large errors are, how they grow over time, and how training goes."""

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .compare import Histogram
from .reference import ULPS
from .sweep import Curves
from .training import Trained

COLUMNS = 3
OURS = "#1f5fbf"
COLORS = {"torch": "#d9730d", "flax.nnx": "#4f9a4f", "flax.linen": "#9ac79a", "keras": "#a3293d"}
COLORS |= {"cudnn": "#2a8a8a", "graphs": "#c9a227", "pallas": "#7d5ba6"}
SHADES = ("#9cc0ee", "#4a86d8", "#123f85")  # from few hidden units to many
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "jaxrnn", "font.size": 9, "font.family": "sans-serif"}


def _grid(count: int, height: float = 2.2) -> tuple[Figure, list[Axes]]:
    """A figure of small plots, three in a row."""
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(3.4 * columns + 0.4, height * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.set_visible(False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, list(axes[:count])


def _title(text: str) -> str:
    """On several lines, if it is wider than its plot."""
    return textwrap.fill(text, 46, break_on_hyphens=False)


def _svg(figure: Figure) -> bytes:
    picture = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(picture, format="svg", metadata={"Date": None})  # the same report, the same bytes
    return picture.getvalue()


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)


def _of_ratios(axis: Axes, name: str) -> tuple[float, float]:
    """Make the x or y axis one of ratios: logarithmic, and wide enough to show how near 1 is. Returns its limits."""
    getattr(axis, f"set_{name}scale")("log")
    low, high = getattr(axis, f"get_{name}lim")()
    low, high = min(low, 0.45), max(high, 2.2)
    getattr(axis, f"set_{name}lim")(low, high)
    few = range(-12, 16, 1 if high < 2**7 * low else 2)
    ticks = [2.0**power for power in few if low <= 2.0**power <= high]
    getattr(axis, f"set_{name}ticks")(ticks, [f"{tick:g}x" for tick in ticks])
    axis.minorticks_off()
    return low, high


def ratios(found: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], names: Mapping[str, str]) -> Figure:
    """Their time over ours: points are medians, bars the middle half of all turns.

    Args:
        found: for each workload, program and side the quartiles.
        names: for each side that is drawn, what to call it.
    """
    programs = list(dict.fromkeys(program for by_program in found.values() for program in by_program))
    figure = Figure(figsize=(9, 0.3 * len(found) + 1.4), layout="constrained")
    axes = figure.subplots(1, len(programs), sharey=True, squeeze=False)[0]
    for axis, program in zip(axes, programs, strict=True):
        for index, (side, name) in enumerate(names.items()):
            rows = {row: by[program][side] for row, by in enumerate(found.values()) if side in by.get(program, {})}
            offset = 0.6 * ((index + 0.5) / len(names) - 0.5)
            low, middle, high = zip(*rows.values(), strict=True) if rows else ((), (), ())
            spread = [
                [m - q for m, q in zip(middle, low, strict=True)],
                [q - m for m, q in zip(middle, high, strict=True)],
            ]
            places = [row + offset for row in rows]
            axis.errorbar(middle, places, xerr=spread, fmt="o", markersize=4.5, color=COLORS[side], label=name)
        axis.axvline(1, color="#333333", linewidth=1)
        _, right = _of_ratios(axis, "x")
        axis.axvspan(1, right, color=OURS, alpha=0.06, linewidth=0)
        axis.set_title(f"{program}: their time / jaxrnn's", fontsize=10, loc="left")
        axis.set_yticks(range(len(found)), list(found))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_ylim(len(found) - 0.5, -0.5)
    axes[0].legend(loc="lower right", frameon=True, edgecolor="none")
    figure.supxlabel("right of the line jaxrnn is faster; bars show the middle half of all turns", fontsize=9)
    return figure


def sweep(time: Curves, memory: Curves, side: str) -> Figure:
    """Their time over ours, and our memory over theirs, over the rows: a line for each number of hidden units."""
    figure = Figure(figsize=(2.6 * len(time) + 0.6, 5.2), layout="constrained")
    axes = figure.subplots(2, len(time), sharex=True, sharey="row", squeeze=False)
    units = sorted({units for by_units in time.values() for units in by_units})
    colors = dict(zip(units, SHADES[-len(units) :], strict=False))
    names = f"{side}'s time / jaxrnn's", f"jaxrnn's memory / {side}'s"
    for row, curves, name in zip(axes, (time, memory), names, strict=True):
        for axis, (kind, program) in zip(row, time, strict=True):
            for each, by_rows in curves.get((kind, program), {}).items():
                points = sorted(by_rows.items())
                axis.plot(*zip(*points, strict=True), ".-", color=colors[each], label=f"{each} hidden units")
            axis.axhline(1, color="#333333", linewidth=1)
            axis.set_title(f"{kind}, {program}", fontsize=10, loc="left")
            axis.set_xscale("log", base=2)
            ticks = sorted({rows for by_units in time.values() for by_rows in by_units.values() for rows in by_rows})
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
        row[0].set_ylabel(name)
        low, high = _of_ratios(row[0], "y")
        for axis in row:
            axis.axhspan(*((1, high) if curves is time else (low, 1)), color=OURS, alpha=0.06, linewidth=0)
    _legend(figure, max(axes.flat, key=lambda axis: len(axis.get_legend_handles_labels()[0])))
    figure.supxlabel("rows; in the shaded half jaxrnn is faster, or takes less memory", fontsize=9)
    return figure


def errors_in_ulp(histograms: Sequence[Histogram], side: str) -> bytes:
    """What share of the numbers is off by how many units in the last place, by kind, ours beside torch's."""
    with matplotlib.rc_context(STYLE):
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
        _legend(figure, max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[0])))
        return _svg(figure)


def error_over_time(drift: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """The rms error of the output, block of time by block of time."""
    with matplotlib.rc_context(STYLE):
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
        _legend(figure, max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[0])))
        return _svg(figure)


def training(runs: Iterable[Trained]) -> bytes:
    """Torch's loss at each step, and how far ours is from it."""
    trained = [run for run in runs if run.curves[0]]
    with matplotlib.rc_context(STYLE):
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
        _legend(figure, axes[0])
        return _svg(figure)
