"""Kernels for TPUs, in Pallas: the recurrent weights and the state stay on the chip over all steps.

The gates stream in from memory, and results stream out, while the chip computes the steps between them.
One kernel runs forward and one backward. The cell's own step is traced into the first, and its derivative into the
second. The scan runs in their place on other platforms, under `jax.vmap`, and for forward-mode and second derivatives.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from jaxrnn._compat import pallas, varying_like
from jaxrnn._core import steps
from jaxrnn._core.platforms import Kernel, Where, by_platform
from jaxrnn._core.steps import Kept, Run, Settings, Steps
from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH, Arrays, Cell
from jaxrnn.engines.scan import Form, Linear, Scan

_MIB, _LANES = 2**20, 128
_SPARE = 8 * _MIB  # for what the compiler itself keeps on the chip
_BLOCKS = (16, 8, 4, 2, 1)  # steps that stream in at a time: the first of these for which there is memory
_WHOLE = (lax.Precision.HIGHEST, "highest", "float32")
_ROUNDED = (lax.Precision.DEFAULT, "default", "bfloat16", "fastest", None)


class Pallas(Scan):
    """Kernels for TPUs, and the scan for all else.

    Attributes:
        memory: the bytes that a kernel may take of the chip's memory. A v5p has 64 MiB; a v5e and a v6e have 128.
        platform: where the kernels are used; None for everywhere.
        interpret: as for `pallas_call`: whether JAX computes what a TPU would, on any platform.
    """

    keeps_sums: bool | None = True

    def __init__(self, memory: int = 56 * _MIB, platform: str | None = "tpu", interpret: Any = False) -> None:
        self.memory: int = memory
        self.platform: str | None = platform
        self.interpret: Any = interpret

    def refuses(self, run: Run) -> str | None:
        cell, options, (time, batch, hidden) = run.settings.cell, run.settings.options, run.gates[0].shape
        mesh = jax.sharding.get_abstract_mesh()
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        sharded = [name for name, kind in kinds if kind != AxisType.Manual and mesh.shape[name] > 1]
        if run.gates[0].dtype != jnp.float32:
            return f"it computes in float32 or bfloat16, and this is {run.gates[0].dtype}"
        if run.recurrent.weight_hr is not None:
            return "it runs no projection"
        if run.marks.skipped is not None:
            return "it takes lengths, and no mask"
        if run.h_scale is not None or any(cell.zoneout):
            return "it has neither recurrent dropout nor zoneout"
        if run.captured or any("hidden" not in each.axes for each in cell.own.values()):
            return "the cell's step closes over arrays, or has a parameter without an axis 'hidden'"
        if options.hidden_axis is not None or sharded:
            return f"it cannot be sharded over mesh axes {sharded or options.hidden_axis}: call it in jax.shard_map"
        if not all(isinstance(size, int) and size > 0 for size in (time, batch)):
            return "the number of steps or rows is symbolic, or 0"
        if (precision := options.precision_in_effect) not in (*_WHOLE, *_ROUNDED):
            return f"its precision is 'highest' or the default, and this is {precision!r}"
        if self._block(run) == 0:
            return f"hidden_size={hidden} with {batch} rows takes more than {self.memory // _MIB} MiB on the chip"
        return None if self.interpret else _why_not_lowered(cell, hidden)

    def forms(self, run: Run) -> Mapping[str | None, Form]:
        return {None: Form()}  # the kernel has all steps at once

    def run(self, form: Form, run: Run, keep: bool) -> tuple[Steps, Arrays, Kept | None]:
        settings, dtype, *arrays = _with_precision(run)
        by_scan = super().run

        def kernel(where: Where, arrays: Any, linear: Any) -> tuple[Steps, Arrays, Kept | None]:
            run = Run(settings, dtype, *arrays)
            if not keep and not settings.every:
                output, last = self.forward(run, saved=False)
                return Steps(output), last, None
            (states, sums), last = self.forward(run, saved=True)
            both = steps.arguments(settings.cell, run.gates, sums)
            every = steps.returned(run, run.marks, states, both)
            if not keep:
                return every, last, None
            before = steps.select(run.marks.reset, run.reset_state, steps.before(settings, run.state, states))
            return every, last, Kept(before, None if settings.options.remat == "gates" else both)

        def scan(where: Where, arrays: Any, linear: Any) -> tuple[Steps, Arrays, Kept | None]:
            return by_scan(form, Run(settings, dtype, *arrays), keep)

        return by_platform(scan, {self.platform: Kernel(kernel)}, arrays)

    def tangents(self, form: Form, run: Run, kept: Kept, linear: Linear) -> tuple[Steps, Arrays]:
        assert kept.sums is not None
        settings, dtype, *arrays = _with_precision(run._replace(gates=kept.sums.gates))
        by_scan = super().tangents

        def scan(where: Where, constants: Any, linear: Linear) -> tuple[Steps, Arrays]:
            arrays, kept = constants
            return by_scan(form, Run(settings, dtype, *arrays), kept, linear)

        def backward(where: Where, constants: Any, cotangents: Any) -> Linear:
            arrays, kept = constants
            return self.backward(Run(settings, dtype, *arrays), kept, cotangents)

        return by_platform(scan, {self.platform: Kernel(transposed=backward)}, (arrays, kept), linear)

    def forward(self, run: Run, saved: bool) -> tuple[Any, Arrays]:
        """Run all steps. Returns the outputs, or with `saved` the states and sums of every step; and the last state."""
        cell, marks, gates, count = run.settings.cell, run.marks, run.gates, len(run.gates)

        def body(kept: _Resident, time: Any, state: Arrays, step: tuple[Arrays, Any]) -> tuple[Arrays, Any]:
            gates, reset = step
            before = steps.select(_marked(reset), _read(kept.reset_state), state)
            hidden = tuple(kept.bias[k] for k in range(count))
            if kept.weight is not None:
                hidden = tuple(self._product(run, before[0], kept.weight[k]) + b for k, b in enumerate(hidden))
            sums = steps.added(cell, gates, hidden)
            after = cell.step(
                *steps.arguments(cell, gates, sums), before, *steps.cell_arguments(cell, _read(kept.cell_params))
            )
            ended = kept.ended(time)
            after = steps.select(ended, state, tuple(after))
            shown = steps.returned(run, marks._replace(ended=ended), after, None).output
            return after, (after, sums) if saved else shown

        like = functools.partial(varying_like, gates[0].shape, array=gates[0])
        of_gates, of_states = ([like(dtype=jnp.float32)] * len(names) for names in (cell.gates, cell.states))
        results = (tuple(of_states), tuple(of_gates)) if saved else like(dtype=run.dtype)
        streams = gates, _numbers(marks.reset)
        state, results = self._scan(body, run, run.state, streams, results, reverse=run.settings.reverse)
        return results, state

    def backward(self, run: Run, kept: Kept, cotangents: tuple[Steps, Any]) -> Linear:
        """The cotangents of `linear` in `tangents`, from the cotangents of its results, which are None for zeros."""
        d_every, d_last = cotangents
        cell, lay = run.settings.cell, run.settings.layout

        def body(stays: _Resident, time: Any, carry: Any, step: Any) -> tuple[Any, Any]:
            d_state, d_reset, d_cell_params = carry
            sums, before, reset, d_every = step
            ended, reset = stays.ended(time), _marked(reset)
            if d_every.output is not None:
                (d_output,) = _unless(ended, (d_every.output.astype(jnp.float32),))
                d_state = (d_state[0] + d_output, *d_state[1:])
            d_state = tuple(map(_added, d_state, d_every.state or [None] * len(d_state)))
            states = tuple(jnp.zeros_like(d_state[0]) if a is None else a for a in before)
            arguments = (*sums, states, *steps.cell_arguments(cell, _read(stays.cell_params)))
            _, pull = jax.vjp(lambda *a: tuple(cell.step(*a)), *arguments)
            d_gates, d_hidden, d_before, *d_params = pull(_unless(ended, d_state))
            if d_every.sums is not None:
                d_gates = tuple(map(_added, d_gates, d_every.sums.gates))
                d_hidden = tuple(map(_added, d_hidden, d_every.sums.hidden))
            apart = dict(zip(cell.apart, d_hidden, strict=True))
            d_sums = tuple(apart.get(name, d) for name, d in zip(cell.gates, d_gates, strict=True))
            if stays.weight is not None:
                products = [self._product(run, d, stays.weight[k], 1) for k, d in enumerate(d_sums)]
                d_before = (functools.reduce(jnp.add, products, d_before[0]), *d_before[1:])
            if reset is not None:
                d_reset = tuple(
                    a + jnp.where(reset, d, jnp.zeros_like(d)) for a, d in zip(d_reset, d_before, strict=True)
                )
                d_before = _unless(reset, d_before)
            if ended is not None:
                held = _unless(~ended, d_state)
                d_before = tuple(map(jnp.add, d_before, held))
            d_cell_params = jax.tree.map(jnp.add, d_cell_params, *d_params) if d_params else d_cell_params
            d_inputs = tuple(d for name, d in zip(cell.gates, d_gates, strict=True) if name in cell.apart)
            return (d_before, d_reset, d_cell_params), (lay.join(d_sums) if joined else d_sums, d_inputs)

        # A step before a projection does not read the first state.
        needed = (None, *kept.before[1:]) if cell.projects else kept.before
        streams = kept.sums, needed, _numbers(run.marks.reset), d_every
        d_state = tuple(jnp.zeros_like(a) if d is None else d for a, d in zip(run.state, d_last, strict=True))
        zeros = jax.tree.map(
            jnp.zeros_like, (run.reset_state if run.marks.reset is not None else None, run.recurrent.cell_params)
        )
        shape = run.gates[0].shape
        joined = shape[-1] % _LANES == 0  # or else the parts of a row of numbers begin between its tiles
        like = functools.partial(varying_like, dtype=jnp.float32, array=run.gates[0])
        of_gates = tuple(like(shape) for _ in cell.gates)
        results = like((*shape[:-1], shape[-1] * len(cell.gates))) if joined else of_gates, of_gates[: len(cell.apart)]
        carry, (d_sums, d_inputs) = self._scan(
            body, run, (d_state, *zeros), streams, results, reverse=not run.settings.reverse
        )
        d_state, d_reset, d_cell_params = carry
        d_sums = d_sums if joined else lay.join(d_sums)
        return Linear(d_sums, d_inputs, d_state, d_reset, None, steps.cell_arguments(cell, d_cell_params))

    def _product(self, run: Run, a: jax.Array, weight: jax.Array, contract: int = 0) -> jax.Array:
        exact = run.settings.options.precision in _WHOLE
        return lax.dot_general(
            a.astype(weight.dtype),
            weight,
            (((1,), (contract,)), ((), ())),
            precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )

    def _block(self, run: Run) -> int:
        """How many steps stream in at a time; 0 if not even one fits on the chip."""
        cell, (time, batch, hidden) = run.settings.cell, run.gates[0].shape
        gates, apart, states = len(cell.gates), len(cell.apart), len(cell.states)
        row = _up(batch, 8) * _up(hidden, _LANES) * 4
        weights = gates * _up(hidden, 16) * _up(hidden, _LANES) * _weight_dtype(run).itemsize * cell.recurrent
        streams = 2 * (2 * gates + 2 * apart + states + 2)  # two buffers for each array that streams
        others = 2 * gates + 4 * states
        fits = [n for n in _BLOCKS if n <= time and weights + (n * streams + others) * row <= self.memory]
        return max(fits, default=0)

    def _scan(self, body: Any, run: Run, carry: Any, every: Any, results: Any, *, reverse: bool) -> tuple[Any, Any]:
        """As `jax.lax.scan` of `body(kept, time, carry, step)`, on the chip.

        The carry stays on the chip, and so does `kept`, a `_Resident`, which `body` reads at each step. The arrays of
        every step stream in, and the results stream out, by blocks of steps.
        """
        pl, pltpu = pallas()
        kept = _Resident.of(run)
        time, block = len(run.gates[0]), self._block(run)
        count = pl.cdiv(time, block)
        tree: Any
        out_tree: Any
        given, tree = jax.tree.flatten((every, kept, carry))
        shapes, out_tree = jax.tree.flatten((results, jax.tree.map(lambda a: varying_like(a.shape, a.dtype, a), carry)))

        def kernel(*refs: Any) -> None:
            every, kept, first = tree.unflatten(refs[: len(given)])
            results, last = out_tree.unflatten(refs[len(given) :])
            first_step = (count - 1 - pl.program_id(0) if reverse else pl.program_id(0)) * block

            @pl.when(pl.program_id(0) == 0)
            def _() -> None:
                jax.tree.map(lambda ref, a: _write(ref, ..., a[...]), last, first)

            def one(index: Any, carry: Any) -> Any:
                k = block - 1 - index if reverse else index
                after, result = body(kept, first_step + k, carry, jax.tree.map(lambda ref: ref[k], every))
                jax.tree.map(lambda ref, a: _write(ref, k, a), results, result)
                if time % block == 0:
                    return after
                # The last block goes on past the end, over arbitrary numbers.
                return jax.tree.map(lambda a, b: jnp.where(first_step + k < time, a, b), after, carry)

            carry = lax.fori_loop(np.int32(0), np.int32(block), one, _read(last))
            jax.tree.map(lambda ref, a: _write(ref, ..., a), last, carry)

        def stream(a: Any) -> Any:
            rest = (0,) * (a.ndim - 1)
            return pl.BlockSpec((block, *a.shape[1:]), lambda i: (count - 1 - i if reverse else i, *rest))

        def whole(a: Any, **settings: Any) -> Any:
            return pl.BlockSpec(a.shape, lambda i: (0,) * a.ndim, **settings)

        once = functools.partial(whole, pipeline_mode=pl.Buffered(1))
        call = pl.pallas_call(
            kernel,
            name=re.sub(r"\W", "_", f"jaxrnn_{run.settings.cell.name}", flags=re.ASCII),
            grid=(count,),
            in_specs=[*map(stream, jax.tree.leaves(every)), *map(once, jax.tree.leaves((kept, carry)))],
            out_specs=[*map(stream, jax.tree.leaves(results)), *map(whole, jax.tree.leaves(carry))],
            out_shape=shapes,
            interpret=self.interpret,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",), vmem_limit_bytes=self.memory + _SPARE
            ),
        )
        with jax.enable_x64(False):  # in which a kernel's own integers would be int64, which a TPU has not
            found = call(*given)
        results, carry = out_tree.unflatten(found)
        return carry, results


class _Resident(NamedTuple):
    """Arrays that stay on the chip over all steps. Shapes are in the letters of `jaxrnn._core`."""

    weight: jax.Array | None  # (G, H, H)
    bias: jax.Array  # (G, 1, H)
    cell_params: dict[str, jax.Array]
    reset_state: Arrays | None  # (B, H) each
    ends: jax.Array | None  # how many steps each row has, (B, 1)

    @classmethod
    def of(cls, run: Run) -> "_Resident":
        recurrent, marks, gates = run.recurrent, run.marks, len(run.settings.cell.gates)
        hidden, weight = run.gates[0].shape[-1], recurrent.weight_hh
        if weight is not None:
            weight = weight.T if run.settings.stored else weight
            weight = weight.astype(_weight_dtype(run)).reshape(hidden, gates, hidden).swapaxes(0, 1)
        ends = None if marks.ended is None else jnp.sum(~marks.ended, 0, dtype=jnp.int32)
        reset_state = None if marks.reset is None else run.reset_state
        return cls(weight, recurrent.bias.reshape(gates, 1, hidden), recurrent.cell_params, reset_state, ends)

    def ended(self, time: Any) -> Any:
        return None if self.ends is None else time >= self.ends[...]


def _with_precision(run: Run) -> Run:
    """A kernel is made when the program is lowered: then JAX's default may be another."""
    options = run.settings.options
    options = dataclasses.replace(options, precision=options.precision_in_effect)
    return run._replace(settings=run.settings._replace(options=options))


