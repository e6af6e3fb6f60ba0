"""One layer in one direction: the products with the input, the loop in blocks of steps, and its one derivative rule.

The rule. The forward loop is linearised around the states that it went through: `jax.linearize` gives the linear map of
every step. The tangents obey a second loop, which applies these maps. It is linear in the tangents, and JAX transposes
it into the backward pass. No backward pass is written by hand.

Blocks. Both loops run in blocks of steps. What does not depend on the state is computed for a whole block at once: the
products with the input, the linear maps, and the tangents that come from x and the weights. The backward pass adds up
the weights' gradients over the blocks. With few rows all steps are one block, because larger products are faster. With
many rows each step is a block, so that gates and their cotangents stay in the cache, and only what is saved goes
through memory. `blocks.block_size` chooses.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxrnn._compat import varying_like
from jaxrnn._core import meshes, steps
from jaxrnn._core.blocks import Loop, Sizes
from jaxrnn._core.platforms import Kernel, Where, by_platform
from jaxrnn._core.rules import with_rule
from jaxrnn._core.steps import Marks, RecurrentWeights, Run, Settings, Steps, accumulator, plus
from jaxrnn.cells import Arrays
from jaxrnn.engines import Form, Linear, engine_for

UNMARKED = Marks()


class LaidOut(NamedTuple):
    """A layer's weights in its layout."""

    weight_ih: jax.Array  # (G * H, I), or as the layout has it
    bias_ih: jax.Array | None  # (G * H,): of the gates in cell.apart, zeros for the others; None if none is apart
    recurrent: RecurrentWeights


def layer(
    settings: Settings,
    weights: dict[str, jax.Array],
    x: jax.Array,
    state: Arrays,
    marks: Marks = UNMARKED,
    reset_state: Arrays | None = None,
    h_scale: jax.Array | None = None,
) -> tuple[Steps, Arrays]:
    """Run one layer in one direction.

    Args:
        settings: the cell, the options, and the direction in time.
        weights: torch's parameters of this layer and direction by role: `weight_ih` (G * H, I); where the cell and the
            spec have them, `weight_hh` (G * H, P), `bias_ih` and `bias_hh` (G * H,), `weight_hr` (P, H), and the cell's
            own; all in x's dtype.
        x: the input, (T, B, I); finite in the padding, too.
        state: the initial state: (B, P), then (B, H).
        marks: where the state is held, reset, or zoned out.
        reset_state: what the state is reset to, like `state`; zeros if None.
        h_scale: what h is multiplied by before the recurrent product, (B, P), without a derivative; None for ones.

    Returns:
        The outputs, (T, B, P) in x's dtype, with the states and the gates of every step if `settings.every`; and the
        state after the last step, in float32 at least.
    """
    if not isinstance(x.shape[0], int):  # a symbolic time axis, in an export, cannot be split into blocks
        settings = settings._replace(options=dataclasses.replace(settings.options, remat="none"))
    # Inside jax.shard_map: so that gradients are exchanged once, outside the loop.
    weights = meshes.varying_with(weights, x)
    given = _given(_laid_out(settings, weights), x, state, marks, reset_state)._replace(h_scale=h_scale)
    cell, bias = settings.cell, settings.layout.split(given.weights.recurrent.bias)[0]
    like = plus(0 * given.state[0][:, :1], bias)  # sharded like the state
    each = (like,) * len(cell.gates), (like,) * len(cell.apart), given.state
    # A custom_jvp ignores the derivative by an array that a function closes over, unless it is an argument.
    step, captured = jax.closure_convert(
        cell.step, *each, *steps.cell_arguments(cell, given.weights.recurrent.cell_params)
    )
    if captured:
        settings = settings._replace(cell=dataclasses.replace(cell, step=step))
    given = given._replace(captured=tuple(captured))
    every, last = _layer(settings, *given)
    return _with_gates(settings._replace(cell=cell), given, every) if settings.every else every, last


