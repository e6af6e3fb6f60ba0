"""One layer in one direction: the products with the input, chunks, and the one derivative rule of every transform.

The rule. The loop over time is linearised around its own trajectory: `jax.linearize` gives the linear map of every
step, all at once, from what the forward loop saved. The tangents then obey a second loop, linear in the tangents, whose
only products are those with the recurrent weights. What a change of the weights adds, `h dW_hh`, is known for all steps
beforehand and is one product outside that loop; JAX transposes it into one product for the gradient of the weights,
where autodiff of the loop would add up a product a step. Both loops are run by an engine.
"""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jaxrnn import steps
from jaxrnn.cells import Arrays
from jaxrnn.engines import engine_for
from jaxrnn.rules import with_rule
from jaxrnn.steps import Marks, Recurrent, Run, Settings, Steps, accumulator, plus

Weights = dict[str, jax.Array]
_STATES = "jaxrnn states"  # the name by which `jax.checkpoint` knows them
_CHUNK = 128  # chunk length for remat="gates", in steps
UNMARKED = Marks()


class LaidOut(NamedTuple):
    """A layer's weights in its layout."""

    weight_ih: jax.Array
    bias_ih: jax.Array | None  # added for the gates in cell.apart; None without biases
    recurrent: Recurrent

    def astype(self, dtype: jnp.dtype) -> "LaidOut":
        """The weights in another dtype; biases are added in the accumulator's."""
        return self._replace(weight_ih=self.weight_ih.astype(dtype), recurrent=self.recurrent.astype(dtype))


def layer(
    settings: Settings,
    weights: Weights,
    x: jax.Array,
    state: Arrays,
    marks: Marks = UNMARKED,
    reset_state: Arrays | None = None,
) -> tuple[Steps, Arrays]:
    """Run one layer in one direction.

    Args:
        settings: the cell, the options, and the direction in time.
        weights: torch's parameters of this layer and direction by role: `weight_ih` (gates * hidden_size, features),
            and where there are any `weight_hh`, `bias_ih`, `bias_hh`, `weight_hr` and those of the cell's own; all in
            x's dtype.
        x: the input, (time, batch, features); finite in the padding, too.
        state: the initial state, one array (batch, size) a state.
        marks: where rows have ended, and where the state is put back.
        reset_state: what the state is put back to, like `state`; zeros if None.

    Returns:
        The outputs, (time, batch, output size) in x's dtype, with the states and the gates of every step where the
        settings say so; and the state after the last step run, as it is carried: in float32 at least.
    """
    state = _cast(state, accumulator(x.dtype))
    if marks.reset is not None:
        reset_state = jax.tree.map(jnp.zeros_like, state) if reset_state is None else _cast(reset_state, state[0].dtype)
    # A symbolic time axis, in an export, cannot be split into chunks, so remat is ignored there.
    function = _run_in_chunks if settings.options.remat != "none" and isinstance(x.shape[0], int) else _run
    return function(settings, _laid_out(settings, weights), x, state, marks, reset_state)


def _run(
    settings: Settings, weights: LaidOut, x: jax.Array, state: Arrays, marks: Marks, reset_state: Arrays | None
) -> tuple[Steps, Arrays]:
    rounded = weights.astype(x.dtype)
    gates = _input_gates(settings, rounded, x)
    cell, like = settings.cell, gates[0][0]
    given = (like,) * len(cell.gates), (like,) * len(cell.apart), state, *steps.own(cell, rounded.recurrent.own)
    # A custom_jvp ignores the derivative by an array that a function closes over, unless it is an argument.
    step, captured = jax.closure_convert(cell.step, *given)
    if captured:
        settings = settings._replace(cell=dataclasses.replace(cell, step=step))
    arrays = rounded.recurrent, gates, state, marks, reset_state, tuple(captured)
    every, last = _run_over_time(settings, x.dtype, *arrays)
    if settings.every:
        every = _with_gates(Run(settings._replace(cell=cell), x.dtype, *arrays), every)
    return every, last


