"""Draw the pictures of the README and the guides: `python examples/pictures/draw.py`, in the root of a clone.

`parity.svg` and `speed.svg` show what was measured, from `parity.json` and `speed.json`. To measure anew, on a quiet
machine:

    python -m parity --json parity.json
    python -m parity.timing --sides sharded,flax.nnx,torch --json speed.json
    python examples/pictures/draw.py --parity parity.json --speed speed.json

The other two are diagrams. They need `pip install -e ".[report]"`.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from jaxrnn.parity import style
from jaxrnn.parity.timing import plots
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
OURS, TORCH, FLAX = style.OURS, style.COLORS["torch"], style.COLORS["flax.nnx"]
GREY, INK = "#d8dade", "#333333"
STYLE = style.STYLE | {"svg.fonttype": "path", "font.size": 10, "font.family": "DejaVu Sans"}  # no font is needed
KINDS = {"LSTM": "LSTM", "LSTM_PROJ": "LSTM, projected", "GRU": "GRU"}
KINDS |= {"RNN_TANH": "RNN, tanh", "RNN_RELU": "RNN, relu", "LSTMCell": "LSTMCell", "GRUCell": "GRUCell"}
KINDS |= {"RNNCell_TANH": "RNNCell, tanh", "RNNCell_RELU": "RNNCell, relu"}
DTYPES = ("float64", "float32", "bfloat16")  # float16's errors lie among bfloat16's


def summary_of_parity(report: dict[str, Any]) -> dict[str, Any]:
    """For each kind and dtype the largest error of ours and of torch's; of a report of `python -m parity --json`."""
    found: dict[str, Any] = {"environment": report["environment"], "cases": report["cases"], "errors": {}}
    for row in report["rows"]:
        if row["kind"] not in KINDS:
            continue
        errors = found["errors"].setdefault(row["kind"], {})
        for dtype, ours, torch in (
            ("float64", row["float64"], None),
            (row["dtype"], row["worst"], row["torch_worst"]),
        ):
            if ours is not None:
                before = errors.get(dtype, [0.0, 0.0])
                errors[dtype] = [max(before[0], ours), None if torch is None else max(before[1] or 0.0, torch)]
    return found


def summary_of_speed(results: dict[str, Any]) -> dict[str, Any]:
    """Where `parity.timing --json` ran, and the quartiles of their time over ours."""
    return {"environment": results["environment"], "ratios": results["ratios"]}


