"""The look of all pictures: their colors, axes and legends."""

from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS = "#1f5fbf"
COLORS = {"torch": "#d9730d", "flax.nnx": "#4f9a4f", "flax.linen": "#9ac79a", "keras": "#a3293d"}
COLORS |= {"cudnn": "#2a8a8a", "graphs": "#c9a227", "pallas": "#7d5ba6"}
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "jaxrnn", "font.size": 9, "font.family": "sans-serif"}


def set_style(axis: Axes, grid: Literal["x", "both"] = "both") -> None:
    """Draw no frame on the top and on the right, and a light grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, alpha=0.25)


def add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Put the longest legend of the axes above the figure."""
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes), key=lambda legend: len(legend[0]))
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
