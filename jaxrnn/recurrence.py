"""One layer in one direction over time: `lax.scan`, and the one derivative rule that every transform shares.

The rule. The scan is linearised around its own trajectory: `jax.linearize` gives the linear map of every step, all at
once, from what the forward scan saved. The tangents then obey a second scan, linear in the tangents, whose only
products are those with the recurrent weights. What a change of the weights adds, `h dW_hh`, is known for all steps
beforehand and is one product outside that scan; JAX transposes it into one product for the gradient of the weights,
where autodiff of the scan would add up a product a step.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jaxrnn.cells import Arrays, Cell
from jaxrnn.layouts import Layout, layout
from jaxrnn.options import Options
from jaxrnn.rules import with_rule

Weights = dict[str, jax.Array]
_STATES = "jaxrnn states"  # the name by which `jax.checkpoint` knows them
_CHUNK = 128  # chunk length for remat="gates", in steps


class Settings(NamedTuple):
    """What is fixed while a layer runs."""

    cell: Cell
    options: Options = Options()
    reverse: bool = False

    @property
    def layout(self) -> Layout:
        return layout(len(self.cell.gates), self.options.hidden_axis)


class Marks(NamedTuple):
    """Steps that are not like the others: boolean arrays (time, batch, 1), True where marked; None marks no step."""

    ended: jax.Array | None = None  # past the row's end: the state is held, and the output is 0
    reset: jax.Array | None = None  # the state is put back before the step


UNMARKED = Marks()


class Recurrent(NamedTuple):
    """The weights inside the loop, transposed once outside it so that products read them along their rows."""

    weight_hh: jax.Array  # (output size, gates * hidden_size), or as the layout has it
    bias: jax.Array  # what joins the recurrent product: b_hh, and b_ih but for the gates in cell.apart
    weight_hr: jax.Array | None  # (hidden_size, proj_size)

    def astype(self, dtype: jnp.dtype) -> "Recurrent":
        weight_hr = None if self.weight_hr is None else self.weight_hr.astype(dtype)
        return self._replace(weight_hh=self.weight_hh.astype(dtype), weight_hr=weight_hr)


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
) -> tuple[jax.Array, Arrays]:
    """Run one layer in one direction.

    Args:
        settings: the cell, the options, and the direction in time.
        weights: torch's parameters of this layer and direction by role: `weight_ih` (gates * hidden_size, features),
            `weight_hh`, and where there are any `bias_ih`, `bias_hh`, `weight_hr`; all in x's dtype.
        x: the input, (time, batch, features); finite in the padding, too.
        state: the initial state, one array (batch, size) a state.
        marks: where rows have ended, and where the state is put back.
        reset_state: what the state is put back to, like `state`; zeros if None.

    Returns:
        The outputs, (time, batch, output size) in x's dtype, and the state after the last step run, as it is carried:
        in float32 at least.
    """
    state = _cast(state, _accumulator(x.dtype))
    if marks.reset is not None:
        reset_state = jax.tree.map(jnp.zeros_like, state) if reset_state is None else _cast(reset_state, state[0].dtype)
    # A symbolic time axis, in an export, cannot be split into chunks, so remat is ignored there.
    run = _run_in_chunks if settings.options.remat != "none" and isinstance(x.shape[0], int) else _run
    return run(settings, _laid_out(settings, weights), x, state, marks, reset_state)


def _run(
    settings: Settings, weights: LaidOut, x: jax.Array, state: Arrays, marks: Marks, reset_state: Arrays | None
) -> tuple[jax.Array, Arrays]:
    rounded = weights.astype(x.dtype)
    gates = _input_gates(settings, rounded, x)
    cell, like = settings.cell, gates[0][0]
    # A custom_jvp ignores the derivative by an array that a function closes over, unless it is an argument.
    step, captured = jax.closure_convert(cell.step, (like,) * len(cell.gates), (like,) * len(cell.apart), state)
    settings = settings._replace(cell=dataclasses.replace(cell, step=step))
    return _scan(settings, rounded.recurrent, gates, state, marks, reset_state, tuple(captured))


def _run_in_chunks(
    settings: Settings, weights: LaidOut, x: jax.Array, state: Arrays, marks: Marks, reset_state: Arrays | None
) -> tuple[jax.Array, Arrays]:
    """Like `_run`, chunk by chunk, so that at most one chunk is recomputed at a time. The last may be shorter."""
    gates = settings.options.remat == "gates"
    size = min(_CHUNK if gates else int(settings.options.remat), len(x))
    whole = len(x) - len(x) % size
    policy = jax.checkpoint_policies.save_only_these_names(_STATES) if gates else None
    weights = weights.astype(_accumulator(x.dtype))  # in which the chunks' gradients add up

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)  # which a scan prevents by itself
    def chunk(state: Arrays, part: tuple[jax.Array, Marks]) -> tuple[Arrays, jax.Array]:
        outputs, state = _run(settings, weights, part[0], state, part[1], reset_state)
        return state, outputs

    outputs = []
    spans = [
        (0, len(x) // size, size),
        (whole, 1, len(x) - whole),
    ]  # the first step, how many chunks, of how many steps
    for start, count, steps in reversed(spans) if settings.reverse else spans:
        if steps:
            end, shape = start + count * steps, (count, steps)
            parts = jax.tree.map(lambda a, s=start, e=end, n=shape: a[s:e].reshape(*n, *a.shape[1:]), (x, marks))
            state, output = lax.scan(chunk, state, parts, reverse=settings.reverse)
            outputs.append(output.reshape(end - start, *output.shape[2:]))
    return jnp.concatenate(outputs[:: -1 if settings.reverse else 1]), state


def step(settings: Settings, weights: Weights, x: jax.Array, state: Arrays) -> Arrays:
    """Make one step: as `layer`, on x of shape (batch, features), without a time axis."""
    laid_out = _laid_out(settings, weights)
    gates = _input_gates(settings, laid_out, x)
    state, _ = _step(settings, laid_out.recurrent, gates, _cast(state, _accumulator(x.dtype)))
    return state


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Products accumulate, and the state is carried, in float32 at least."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def _cast(arrays: Arrays, dtype: jnp.dtype) -> Arrays:
    return tuple(a.astype(dtype) for a in arrays)


def _select(mark: jax.Array | None, marked: Arrays | None, others: Arrays) -> Arrays:
    """`marked` in the rows that have the mark, `others` in those that have not."""
    if mark is None or marked is None:
        return others
    return tuple(jnp.where(mark, a, b) for a, b in zip(marked, others, strict=True))


def _output(marks: Marks, state: Arrays, dtype: jnp.dtype) -> jax.Array:
    output = state[0].astype(dtype)
    return output if marks.ended is None else jnp.where(marks.ended, jnp.zeros_like(output), output)


def _product(settings: Settings, a: jax.Array, weight: jax.Array, contract: int = 0) -> jax.Array:
    return lax.dot_general(
        a.astype(weight.dtype),
        weight,
        (((a.ndim - 1,), (contract,)), ((), ())),
        precision=settings.options.precision,
        preferred_element_type=_accumulator(weight.dtype),
    )


def _plus(a: jax.Array, bias: jax.Array) -> jax.Array:
    """Ranks may have to be equal: see `jax.numpy_rank_promotion`."""
    return a + jnp.expand_dims(bias, tuple(range(a.ndim - bias.ndim)))


def _laid_out(settings: Settings, weights: Weights) -> LaidOut:
    cell, lay, weight_hh = settings.cell, settings.layout, weights["weight_hh"]
    bias_ih, bias = None, lay.by_gate(jnp.zeros(len(weight_hh), _accumulator(weight_hh.dtype)))
    if "bias_ih" in weights:
        bias_ih, bias = (lay.by_gate(weights[name].astype(bias.dtype)) for name in ("bias_ih", "bias_hh"))
        inputs = zip(cell.gates, lay.split(bias_ih), strict=True)
        bias = bias + lay.join(tuple(jnp.zeros_like(b) if name in cell.apart else b for name, b in inputs))
    weight_hr = weights["weight_hr"].T if "weight_hr" in weights else None
    return LaidOut(lay.weight_ih(weights["weight_ih"]), bias_ih, Recurrent(lay.by_gate(weight_hh.T), bias, weight_hr))


def _input_gates(settings: Settings, weights: LaidOut, x: jax.Array) -> Arrays:
    """The input's part of every gate, for all of x at once."""
    gates = _input_products(settings, x, weights.weight_ih)
    if weights.bias_ih is None:
        return gates
    inputs = zip(settings.cell.gates, gates, settings.layout.split(weights.bias_ih), strict=True)
    return tuple(_plus(gate, b) if name in settings.cell.apart else gate for name, gate, b in inputs)


