"""Calls of `jaxrnn.apply` with every argument mapped or not, and what a Python loop over the rows makes of them."""

import functools
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from arrays import normal, parameters

import jaxrnn

Tree = Any
Row = dict[str, Any]
# Takes floats and marks as `jaxrnn.apply` has them, by name; returns the outputs and the states.
Function = Callable[[Row, Row], list[jax.Array]]


def _softmax(gates: tuple, hidden: tuple, state: tuple, params: dict) -> tuple:
    """Not pointwise, and with parameters of its own."""
    return (jnp.tanh(jax.nn.softmax(gates[0]) * params["gain"][0] + params["u"] * state[0]),)


SOFTMAX = jaxrnn.Cell(
    "softmax", ("h",), ("h",), _softmax, params={"gain": ("gates", "hidden"), "u": ("hidden",)}, recurrent=False
)

CELLS = {
    "RNN": (jaxrnn.RNN_TANH, 0),
    "minGRU": (jaxrnn.MIN_GRU_CELL, 0),
    "LSTM": (jaxrnn.LSTM_CELL, 0),
    "projected LSTM": (jaxrnn.LSTM_CELL, 2),
    "GRU": (jaxrnn.GRU_CELL, 0),
    "softsign GRU": (jaxrnn.gru_cell("softsign", jaxrnn.activations.HardSigmoid()), 0),
    "zoneout LSTM": (jaxrnn.zoneout(jaxrnn.LSTM_CELL, h=0.3, c=0.6), 0),
    "softmax": (SOFTMAX, 0),
}


def _loss(function: Function, weights: list[jax.Array]) -> Callable[[Row, Row], jax.Array]:
    return lambda *arguments: sum(jnp.sum(w * jnp.sin(a)) for w, a in zip(weights, function(*arguments), strict=True))


def _grad(function: Function, floats: Row, marks: Row, weights: list, tangents: Row) -> Tree:
    return jax.grad(_loss(function, weights))(floats, marks)


def _hvp(function: Function, floats: Row, marks: Row, weights: list, tangents: Row) -> Tree:
    return jax.jvp(lambda floats: _grad(function, floats, marks, weights, tangents), (floats,), (tangents,))[1]


def _checkpoint(function: Function, *arguments: Any) -> Tree:
    return _grad(jax.checkpoint(function), *arguments)


def _jvp(function: Function, floats: Row, marks: Row, weights: list, tangents: Row) -> Tree:
    return jax.jvp(lambda floats: function(floats, marks), (floats,), (tangents,))


def _linearize(function: Function, floats: Row, marks: Row, weights: list, tangents: Row) -> Tree:
    outputs, push = jax.linearize(lambda floats: function(floats, marks), floats)
    return outputs, push(tangents)


TRANSFORMS: dict[str, Callable] = {
    "grad": _grad,
    "hvp": _hvp,
    "checkpoint": _checkpoint,
    "jvp": _jvp,
    "linearize": _linearize,
}
FLOATS = "params", "x", "hx", "reset_state"
MARKS = "lengths", "mask", "reset", "dropout_masks", "dropout_key"
TABLE: dict[str, list] = {
    "transform": [*TRANSFORMS],
    "order": ["of vmap", "in vmap", "of vmap of vmap"],
    "jit": ["no jit", "jit inside", "jit outside", "jit inside and outside"],
    "cell": [*CELLS],
    "remat": ["none", "gates", 2],
    "bidirectional": [False, True],
    "batched": [False, True],
    "equal": [False, True],  # all sizes
    # Along which axis arguments are mapped; None where all rows have the same.
    "params": [0, 1, None],
    "x": [0, 1, None],
    **{name: [0, 1, None, "absent"] for name in ("hx", "reset_state", *MARKS)},
    "out": [0, 1],
}