def _run_in_chunks(
    settings: Settings, weights: LaidOut, x: jax.Array, state: Arrays, marks: Marks, reset_state: Arrays | None
) -> tuple[Steps, Arrays]:
    """Like `_run`, chunk by chunk, so that at most one chunk is recomputed at a time. The last may be shorter."""
    gates = settings.options.remat == "gates"
    size = min(_CHUNK if gates else int(settings.options.remat), len(x))
    whole = len(x) - len(x) % size
    policy = jax.checkpoint_policies.save_only_these_names(_STATES) if gates else None
    weights = weights.astype(accumulator(x.dtype))  # in which the chunks' gradients add up

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)  # which a scan prevents by itself
    def chunk(state: Arrays, part: tuple[jax.Array, Marks]) -> tuple[Arrays, Steps]:
        every, state = _run(settings, weights, part[0], state, part[1], reset_state)
        return state, every

    chunks = []
    spans = [
        (0, len(x) // size, size),
        (whole, 1, len(x) - whole),
    ]  # the first step, how many chunks, of how many steps
    for start, count, length in reversed(spans) if settings.reverse else spans:
        if length:
            end, shape = start + count * length, (count, length)
            parts = jax.tree.map(lambda a, s=start, e=end, n=shape: a[s:e].reshape(*n, *a.shape[1:]), (x, marks))
            state, every = lax.scan(chunk, state, parts, reverse=settings.reverse)
            chunks.append(jax.tree.map(lambda a, n=count * length: a.reshape(n, *a.shape[2:]), every))
    return jax.tree.map(lambda *a: jnp.concatenate(a), *chunks[:: -1 if settings.reverse else 1]), state


def step(settings: Settings, weights: Weights, x: jax.Array, state: Arrays) -> Arrays:
    """Make one step: as `layer`, on x of shape (batch, features) or (features,), without a time axis."""
    if x.ndim == 1:
        x, state = jax.tree.map(lambda a: a[None], (x, state))
        return tuple(a[0] for a in step(settings, weights, x, state))
    laid_out = _laid_out(settings, weights)
    gates = _input_gates(settings, laid_out, x)
    state, _ = steps.one_step(settings, laid_out.recurrent, gates, _cast(state, accumulator(x.dtype)))
    return state


def _cast(arrays: Arrays, dtype: jnp.dtype) -> Arrays:
    return tuple(a.astype(dtype) for a in arrays)


def _laid_out(settings: Settings, weights: Weights) -> LaidOut:
    cell, lay, weight_ih = settings.cell, settings.layout, weights["weight_ih"]
    dtype = accumulator(weight_ih.dtype)
    bias_ih, bias = None, lay.by_gate(jnp.zeros(len(weight_ih), dtype))
    if "bias_hh" in weights:
        bias = lay.by_gate(weights["bias_hh"].astype(dtype))
    if "bias_ih" in weights:
        bias_ih = lay.by_gate(weights["bias_ih"].astype(dtype))
        inputs = zip(cell.gates, lay.split(bias_ih), strict=True)
        bias = bias + lay.join(tuple(jnp.zeros_like(b) if name in cell.apart else b for name, b in inputs))
    weight_hh = lay.by_gate(weights["weight_hh"].T) if cell.recurrent else None
    weight_hr = weights["weight_hr"].T if "weight_hr" in weights else None
    # The hidden units stay last, and axes of size one in front of them stand for the batch.
    own = {
        name: jnp.expand_dims(weights[name].astype(dtype), -2) if "hidden" in each.axes else weights[name].astype(dtype)
        for name, each in cell.own.items()
    }
    return LaidOut(lay.weight_ih(weight_ih), bias_ih, Recurrent(weight_hh, bias, weight_hr, own))


def _input_gates(settings: Settings, weights: LaidOut, x: jax.Array) -> Arrays:
    """The input's part of every gate, for all of x at once."""
    gates = _input_products(settings, x, weights.weight_ih)
    if weights.bias_ih is None:
        return gates
    inputs = zip(settings.cell.gates, gates, settings.layout.split(weights.bias_ih), strict=True)
    return tuple(plus(gate, b) if name in settings.cell.apart else gate for name, gate, b in inputs)


def _input_products_jvp(settings: Settings, primals: tuple, tangents: tuple) -> tuple[Arrays, Arrays]:
    """The tangent uses one large product, because the loop needs all gates together."""
    x, weight = primals
    d_x, d_weight = tangents
    gates = _input_products(settings, x, weight)
    products = [
        steps.product(settings, a, settings.layout.for_all_gates(b))
        for a, b in ((d_x, weight), (x, d_weight))
        if not isinstance(a, SymbolicZero) and not isinstance(b, SymbolicZero)
    ]
    if not products:
        return gates, jax.tree.map(jnp.zeros_like, gates)
    return gates, settings.layout.split(functools.reduce(operator.add, products))


@with_rule(_input_products_jvp, nondiff_argnums=(0,), symbolic_zeros=True)
def _input_products(settings: Settings, x: jax.Array, weight: jax.Array) -> Arrays:
    """One product per gate: splitting one large product would copy it."""
    return tuple(steps.product(settings, x, part) for part in settings.layout.for_each_gate(weight))


def _over_time_jvp(settings: Settings, dtype: jnp.dtype, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    run, tangent = Run(settings, dtype, *primals), Run(settings, dtype, *tangents)
    cell, lay, engine = settings.cell, settings.layout, engine_for(run)
    states, sums, last = engine.states_and_sums(run)
    states = checkpoint_name(states, _STATES)
    before = steps.select(run.marks.reset, run.reset_state, _before(settings, run.state, states))
    if sums is None:
        sums = steps.recurrent_sums(settings, run.recurrent, run.gates, before[0])

    # What is known of the tangents before the loop: all but what comes through the state's own tangent.
    d_hidden = jnp.expand_dims(tangent.recurrent.bias, (0, 1))
    if tangent.recurrent.weight_hh is not None:
        d_hidden = d_hidden + steps.product(settings, before[0], tangent.recurrent.weight_hh)
    d_sums = lay.join(steps.added(cell, tangent.gates, lay.split(d_hidden)))
    every, d_last = engine.tangents(run, before, sums, tangent, d_sums)
    return (steps.returned(run, run.marks, states, sums), last), (every, d_last)


@with_rule(_over_time_jvp, nondiff_argnums=(0, 1))
def _run_over_time(settings: Settings, dtype: jnp.dtype, *arrays: Any) -> tuple[Steps, Arrays]:
    """Run a layer over the input's part of its gates: the arguments are those of `Run`."""
    run = Run(settings, dtype, *arrays)
    return engine_for(run).forward(run)


def _with_gates(run: Run, every: Steps) -> Steps:
    """The gates of every step in place of their sums."""
    assert every.state is not None
    assert every.sums is not None
    cell, before = run.settings.cell, _before(run.settings, run.state, every.state)
    before = steps.select(run.marks.reset, run.reset_state, before)
    values = cell.gate_values or (lambda gates, *_: gates)
    gates = jax.vmap(lambda *a: values(*a, *steps.own(cell, run.recurrent.own)))(
        *steps.arguments(cell, run.gates, every.sums), before
    )
    return every._replace(sums=None, gates=steps.without_padding(run.marks, tuple(gates)))


def _before(settings: Settings, first: Arrays, after: Arrays) -> Arrays:
    """The states before each step, from the first one and those after each step."""
    if settings.reverse:
        return tuple(jnp.concatenate([a[1:], a_0[None]]) for a_0, a in zip(first, after, strict=True))
    return tuple(jnp.concatenate([a_0[None], a[:-1]]) for a_0, a in zip(first, after, strict=True))