class Given(NamedTuple):
    """One layer in one direction, with its arrays as the loops need them.

    Its tangent is a Given, too: of tangents, and None for zeros.
    """

    weights: LaidOut
    x: jax.Array  # (T, B, I)
    state: Arrays  # (B, P), then (B, H)
    marks: Marks
    reset_state: Arrays | None  # like `state`
    captured: Arrays = ()  # what the cell's step closes over, its last arguments
    h_scale: jax.Array | None = None  # (B, P)

    def run(self, settings: Settings, gates: Arrays, state: Arrays, marks: Marks) -> Run:
        """A block of steps."""
        others = self.reset_state, self.captured, self.h_scale
        return Run(settings, self.x.dtype, self.weights.recurrent, gates, state, marks, *others)

    def ready(self, loop: Loop) -> "Given":
        """The same, with the recurrent weights transposed unless `Settings.stored`."""
        recurrent = self.weights.recurrent
        if loop.settings.stored or recurrent.weight_hh is None:
            return self
        weight_hh = loop.settings.layout.features_first(recurrent.weight_hh)
        return self._replace(weights=self.weights._replace(recurrent=recurrent._replace(weight_hh=weight_hh)))


def _given(weights: LaidOut, x: jax.Array, state: Arrays, marks: Marks, reset_state: Arrays | None) -> Given:
    state = _cast(state, accumulator(x.dtype))
    if marks.reset is not None:
        zeros = tuple(map(meshes.zeros_like, state))
        reset_state = zeros if reset_state is None else _cast(reset_state, state[0].dtype)
    return Given(weights, x, state, marks, reset_state)


def _like_gates(settings: Settings, given: Given) -> tuple[Any, ...]:
    """The types of the input's parts of the gates: G times (T, B, H)."""
    x, count = given.x, len(settings.cell.gates)
    hidden_size = given.weights.recurrent.bias.size // count
    return (varying_like((*x.shape[:2], hidden_size), accumulator(x.dtype), x),) * count


