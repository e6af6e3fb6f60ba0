"""Layers, directions and dropout, on time-major padded rows."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxrnn._compat import is_plain
from jaxrnn._core import dropout, recurrence
from jaxrnn._core.layouts import layout
from jaxrnn._core.options import Options
from jaxrnn._core.steps import Layer, Marks, Settings, Steps, accumulator
from jaxrnn.cells import Arrays
from jaxrnn.engines import layer_engine_for
from jaxrnn.spec import Spec

Tree = TypeVar("Tree")


def run(
    spec: Spec,
    options: Options,
    params: dict[str, jax.Array],
    x: jax.Array,
    state: Arrays,
    marks: Marks,
    reset_state: Arrays | None,
    key: jax.Array | None,
    masks: Arrays | None,
    every: bool = False,
) -> tuple[jax.Array, Arrays, list[Steps]]:
    """Run all layers.

    Args:
        spec: the settings.
        options: how to run.
        params: the parameters by name, in x's dtype.
        x: the input, (T, B, I); finite in the padding, too.
        state: the initial states: (L * D, B, P), then (L * D, B, H).
        marks: where the state is held, and where it is reset.
        reset_state: what the state is reset to, like `state`; zeros if None.
        key: a random key for dropout and zoneout; None for no dropout, and for the mean of zoneout.
        masks: in place of a key, for each layer but the last the outputs that are kept, (T, B, D * P) or (1, B, D * P).
        every: whether to return the states and gates of every step.

    Returns:
        The last layer's outputs, (T, B, D * P); the last states, like `state`; and the `Steps` of each layer in each
        direction.
    """
    sides = layout(len(spec.cell.gates), None if spec.proj_size else options.hidden_axis)
    last: list[Arrays] = []
    runs: list[Steps] = []
    for index in range(spec.num_layers):
        rows = slice(index * spec.num_directions, (index + 1) * spec.num_directions)
        first, restart = jax.tree.map(lambda a, rows=rows: a[rows], (state, reset_state))
        weights = tuple(
            {role: params[name] for role, name in spec.names(index, direction).items()}
            for direction in range(spec.num_directions)
        )
        scale = dropout.h_scale(spec, key, first[0], accumulator(x.dtype), index)
        zoned = dropout.zoned(spec, key, first, x.shape[0], index)
        layer = Layer(spec.cell, options, weights, x, first, marks, restart, every, scale, zoned)
        if engine := layer_engine_for(layer):
            x, states = engine.run_layer(layer)
            last += zip(*states, strict=True)
        else:
            found = _by_loops(layer)
            runs += [steps for steps, _ in found]
            last += [states for _, states in found]
            x = sides.directions([steps.output for steps, _ in found], index == spec.num_layers - 1)
        if index < spec.num_layers - 1:
            x = dropout.between_layers(spec, x, key, masks, index)
    return x, tuple(jnp.stack(rows) for rows in zip(*last, strict=True)), runs


def _by_loops(layer: Layer) -> list[tuple[Steps, Arrays]]:
    """Run a layer direction after direction."""
    found = []
    for direction, weights in enumerate(layer.weights):
        reverse = direction == 1
        own = layer.state, layer.reset_state, layer.h_scale, layer.zoned
        first, restart, h_scale, zoned = jax.tree.map(lambda a, row=direction: a[row], own)
        of_steps = layer.x, layer.marks._replace(zoned=zoned)
        flipped = reverse and is_plain.value  # not every reader of jaxprs knows a scan with `reverse`
        x, marks = _flipped(of_steps) if flipped else of_steps
        settings = Settings(layer.cell, layer.options, reverse and not flipped, layer.every)
        every, last = recurrence.layer(settings, weights, x, first, marks, restart, h_scale)
        found.append((_flipped(every) if flipped else every, last))
    return found


def _flipped(of_steps: Tree) -> Tree:
    return jax.tree.map(lambda a: jnp.flip(a, axis=0), of_steps)