def _weight_dtype(run: Run) -> np.dtype:
    """With the default precision, a TPU multiplies in bfloat16: then the weights take half of the memory."""
    weight = run.recurrent.weight_hh
    whole = run.settings.options.precision_in_effect in _WHOLE
    return np.dtype(weight.dtype if weight is not None and whole else jnp.bfloat16)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _read(refs: Any) -> Any:
    return jax.tree.map(lambda ref: ref[...], refs)


def _write(ref: Any, where: Any, value: jax.Array) -> None:
    ref[where] = value.astype(ref.dtype)


def _numbers(mark: jax.Array | None) -> jax.Array | None:
    """A mark as a kernel can read it."""
    return None if mark is None else mark.astype(jnp.int32)


def _marked(number: jax.Array | None) -> jax.Array | None:
    return None if number is None else number != 0


def _unless(mark: jax.Array | None, arrays: Arrays) -> Arrays:
    return steps.select(mark, tuple(map(jnp.zeros_like, arrays)), arrays)


def _added(a: jax.Array, b: jax.Array | None) -> jax.Array:
    return a if b is None else a + b


@functools.lru_cache
def _why_not_lowered(cell: Cell, size: int) -> str | None:
    """Why the kernels of a cell of this hidden_size cannot be lowered for a TPU, by trying it."""
    if cell in (RNN_TANH, RNN_RELU, LSTM_CELL, GRU_CELL):
        return None

    def every(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    gates, engine = len(cell.gates), Pallas()
    cell_params = {n: every(*(gates,) * ("gates" in p.axes), 1, size) for n, p in cell.own.items()}
    weight_hh = every(size, gates * size) if cell.recurrent else None
    recurrent = steps.RecurrentWeights(weight_hh, every(gates * size), None, cell_params)
    state = (every(8, size),) * len(cell.states)
    arrays = recurrent, (every(8, 8, size),) * gates, state, steps.Marks(), None

    def kernels(*arrays: Any) -> Any:
        run = Run(Settings(cell), jnp.dtype(jnp.float32), *arrays)
        (states, sums), last = engine.forward(run, saved=True)
        kept = Kept(states, steps.arguments(cell, run.gates, sums))
        return engine.backward(run, kept, (Steps(states[0]), last))

    try:
        jax.jit(kernels).trace(*arrays).lower(lowering_platforms=("tpu",))
    except Exception as error:  # Pallas raises many kinds
        return f"a kernel of its step cannot be made ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None