def _input_products_jvp(settings: Settings, primals: tuple, tangents: tuple) -> tuple[Arrays, Arrays]:
    """The tangent uses one large product, because the loop needs all gates together."""
    x, weight = primals
    d_x, d_weight = tangents
    gates = _input_products(settings, x, weight)
    products = [
        _product(settings, a, settings.layout.for_all_gates(b))
        for a, b in ((d_x, weight), (x, d_weight))
        if not isinstance(a, SymbolicZero) and not isinstance(b, SymbolicZero)
    ]
    if not products:
        return gates, jax.tree.map(jnp.zeros_like, gates)
    return gates, settings.layout.split(functools.reduce(operator.add, products))


@with_rule(_input_products_jvp, nondiff_argnums=(0,), symbolic_zeros=True)
def _input_products(settings: Settings, x: jax.Array, weight: jax.Array) -> Arrays:
    """One product per gate: splitting one large product would copy it."""
    return tuple(_product(settings, x, part) for part in settings.layout.for_each_gate(weight))


def _sums(settings: Settings, recurrent: Recurrent, gates: Arrays, h: jax.Array) -> Arrays:
    """The recurrent product, with the bias, added to the input's part of each gate that is not apart."""
    hidden = _plus(_product(settings, h, recurrent.weight_hh), recurrent.bias)
    return _added(settings.cell, gates, settings.layout.split(hidden))