def draw(chance: random.Random) -> Row:
    row = {name: chance.choice(values) for name, values in TABLE.items()}
    if row["bidirectional"]:
        row["reset"] = "absent"
    if row["batched"]:  # a batch draws other numbers than its rows
        row["dropout_key"] = "absent"
    if row["reset"] == "absent":
        row["reset_state"] = "absent"
    if not any(row[name] in (0, 1) for name in FLOATS + MARKS):
        row["x"] = 0
    return row


class Case:
    """A row of the table: arguments for each row of a batch, and what becomes of them."""

    def __init__(self, row: Row) -> None:
        self.row, self.axes = row, {name: row[name] for name in FLOATS + MARKS if row[name] != "absent"}
        self.rows, time, batch, features, hidden = (3, 3, 3, 3, 3) if row["equal"] else (2, 5, 4, 6, 3)
        self.nested = row["order"] == "of vmap of vmap"
        cell, proj_size = CELLS[row["cell"]]
        layers = 1 if row["dropout_masks"] == "absent" else 2
        dropout, both = layers / 2 - 0.5, row["bidirectional"]
        self.spec = spec = jaxrnn.Spec(
            cell,
            features,
            hidden,
            layers,
            dropout=dropout,
            bidirectional=both,
            proj_size=proj_size,
            recurrent_dropout=0.4 * cell.recurrent,
        )
        shape = (time, batch) if row["batched"] else (time,)

        def state(seed: int) -> Tree:
            sizes = enumerate(spec.state_sizes())
            hx = tuple(normal(layers * (1 + both), *shape[1:], size, seed=seed + k) for k, size in sizes)
            return hx if len(hx) > 1 else hx[0]

        def arguments(seed: int) -> Row:
            chance = np.random.RandomState(seed)
            params = {name: value * chance.uniform(0.5, 1) for name, value in parameters(spec).items()}
            return {
                "params": params,
                "x": normal(*shape, features, seed=seed),
                "hx": state(seed),
                "reset_state": state(seed + 2),
                "lengths": chance.randint(0, time + 1, shape[1:]),
                "mask": chance.rand(*shape) < 0.7,
                "reset": chance.rand(*shape) < 0.4,
                "dropout_masks": [chance.rand(*shape, (1 + both) * spec.output_size) < 0.5],
                "dropout_key": np.asarray(jax.random.PRNGKey(seed)),  # an array of numbers, which can be stacked
            }

        shared = arguments(0)
        self.arguments = []
        for k in range(self.rows * (2 if self.nested else 1)):
            own = arguments(k + 1)
            self.arguments.append({n: (shared if axis is None else own)[n] for n, axis in self.axes.items()})
        outputs = jax.eval_shape(self.apply, *parts(self.arguments[0]))
        self.weights = [
            [normal(*a.shape, seed=k + 10 * which) for which, a in enumerate(outputs)]
            for k in range(len(self.arguments))
        ]

    def apply(self, floats: Row, marks: Row, remat: Any = "none", engine: str = "auto") -> list[jax.Array]:
        rest = {name: value for name, value in (floats | marks).items() if name not in ("params", "x")}
        rest |= {"remat": remat, "engine": engine}
        return jax.tree.leaves(jaxrnn.apply(self.spec, floats["params"], floats["x"], **rest))

    def tangents(self, k: int) -> Row:
        """Each row's own, also of what is the same for all rows, where the transform is within vmap."""
        own = k if self.row["order"] == "in vmap" else 0
        return jax.tree.map(lambda a: np.cos(3 * a + own), parts(self.arguments[k])[0])

    def stack(self, rows: list[Tree], axes: Tree) -> Tree:
        """Put rows side by side along the axes that a prefix of the tree says; one for all where it says None."""

        def along(axis: int | None, *values: Tree) -> Tree:
            return jax.tree.map(lambda *a: a[0] if axis is None else np.stack(a, min(axis, np.ndim(a[0]))), *values)

        if self.nested and len(rows) > self.rows:
            halves = [self.stack(part, axes) for part in (rows[: self.rows], rows[self.rows :])]
            return {n: along(None if axes[n] is None else 0, *(half[n] for half in halves)) for n in axes}
        return {name: along(axes[name], *(row[name] for row in rows)) for name in axes}

    def by_loop(self) -> Tree:
        """Row by row, also those of a batch, in one program, without vmap, remat or jit inside."""
        run = jax.jit(functools.partial(TRANSFORMS[self.row["transform"]], self.apply))
        results = [self._one(run, k) for k in range(len(self.arguments))]
        if not isinstance(results[0], dict):
            return self.stack([dict(enumerate(jax.tree.leaves(result))) for result in results], self._out(results[0]))
        if self.row["order"] == "in vmap":
            return self.stack(results, dict.fromkeys(results[0], self.row["out"]))
        for name in results[0]:
            if self.axes[name] is None:
                results[0][name] = jax.tree.map(lambda *a: np.sum(a, 0), *(result[name] for result in results))
        return self.stack(results, {name: self.axes[name] for name in results[0]})

    def _one(self, run: Callable, k: int) -> Tree:
        arguments, weights, tangents = self.arguments[k], self.weights[k], self.tangents(k)
        if not self.row["batched"]:
            return run(*parts(arguments), weights, tangents)
        results = [
            run(*parts(_cut(arguments, b)), [a[:, b] for a in weights], _cut(tangents, b))
            for b in range(arguments["x"].shape[1])
        ]
        if not isinstance(results[0], dict):
            return jax.tree.map(lambda *a: np.stack(a, 1), *results)

        def together(name: str) -> Tree:
            rows = (result[name] for result in results)
            return jax.tree.map(lambda *a: np.sum(a, 0) if name == "params" else np.stack(a, 1), *rows)

        return {name: together(name) for name in results[0]}

    def _out(self, result: Tree) -> dict[int, int]:
        return dict.fromkeys(range(len(jax.tree.leaves(result))), self.row["out"])

    def by_vmap(self) -> Tree:
        row, out = self.row, self.row["out"]
        engine = "associative_scan" if self.spec.cell == jaxrnn.MIN_GRU_CELL else "auto"
        function: Function = functools.partial(self.apply, remat=row["remat"], engine=engine)
        function = jax.jit(function) if "inside" in row["jit"] else function
        transform = TRANSFORMS[row["transform"]]
        # No argument has more axes than it has, and in the outer one of two vmaps all are mapped along the first.
        inner = [
            {
                n: None if axis is None else jax.tree.map(lambda a, axis=axis: min(axis, np.ndim(a)), first[n])
                for n, axis in self.axes.items()
                if n in first
            }
            for first in parts(self.arguments[0])
        ]
        outer = [{n: None if self.axes[n] is None else 0 for n in axes} for axes in inner]
        arguments = parts(self.stack(self.arguments, self.axes))
        weights = self.stack([dict(enumerate(w)) for w in self.weights], self._out(self.weights[0]))
        weights = [*weights.values()]
        if row["order"] == "in vmap":
            every = [self.tangents(k) for k in range(len(self.arguments))]
            tangents = self.stack(every, dict.fromkeys(every[0], 0))
            run = jax.vmap(functools.partial(transform, function), (*inner, out, 0), out)
        else:
            tangents = jax.tree.map(lambda a: np.cos(3 * a), arguments[0])
            function = jax.vmap(function, inner, out)
            run = functools.partial(transform, jax.vmap(function, outer) if self.nested else function)
        result = (jax.jit(run) if "outside" in row["jit"] else run)(*arguments, weights, tangents)
        return result if isinstance(result, dict) else dict(enumerate(jax.tree.leaves(result)))


def parts(arguments: Row) -> list[Row]:
    return [{name: arguments[name] for name in names if name in arguments} for names in (FLOATS, MARKS)]


def _cut(arguments: Row, b: int) -> Row:
    """One row of a batch."""

    def cut(name: str) -> Tree:
        return jax.tree.map(lambda a: a[b] if name == "lengths" else a[:, b], arguments[name])

    return {name: value if name == "params" else cut(name) for name, value in arguments.items()}