def _layer_jvp(settings: Settings, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    given, tangent = Given(*primals), Given(*_without_zeros(tangents))
    every, last, kept = _on_platform(_forward, settings, True, given)
    linear = tangent._replace(
        state=_instantiated(tangent.state, given.state),
        reset_state=_instantiated(tangent.reset_state, given.reset_state),
        captured=_instantiated(tangent.captured, given.captured),
        marks=UNMARKED,
        h_scale=None,
    )
    cell_params = _instantiated(tangent.weights.recurrent.cell_params, given.weights.recurrent.cell_params)
    recurrent = tangent.weights.recurrent._replace(cell_params=cell_params)
    linear = linear._replace(weights=tangent.weights._replace(recurrent=recurrent))
    return (every, last), _on_platform(_tangents, settings, True, given, kept, linear)


@with_rule(_layer_jvp, nondiff_argnums=(0,), symbolic_zeros=True)
def _layer(settings: Settings, *arrays: Any) -> tuple[Steps, Arrays]:
    """Run a layer, given the fields of `Given`."""
    every, last, _ = _on_platform(_forward, settings, False, Given(*arrays))
    return every, last


def _without_zeros(tangents: Any) -> Any:
    return jax.tree.map(lambda a: None if isinstance(a, SymbolicZero) else a, tangents)


def _instantiated(tangents: Any, primals: Any) -> Any:
    """Zeros in place of None."""
    return jax.tree.map(lambda a, b: meshes.zeros_like(a) if b is None else b, primals, tangents)


def _on_platform(
    function: Callable, settings: Settings, keep: bool, given: Given, kept: Any = None, linear: Any = ()
) -> Any:
    """Call a function with a loop, as it is for the platform that the program is lowered for."""
    run = given.run(settings, _like_gates(settings, given), given.state, given.marks)
    engine = engine_for(run)
    forms = engine.forms(run)

    def of(form: Form) -> Callable[[Where, Any, Any], Any]:
        def call(where: Where, constants: Any, linear: Any) -> Any:
            given, kept = constants
            backward = kept is not None
            time, rows, _ = given.x.shape
            sizes = Sizes(time, rows, given.weights.recurrent.bias.size, keep, backward)
            loop = Loop.of(engine, form, where, settings, sizes)
            return function(loop, given.ready(loop), *((kept, linear.ready(loop)) if backward else ()))

        return call

    kernels = {platform: Kernel(of(form), of_jax=True) for platform, form in forms.items() if form != forms[None]}
    weights = len(jax.tree.leaves(given.weights))
    return by_platform(of(forms[None]), kernels, (given, kept), linear, weights)


def _forward(loop: Loop, given: Given) -> tuple[Steps, Arrays, Any]:
    """Run all steps. Returns the `Steps`, the last state, and what the derivative needs."""
    settings, keep = loop.settings, loop.keep
    input_gates = _input_gates(settings, given.weights, loop.single)
    recomputed = isinstance(settings.options.remat, int)

    def block(state: Arrays, part: tuple[jax.Array, Marks], _: None) -> tuple[Arrays, Any]:
        x, marks = part
        run = given.run(settings, input_gates(x), state, marks)
        every, last, kept = loop.engine.run(loop.form, run, keep and not recomputed)
        return last, ((every, kept), state if keep and recomputed else None)

    last, ((every, kept), firsts) = loop.in_blocks(block, given.state, (given.x, given.marks))
    return every, last, firsts if recomputed else kept


def _tangents(loop: Loop, given: Given, kept: Any, tangent: Given) -> tuple[Steps, Arrays]:
    """The tangents of the first two results of `_forward`: linear in `tangent`."""
    settings, lay, cell = loop.settings, loop.settings.layout, loop.settings.cell
    weights, product = given.weights, functools.partial(steps.product, loop.settings)
    wide = accumulator(given.x.dtype)
    # In which the blocks' gradients add up.
    d_weights = jax.tree.map(lambda a: a.astype(wide), tangent.weights)
    d_weight_ih = None if d_weights.weight_ih is None else lay.features_first(d_weights.weight_ih)
    weight_ih = lay.features_first(weights.weight_ih)
    d_recurrent = d_weights.recurrent
    input_gates = _input_gates(settings, weights, loop.single)
    recomputed = isinstance(settings.options.remat, int)
    others = (*steps.cell_arguments(cell, d_recurrent.cell_params), *tangent.captured)

    def block(d_state: Arrays, part: Any, first: Any) -> tuple[Arrays, tuple[Steps, None]]:
        x, d_x, marks, kept = part
        without = kept is None or kept[1:3] == (None, None)  # neither sums nor linear maps
        gates = input_gates(x) if without else ()
        run = given.run(settings, gates, given.state if first is None else first, marks)
        if recomputed:
            _, _, kept = loop.engine.run(loop.form, run, True)
        elif without:
            sums = steps.recurrent_sums(settings, weights.recurrent, gates, steps.scaled(kept.before[0], given.h_scale))
            kept = kept._replace(sums=steps.arguments(cell, gates, sums))
        before = kept.before[0] if kept.push is not None else steps.scaled(kept.before[0], given.h_scale)
        zeros = plus(meshes.zeros_like(before[..., :1]), jnp.zeros_like(lay.split(weights.recurrent.bias)[0]))
        d_gates = d_hidden = lay.join((zeros,) * len(cell.gates))
        for a, b in ((x, d_weight_ih), (d_x, weight_ih)):
            if a is not None and b is not None:
                d_gates = d_gates + product(a, b.astype(x.dtype))
        if d_recurrent.weight_hh is not None:
            d_hidden = d_hidden + product(before, d_recurrent.weight_hh.astype(x.dtype), settings.contract)
        if d_recurrent.bias is not None:
            d_hidden = plus(d_hidden, d_recurrent.bias)
        inputs: Arrays = ()
        if cell.apart:
            if d_weights.bias_ih is not None:
                d_gates = plus(d_gates, d_weights.bias_ih)
            parts = lay.split(d_gates)
            inputs = tuple(d for name, d in zip(cell.gates, parts, strict=True) if name in cell.apart)
            d_hidden = lay.join(steps.added(cell, parts, lay.split(d_hidden)))
        else:
            d_hidden = d_hidden + d_gates
        weight_hr = None if d_recurrent.weight_hr is None else d_recurrent.weight_hr.astype(x.dtype)
        linear = Linear(d_hidden, inputs, d_state, tangent.reset_state, weight_hr, others)
        every, d_last = loop.engine.tangents(loop.form, run, kept, linear)
        return d_last, (every, None)

    parts = given.x, tangent.x, given.marks, None if recomputed else kept
    again, firsts = recomputed or kept.push is None, kept if recomputed else None
    d_last, (every, _) = loop.in_blocks(block, tangent.state, parts, firsts, again)
    return every, d_last


def _input_gates(settings: Settings, weights: LaidOut, at_once: bool) -> Callable[[jax.Array], Arrays]:
    """A function from x, (T, B, I) or (B, I), to the input's part of every gate, G arrays (T, B, H) or (B, H).

    Args:
        at_once: whether to make one product for all gates. For many steps there is one for each gate, because splitting
            the result would copy it.
    """
    lay, cell = settings.layout, settings.cell
    together = weights.weight_ih if settings.stored else lay.features_first(weights.weight_ih)
    each = () if at_once else lay.for_each_gate(weights.weight_ih)
    biases = (None,) * len(cell.gates) if weights.bias_ih is None else lay.split(weights.bias_ih)

    def of(x: jax.Array) -> Arrays:
        if at_once:
            gates = lay.split(steps.weighed(settings, x, together))
        else:
            gates = tuple(steps.product(settings, x, part) for part in each)
        named = zip(cell.gates, gates, biases, strict=True)
        return tuple(gate if b is None or name not in cell.apart else plus(gate, b) for name, gate, b in named)

    return of


def step(
    settings: Settings,
    weights: dict[str, jax.Array],
    x: jax.Array,
    state: Arrays,
    marks: Marks = UNMARKED,
    reset_state: Arrays | None = None,
) -> Arrays:
    """Make one step: as `layer`, on arrays without an axis of time. Returns the next state."""
    settings = settings._replace(stored=True)
    given = _given(_laid_out(settings, weights), x, state, marks, reset_state)
    gates = _input_gates(settings, given.weights, at_once=True)(x)
    state, _ = steps.advance(given.run(settings, gates, given.state, marks), gates, marks, given.state)
    return state


def _cast(arrays: Arrays, dtype: jnp.dtype) -> Arrays:
    return tuple(a.astype(dtype) for a in arrays)


def _laid_out(settings: Settings, weights: dict[str, jax.Array]) -> LaidOut:
    cell, lay, weight_ih = settings.cell, settings.layout, weights["weight_ih"]
    dtype = accumulator(weight_ih.dtype)
    bias_ih, bias = None, lay.by_gate(jnp.zeros(len(weight_ih), dtype))
    if "bias_hh" in weights:
        bias = lay.by_gate(weights["bias_hh"].astype(dtype))
    if "bias_ih" in weights:
        given = lay.by_gate(weights["bias_ih"].astype(dtype))
        parts = [(name in cell.apart, b) for name, b in zip(cell.gates, lay.split(given), strict=True)]
        bias = bias + lay.join(tuple(jnp.zeros_like(b) if apart else b for apart, b in parts))
        bias_ih = lay.join(tuple(b if apart else jnp.zeros_like(b) for apart, b in parts)) if cell.apart else None
    weight_hh = lay.stored(weights["weight_hh"]) if cell.recurrent else None
    weight_hr = weights["weight_hr"].T if "weight_hr" in weights else None
    # The hidden units stay last, and axes of size one in front of them stand for the batch.
    cell_params = {
        name: jnp.expand_dims(weights[name].astype(dtype), -2) if "hidden" in each.axes else weights[name].astype(dtype)
        for name, each in cell.own.items()
    }
    return LaidOut(lay.stored(weight_ih), bias_ih, RecurrentWeights(weight_hh, bias, weight_hr, cell_params))


def _with_gates(settings: Settings, given: Given, every: Steps) -> Steps:
    """The gates of every step in place of their sums."""
    assert every.state is not None
    cell, before = settings.cell, steps.before(settings, given.state, every.state)
    before = steps.select(given.marks.reset, given.reset_state, before)
    values = cell.gate_values or (lambda gates, *_: gates)
    gates = jax.vmap(lambda *a: values(*a, *steps.cell_arguments(cell, given.weights.recurrent.cell_params)))(
        *every.sums, before
    )
    return every._replace(sums=None, gates=steps.zero_if_held(given.marks, tuple(gates)))