def _added(cell: Cell, gates: Arrays, recurrent: Arrays) -> Arrays:
    return tuple(
        a if name in cell.apart else gate + a for name, gate, a in zip(cell.gates, gates, recurrent, strict=True)
    )


def _arguments(cell: Cell, gates: Sequence, sums: Arrays) -> tuple[Arrays, Arrays]:
    """The step's `gates` and `hidden`, from the input's parts and the sums. Linear in both."""
    whole = tuple(
        gate if name in cell.apart else total for name, gate, total in zip(cell.gates, gates, sums, strict=True)
    )
    return whole, tuple(total for name, total in zip(cell.gates, sums, strict=True) if name in cell.apart)


def _step(
    settings: Settings, recurrent: Recurrent, gates: Arrays, state: Arrays, captured: Arrays = ()
) -> tuple[Arrays, Arrays]:
    """One step: the state after it, and the sums, from which the derivative finds what else it needs."""
    cell, sums = settings.cell, _sums(settings, recurrent, gates, state[0])
    state = _checked(cell, cell.step(*_arguments(cell, gates, sums), state, *captured), sums[0])
    if recurrent.weight_hr is not None:
        state = (_product(settings, state[0], recurrent.weight_hr), *state[1:])
    return state, sums


def _advance(
    settings: Settings,
    recurrent: Recurrent,
    gates: Arrays,
    state: Arrays,
    marks: Marks,
    reset_state: Arrays | None,
    captured: Arrays,
) -> tuple[Arrays, Arrays]:
    """A step of a sequence: as `_step`, with the marks."""
    after, sums = _step(settings, recurrent, gates, _select(marks.reset, reset_state, state), captured)
    return _select(marks.ended, state, after), sums


def _checked(cell: Cell, state: object, like: jax.Array) -> Arrays:
    """What a step returned, if it is as it should be."""
    if not isinstance(state, tuple | list) or len(state) != len(cell.states):
        got = f"{len(state)}" if isinstance(state, tuple | list) else f"no tuple but {type(state).__name__}"
        raise ValueError(f"step of Cell {cell.name!r} should return a tuple of {len(cell.states)} arrays, got {got}")
    for name, a in zip(cell.states, state, strict=True):
        if (jnp.shape(a), jnp.result_type(a)) != (like.shape, like.dtype):
            wanted, got = f"{like.dtype} of shape {like.shape}", f"{jnp.result_type(a)} of shape {jnp.shape(a)}"
            raise ValueError(f"step of Cell {cell.name!r} should return {name} as {wanted}, got {got}")
    return tuple(state)


