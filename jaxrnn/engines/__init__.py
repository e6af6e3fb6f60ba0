"""Engines run layers: `Scan`, and a file for each other way.

To add one, write a file with a class, and add it to `ENGINES`; and to `AUTO` if `engine="auto"` should use it. No other
file has to change. The shortest engine is a subclass of `Scan`: examples/own_cell.md has one. There are two kinds:

- one that runs loops over time has the methods of `Engine`. It sees a `Run`, a block of steps of one layer in one
  direction. Blocks, products with the input, and derivatives with respect to the weights are made outside;
- one that runs whole layers, such as a library's kernel, has the methods of `LayerEngine`. It sees a
  `Layer`, one layer in all its directions, and computes all of its outputs. It is tried only if it comes
  before every engine of the first kind in `engine=`.

`Run` and `Layer` are in `jaxrnn._core.steps`. Shapes are in the letters of `jaxrnn._core`.

Dropout and the next layer are done outside.

Calls are jitted, so an engine's methods run while JAX traces: once for each spec, options and shapes, and again where
JAX maps or differentiates the program, or compiles it for several devices. `ENGINES` and `AUTO` are not part of that
key. After changing them, call `jax.clear_caches()`.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax

from jaxrnn._core.options import Options
from jaxrnn._core.steps import Kept, Layer, Run, Steps
from jaxrnn.cells import Arrays
from jaxrnn.engines.associative import AssociativeScan, EitherScan
from jaxrnn.engines.cudnn import CuDNN
from jaxrnn.engines.pallas import Pallas
from jaxrnn.engines.scan import Form, Linear, Scan


class Engine(Protocol):
    """How to run a layer's loop over a block of steps, and its derivative.

    The sums are what the cell's gates are computed from: `W_ih x + b_ih + W_hh h + b_hh` for each gate, but only
    `W_hh h + b_hh` for one in `cell.apart`.
    """

    def refuses(self, run: Run) -> str | None:
        """Why this engine cannot run it, as a clause without a full stop; None if it can.

        The reason may be the cell (`run.settings.cell`), the shapes of all steps (`run.gates[0].shape`), or the dtype
        (`run.dtype`). The gates have shapes and dtypes, but no values.
        """

    def forms(self, run: Run) -> Mapping[str | None, Form]:
        """How its loops are written: a Form by platform. The key None stands for all other platforms.

        A kernel that wants all steps at once has `Form()`. With any other form a block may be one step: its gates,
        marks, results, and saved arrays then have no axis of time.
        """

    def run(self, form: Form, run: Run, keep: bool) -> tuple[Steps, Arrays, Kept | None]:
        """Run all steps. Returns the `Steps`, as `steps.returned` makes them; the last state; and a `Kept`.

        Without `keep`, the last result is None. With `remat="gates"`, it has the states alone.
        """

    def tangents(self, form: Form, run: Run, kept: Kept, linear: Linear) -> tuple[Steps, Arrays]:
        """The tangent of `run`.

        It must be linear in `linear`. JAX transposes it into the backward pass, and maps and differentiates it. An
        engine with a backward pass of its own solves the recurrence by `jax.lax.custom_linear_solve`, and gives the
        backward pass as `transpose_solve`; or it is for one platform, and gives a transposed kernel, as
        `engines.pallas` does.

        Args:
            run: the argument of the method `run`, maybe without its gates.
            kept: its third result. If that had neither sums nor `push`, the sums have been recomputed.
            linear: the tangents. Its `sums` leave out the part from the state before, and have all gates in one array,
                (T, B, G * H), or as `jaxrnn._core.layouts` joins them.
        """


@runtime_checkable
class LayerEngine(Protocol):
    """How to run a whole layer. JAX differentiates it, by the engine's own rule if it has one."""

    def refuses_layer(self, layer: Layer) -> str | None:
        """Why this engine cannot run it, as a clause without a full stop; None if it can."""

    def run_layer(self, layer: Layer) -> tuple[jax.Array, Arrays]:
        """The outputs, (T, B, D * P) in x's dtype, 0 past a row's end; and the last states, like `layer.state`.

        The last states are in float32 at least.
        """


ENGINES: dict[str, Engine | LayerEngine] = {
    "scan": Scan(),
    "associative_scan": AssociativeScan(),
    "either_scan": EitherScan(),
    "cudnn": CuDNN(),
    "pallas": Pallas(),
    # Computes what a TPU would compute, on any platform, slowly.
    "pallas_interpret": Pallas(platform=None, interpret=True),
}
# The engines of "auto", in the order in which they are tried. The last one runs everything.
AUTO = ["either_scan"]


def asked(options: Options) -> dict[str, Engine | LayerEngine]:
    """The engines that may run, by name, in the order in which they are tried.

    Raises:
        ValueError: an engine's name is unknown.
    """
    given = options.engine
    names = AUTO if given == "auto" else [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not names or not set(names) <= set(ENGINES):
        wanted = f"'auto', one of {list(ENGINES)}, or a tuple of these in the order in which to try them"
        raise ValueError(f"engine should be {wanted}, got {given!r}")
    return {name: ENGINES[name] for name in names}


def layer_engine_for(layer: Layer) -> LayerEngine | None:
    """The engine that runs the whole layer, or None if one of loops comes first.

    Raises:
        ValueError: all of them run whole layers, and refuse this one.
    """
    reasons = {}
    for name, each in asked(layer.options).items():
        if not isinstance(each, LayerEngine):
            return None
        reason = each.refuses_layer(layer)
        if reason is None:
            return each
        reasons[name] = reason
    raise _refused(layer.options, reasons)


def engine_for(run: Run) -> Engine:
    """The first engine of loops in `settings.options.engine` that does not refuse.

    Raises:
        ValueError: all of them refuse.
    """
    reasons = {}
    for name, each in asked(run.settings.options).items():
        if isinstance(each, LayerEngine):
            reasons[name] = "it runs whole layers, and refused this one or comes after an engine of loops"
            continue
        reason = each.refuses(run)
        if reason is None:
            return each
        reasons[name] = reason
    raise _refused(run.settings.options, reasons)


def _refused(options: Options, reasons: dict[str, str]) -> ValueError:
    said = "; ".join(reasons.values()) if len(reasons) == 1 else "; ".join(f"{n}: {r}" for n, r in reasons.items())
    remedy = f"Use engine={(*reasons, 'scan')}, which runs it by scan, or engine='auto'"
    return ValueError(f"engine={options.engine!r} cannot run this: {said}. {remedy}")
