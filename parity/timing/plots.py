"""The pictures of the timings: ratios of time, and the curves of a sweep."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..style import COLORS, OURS, add_legend, set_style
from .sweep import Curves

SHADES = ("#9cc0ee", "#4a86d8", "#123f85")  # from few hidden units to many


def _set_ratio_scale(axis: Axes, name: str) -> tuple[float, float]:
    """Make the x or y axis logarithmic, and wide enough to show how near 1 is. Returns its limits."""
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
        found: the quartiles by workload, program and side.
        names: the labels of the sides to draw.
    """
    programs = list(dict.fromkeys(program for by_program in found.values() for program in by_program))
    figure = Figure(figsize=(9, 0.3 * len(found) + 1.4), layout="constrained")
    axes = figure.subplots(1, len(programs), sharey=True, squeeze=False)[0]
    for axis, program in zip(axes, programs, strict=True):
        for index, (side, name) in enumerate(names.items()):
            rows = {row: by[program][side] for row, by in enumerate(found.values()) if side in by.get(program, {})}
            offset = 0.6 * ((index + 0.5) / len(names) - 0.5)
            low, middle, high = zip(*rows.values(), strict=True) if rows else ((), (), ())
            spread = np.abs([np.subtract(middle, low), np.subtract(high, middle)])
            places = [row + offset for row in rows]
            axis.errorbar(middle, places, xerr=spread, fmt="o", markersize=4.5, color=COLORS[side], label=name)
        axis.axvline(1, color="#333333", linewidth=1)
        _, right = _set_ratio_scale(axis, "x")
        axis.axvspan(1, right, color=OURS, alpha=0.06, linewidth=0)
        axis.set_title(f"{program}: their time / jaxrnn's", fontsize=10, loc="left")
        axis.set_yticks(range(len(found)), list(found))
        axis.tick_params(axis="y", length=0)
        set_style(axis, "x")
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
            set_style(axis)
        row[0].set_ylabel(name)
        low, high = _set_ratio_scale(row[0], "y")
        for axis in row:
            axis.axhspan(*((1, high) if curves is time else (low, 1)), color=OURS, alpha=0.06, linewidth=0)
    add_legend(figure, list(axes.flat))
    figure.supxlabel("rows; in the shaded half jaxrnn is faster, or takes less memory", fontsize=9)
    return figure