def parity(data: dict[str, Any]) -> Figure:
    """The largest error of each kind of module in each dtype, ours beside torch's, on one axis."""
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    axis = figure.subplots()
    kinds = [kind for kind in KINDS if kind in data["errors"]]
    for row, kind in enumerate(kinds):
        for ours, torch in (data["errors"][kind][dtype] for dtype in DTYPES if dtype in data["errors"][kind]):
            if torch:
                axis.plot(torch, row, "o", markersize=10, markerfacecolor="none", color=TORCH, markeredgewidth=2)
            axis.plot(ours, row, "o", markersize=5, color=OURS)
    axis.plot([], [], "o", markersize=5, color=OURS, label="jaxrnn")
    axis.plot([], [], "o", markersize=10, markerfacecolor="none", markeredgewidth=2, color=TORCH, label="PyTorch")
    for dtype in DTYPES:
        values = [value for kind in kinds for value in data["errors"][kind].get(dtype, []) if value]
        if values:
            low, high = min(values), max(values)
            axis.axvspan(low / 1.8, high * 1.8, color=GREY, alpha=0.4, linewidth=0)
            axis.text((low * high) ** 0.5, -0.85, dtype, ha="center", va="bottom", fontweight="bold", color=INK)
    axis.set_xscale("log")
    axis.set_yticks(range(len(kinds)), [KINDS[kind] for kind in kinds])
    axis.set_ylim(len(kinds) - 0.4, -1.5)
    axis.set_xlabel("largest error of any output, state or gradient, beside PyTorch in float64 (which is the truth)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.25)
    axis.legend(loc="upper center", bbox_to_anchor=(0.35, 0.85), frameon=True, edgecolor="none")
    return figure


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure without axes whose unit is an inch."""
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, width)
    axis.set_ylim(0, height)
    axis.set_axis_off()
    return figure, axis


def _box(axis: Axes, x: float, y: float, text: str, color: str, width: float = 0.62, height: float = 0.42) -> None:
    style = "round,pad=0,rounding_size=0.06"
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor="white", alpha=0.9))
    ink = INK if color == GREY else "white"
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=9)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=color, linewidth=1.2))


def stack() -> Figure:
    """Two layers in both directions: where each row of h_n comes from, and what the output is."""
    figure, axis = _canvas(7.6, 4.6)
    left, pitch, steps = 1.95, 1.0, 4
    ys = {(0, 0): 0.95, (0, 1): 1.55, (1, 0): 2.65, (1, 1): 3.25}
    for (layer, direction), y in ys.items():
        color = TORCH if direction else OURS
        for step in range(steps):
            _box(axis, left + step * pitch, y, "backward" if direction else "forward", color, 0.72)
        for step in range(steps - 1):
            ends = (left + step * pitch + 0.72, y + 0.21), (left + (step + 1) * pitch, y + 0.21)
            _arrow(axis, *(ends[::-1] if direction else ends), color)
        row = 2 * layer + direction
        if direction:
            _arrow(axis, (left, y + 0.21), (left - 0.42, y + 0.21), color)
            axis.text(left - 0.47, y + 0.21, f"h_n[{row}]", ha="right", va="center", color=color, fontweight="bold")
        else:
            end = left + (steps - 1) * pitch + 0.72
            _arrow(axis, (end, y + 0.21), (end + 0.42, y + 0.21), color)
            axis.text(end + 0.47, y + 0.21, f"h_n[{row}]", ha="left", va="center", color=color, fontweight="bold")
    for step in range(steps):
        x = left + step * pitch + 0.36
        axis.text(x, 0.3, f"x[{step}]", ha="center", va="center", color=INK)
        _arrow(axis, (x, 0.45), (x, 0.92))
        _arrow(axis, (x, 2.0), (x, 2.62))
        _arrow(axis, (x, 3.7), (x, 4.12))
        axis.text(x, 4.28, f"output[{step}]", ha="center", va="center", color=INK)
    axis.text(0.15, 1.46, "layer 0", fontweight="bold", color=INK, va="center")
    axis.text(0.15, 3.16, "layer 1", fontweight="bold", color=INK, va="center")
    axis.text(6.05, 4.28, "h forward and h backward,", va="center", fontsize=8.5, color=INK)
    axis.text(6.05, 4.1, "side by side", va="center", fontsize=8.5, color=INK)
    return figure


def lengths() -> Figure:
    """The same rows padded, with lengths, and packed."""
    figure, axis = _canvas(9, 3.6)
    rows = {"a": (5, OURS), "b": (2, TORCH), "c": (3, FLAX)}
    axis.text(0.2, 3.3, "padded, with lengths=[5, 2, 3]", fontweight="bold", color=INK)
    for row, (name, (length, color)) in enumerate(rows.items()):
        for step in range(5):
            text, fill = (f"{name}{step}", color) if step < length else ("padding", GREY)
            _box(axis, 0.5 + step * 0.66, 2.6 - row * 0.47, text, fill)
        axis.text(0.36, 2.81 - row * 0.47, str(row), ha="right", va="center", color=INK)
    axis.text(0.5, 1.38, "time", color=INK, fontsize=9)
    _arrow(axis, (0.92, 1.43), (3.7, 1.43))
    axis.text(4.6, 3.3, "h_n: the state after each row's own last step", fontweight="bold", color=INK)
    for row, (name, (length, color)) in enumerate(rows.items()):
        last = f"{name}{length - 1}"
        axis.text(4.6, 2.81 - row * 0.47, f"h_n[-1, {row}] is the state after", va="center", color=INK)
        _box(axis, 7.15, 2.6 - row * 0.47, last, color)
    axis.text(4.6, 1.38, "the backward direction starts there, and ends at step 0", color=INK, fontsize=9)
    axis.text(0.2, 0.88, "packed: step by step, without padding, longest row first", fontweight="bold", color=INK)
    order = sorted(rows, key=lambda name: -rows[name][0])
    x = 0.5
    for step in range(5):
        there = [name for name in order if rows[name][0] > step]
        for name in there:
            _box(axis, x, 0.36, f"{name}{step}", rows[name][1])
            x += 0.66
        axis.text(x - 0.33 * len(there) - 0.02, 0.17, str(len(there)), ha="center", color=INK, fontsize=9)
        x += 0.1
    axis.text(x + 0.02, 0.17, "batch_sizes", fontsize=9, color=INK)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, metadata={"Date": None})  # the same picture, the same bytes
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of the README and the guides.")
    parser.add_argument("--parity", type=Path, help="take errors anew, from a file of `python -m parity --json`")
    parser.add_argument("--speed", type=Path, help="take times anew, from a file of `python -m parity.timing --json`")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write to (default: where this file is)")
    options = parser.parse_args(None if arguments is None else list(arguments))
    for given, summary, name in (
        (options.parity, summary_of_parity, "parity.json"),
        (options.speed, summary_of_speed, "speed.json"),
    ):
        if given:
            (HERE / name).write_text(json.dumps(summary(json.loads(given.read_text())), indent=1) + "\n")
    with matplotlib.rc_context(STYLE):
        errors, times = (json.loads((HERE / f"{name}.json").read_text()) for name in ("parity", "speed"))
        speed = plots.ratios(times["ratios"], {"flax.nnx": "Flax", "torch": "PyTorch"})
        pictures = {"parity": parity(errors), "speed": speed, "stack": stack(), "lengths": lengths()}
        for name, figure in pictures.items():
            _save(figure, options.out / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