def _scan_jvp(settings: Settings, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    recurrent, gates, state, marks, reset_state, captured = primals
    d_recurrent, d_gates, d_state, _, d_reset_state, d_captured = tangents
    cell = settings.cell
    dtype = recurrent.weight_hh.dtype

    recompute, lay = settings.options.remat == "gates", settings.layout
    scan = functools.partial(lax.scan, reverse=settings.reverse, unroll=settings.options.unroll)

    def forward(state: Arrays, step: tuple[Arrays, Marks]) -> tuple[Arrays, tuple]:
        gates, marks = step
        state, sums = _advance(settings, recurrent, gates, state, marks, reset_state, captured)
        return state, (state, None if recompute else sums)

    last, (states, sums) = lax.scan(
        forward, state, (gates, marks), reverse=settings.reverse, unroll=settings.options.unroll
    )
    states = checkpoint_name(states, _STATES)
    before = _select(marks.reset, reset_state, _before(settings, state, states))
    if recompute:
        sums = _sums(settings, recurrent, gates, before[0])
    after, push = jax.vmap(lambda *a: jax.linearize(cell.step, *a, *captured))(*_arguments(cell, gates, sums), before)

    # What is known of the tangents before the loop: all but what comes through the state's own tangent.
    d_sums = _plus(_product(settings, before[0], d_recurrent.weight_hh), d_recurrent.bias)
    d_sums = lay.join(_added(cell, d_gates, lay.split(d_sums)))
    d_inputs = tuple(d_gate if name in cell.apart else None for name, d_gate in zip(cell.gates, d_gates, strict=True))
    d_projected = None
    if d_recurrent.weight_hr is not None:
        d_projected = _product(settings, after[0], d_recurrent.weight_hr)

    weight_hh, contract = lay.transposed(recurrent.weight_hh)
    weight_hr = None if recurrent.weight_hr is None else recurrent.weight_hr.T

    def linear(d_state: Arrays, step: tuple) -> tuple[Arrays, jax.Array]:
        push, d_sums, d_inputs, d_projected, marks = step
        d_before = _select(marks.reset, d_reset_state, d_state)
        d_sums = lay.split(d_sums + _product(settings, d_before[0], weight_hh, contract))
        d_after = tuple(push(*_arguments(cell, d_inputs, d_sums), d_before, *d_captured))
        if weight_hr is not None:
            d_after = (_product(settings, d_after[0], weight_hr, contract=1) + d_projected, *d_after[1:])
        d_state = _select(marks.ended, d_state, d_after)
        return d_state, _output(marks, d_state, dtype)

    known = (push, d_sums, d_inputs, d_projected, marks)
    d_last, d_outputs = scan(linear, d_state, known)
    return (_output(marks, states, dtype), last), (d_outputs, d_last)


@with_rule(_scan_jvp, nondiff_argnums=(0,))
def _scan(
    settings: Settings,
    recurrent: Recurrent,
    gates: Arrays,
    state: Arrays,
    marks: Marks,
    reset_state: Arrays | None,
    captured: Arrays,
) -> tuple[jax.Array, Arrays]:
    """Run the recurrence over `gates`, (time, batch, hidden_size) each; return the outputs and the last state."""

    def body(state: Arrays, step: tuple[Arrays, Marks]) -> tuple[Arrays, jax.Array]:
        gates, marks = step
        state, _ = _advance(settings, recurrent, gates, state, marks, reset_state, captured)
        return state, _output(marks, state, recurrent.weight_hh.dtype)

    state, outputs = lax.scan(body, state, (gates, marks), reverse=settings.reverse, unroll=settings.options.unroll)
    return outputs, state


def _before(settings: Settings, first: Arrays, after: Arrays) -> Arrays:
    """The states before each step, from the first one and those after each step."""
    if settings.reverse:
        return tuple(jnp.concatenate([a[1:], a_0[None]]) for a_0, a in zip(first, after, strict=True))
    return tuple(jnp.concatenate([a_0[None], a[:-1]]) for a_0, a in zip(first, after, strict=True))
