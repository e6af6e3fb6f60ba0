"""The derivative rule against plain autodiff of textbook equations: every transform, in float64, to 1e-12."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close
from jax.test_util import check_grads

import jaxrnn

Tree = dict[str, jax.Array]


def _sums(x: jax.Array, h: jax.Array, weights: Tree) -> tuple[jax.Array, jax.Array]:
    inputs, hidden = weights["weight_ih"] @ x + weights["bias_ih"], weights["weight_hh"] @ h + weights["bias_hh"]
    return inputs, hidden


def _rnn(nonlinearity: Callable) -> Callable:
    def step(x: jax.Array, state: tuple, weights: Tree) -> tuple:
        (h,) = state
        return (nonlinearity(sum(_sums(x, h, weights))),)

    return step


def _lstm(x: jax.Array, state: tuple, weights: Tree) -> tuple:
    h, c = state
    i, f, g, o = jnp.split(sum(_sums(x, h, weights)), 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (weights["weight_hr"] @ h if "weight_hr" in weights else h), c


def _gru(x: jax.Array, state: tuple, weights: Tree) -> tuple:
    (h,) = state
    (x_r, x_z, x_n), (h_r, h_z, h_n) = (jnp.split(a, 3) for a in _sums(x, h, weights))
    r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
    return ((1 - z) * jnp.tanh(x_n + r * h_n) + z * h,)


def _standardised(a: jax.Array) -> jax.Array:
    return (a - jnp.mean(a)) / jnp.sqrt(jnp.var(a) + 1e-5)


def _layer_norm_lstm(x: jax.Array, state: tuple, weights: Tree) -> tuple:
    h, c = state
    parts = zip(_sums(x, h, weights), ("ih", "hh"), strict=True)
    normalised = [
        _standardised(a) * weights[f"weight_ln_{name}"].ravel() + weights[f"bias_ln_{name}"].ravel()
        for a, name in parts
    ]
    i, f, g, o = jnp.split(sum(normalised), 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    c = _standardised(c) * weights["weight_ln_c"] + weights["bias_ln_c"]
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _peephole_lstm(x: jax.Array, state: tuple, weights: Tree) -> tuple:
    h, c = state
    i, f, g, o = jnp.split(sum(_sums(x, h, weights)), 4)
    i, f = i + weights["weight_ci"] * c, f + weights["weight_cf"] * c
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o + weights["weight_co"] * c) * jnp.tanh(c), c


def _ind_rnn(x: jax.Array, state: tuple, weights: Tree) -> tuple:
    (h,) = state
    return (jax.nn.relu(weights["weight_ih"] @ x + weights["bias_ih"] + weights["weight_u"] * h),)


def _min_gru(x: jax.Array, state: tuple, weights: Tree) -> tuple:
    z, n = jnp.split(weights["weight_ih"] @ x + weights["bias_ih"], 2)
    return (state[0] + jax.nn.sigmoid(z) * (n - state[0]),)


KINDS = {
    "rnn_tanh": (jaxrnn.RNN_TANH, 0, _rnn(jnp.tanh)),
    "rnn_relu": (jaxrnn.RNN_RELU, 0, _rnn(jax.nn.relu)),
    "lstm": (jaxrnn.LSTM_CELL, 0, _lstm),
    "lstm_projected": (jaxrnn.LSTM_CELL, 2, _lstm),
    "gru": (jaxrnn.GRU_CELL, 0, _gru),
    "layer_norm_lstm": (jaxrnn.LAYER_NORM_LSTM_CELL, 0, _layer_norm_lstm),
    "peephole_lstm": (jaxrnn.PEEPHOLE_LSTM_CELL, 0, _peephole_lstm),
    "ind_rnn": (jaxrnn.IND_RNN_CELL, 0, _ind_rnn),
    "min_gru": (jaxrnn.MIN_GRU_CELL, 0, _min_gru),
}
TIME, INPUT, HIDDEN = 4, 2, 3


class Case:
    """One unbatched bidirectional layer of a kind, ours and in plain autodiff.

    Or a layer whose row ends a step early, or a layer in one direction that is reset before its third step.
    """

    def __init__(self, kind: str, mark: str = "") -> None:
        cell, proj_size, self.step = KINDS[kind]
        self.length = TIME - (mark == "ends")
        self.resets = mark == "reset"
        self.spec = jaxrnn.Spec(cell, INPUT, HIDDEN, bidirectional=not self.resets, proj_size=proj_size)
        hx = tuple(normal(self.spec.num_directions, size, seed=k) for k, size in enumerate(self.spec.state_sizes()))
        self.arguments = parameters(self.spec), normal(TIME, INPUT), hx

    def ours(self, params: Tree, x: jax.Array, hx: tuple) -> list[jax.Array]:
        marks: dict = {"lengths": self.length} if self.length < TIME else {}
        hx = hx if len(hx) > 1 else hx[0]
        if self.resets:
            marks = {"reset": jnp.arange(TIME) == 2, "reset_state": jax.tree.map(jnp.cos, hx)}
        return jax.tree.leaves(jaxrnn.apply(self.spec, params, x, hx, **marks))

    def plain(self, params: Tree, x: jax.Array, hx: tuple) -> list[jax.Array]:
        outputs, last = [], []
        for direction in range(self.spec.num_directions):
            weights = {role: params[name] for role, name in self.spec.names(0, direction).items()}
            first = tuple(a[direction] for a in hx)

            def body(state: tuple, step: tuple, first: tuple = first, weights: Tree = weights) -> tuple:
                t, x_t = step
                if self.resets:
                    state = tuple(jnp.where(t == 2, jnp.cos(a), b) for a, b in zip(first, state, strict=True))
                state = self.step(x_t, state, weights)
                return state, state[0]

            steps = jnp.arange(self.length), x[: self.length]
            state, output = jax.lax.scan(body, first, steps, reverse=direction == 1)
            outputs.append(jnp.pad(output, ((0, TIME - self.length), (0, 0))))
            last.append(state)
        return [jnp.concatenate(outputs, -1), *(jnp.stack(rows) for rows in zip(*last, strict=True))]


def _loss(function: Callable) -> Callable:
    return lambda *arguments: sum(jnp.sum(jnp.sin(a + k)) for k, a in enumerate(function(*arguments)))


def _transforms(function: Callable) -> Callable:
    """A function that gives what every transform makes of `function(params, x, hx)`, in one program."""
    loss, every = _loss(function), (0, 1, 2)
    gradient = jax.grad(loss, every)

    def penalty(*arguments: Any) -> jax.Array:
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient(*arguments)))

    @jax.jit
    def run(params: Tree, x: jax.Array, hx: tuple) -> dict[str, Any]:
        arguments = params, x, hx
        tangents = jax.tree.map(lambda a: jnp.cos(3 * a), arguments)
        rows, stacked = jnp.stack([x, 2 * x, -x]), jax.tree.map(lambda a: jnp.stack([a, -a, a / 2]), params)
        forward, push = jax.linearize(function, *arguments)
        return {
            "forward": forward,
            "grad": gradient(*arguments),
            "jvp": jax.jvp(function, arguments, tangents)[1],
            "linearize": push(*tangents),
            "linear_transpose": jax.linear_transpose(push, *arguments)(forward),
            "jacfwd": jax.jacfwd(function, 1)(*arguments),
            "jacrev": jax.jacrev(function, 1)(*arguments),
            "jvp of grad": jax.jvp(gradient, arguments, tangents)[1],
            "grad of grad": jax.grad(penalty, every)(*arguments),
            "vmap of grad over x": jax.vmap(gradient, (None, 0, None))(params, rows, hx),
            "vmap of grad over params": jax.vmap(gradient, (0, None, None))(stacked, x, hx),
            "grad of checkpoint": jax.grad(jax.checkpoint(loss), every)(*arguments),
        }

    return run


MARKED = [f"{kind} {mark}" for kind in ("lstm_projected", "gru") for mark in ("ends", "reset")]
MARKED += ["peephole_lstm ends", "ind_rnn reset"]
# Between them the quick ones have both directions, a projection and every mark; the slow ones every kind.
QUICK = ("gru reset", "ind_rnn reset")
SLOW = ("rnn_relu", "lstm_projected ends", "peephole_lstm ends", "min_gru")


def _mark(name: str) -> Any:
    return () if name in QUICK else pytest.mark.slow if name in SLOW else pytest.mark.thorough


@pytest.mark.parametrize("name", [pytest.param(name, marks=_mark(name)) for name in [*KINDS, *MARKED]])
def test_every_transform(name: str) -> None:
    case = Case(*name.split())
    found, expected = (_transforms(function)(*case.arguments) for function in (case.ours, case.plain))
    assert_close(found, expected, rtol=1e-13)
    assert all(np.abs(a).max() > 1e-3 for a in jax.tree.leaves(found["grad"]))


@pytest.mark.slow
def test_second_order_against_finite_differences() -> None:
    case = Case("lstm_projected")
    check_grads(_loss(case.ours), case.arguments, order=2, rtol=1e-5)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda gates, hidden, state: (*gates, *state), "a tuple of 1 arrays, got 2"),
        (lambda gates, hidden, state: gates[0], "a tuple of 1 arrays, got no tuple but .*Tracer"),
        (
            lambda gates, hidden, state: (gates[0].sum(-1),),
            r"h as float32 of shape \(1, 3\), got float32 of shape \(1,\)",
        ),
        (lambda gates, hidden, state: (gates[0] > 0,), r"h as float32 of shape \(1, 3\), got bool of shape \(1, 3\)"),
    ],
)
def test_a_cell_whose_step_returns_something_else(step: Callable, message: str) -> None:
    cell = jaxrnn.Cell("greedy", gates=("a",), states=("h",), step=step)
    spec = jaxrnn.Spec(cell, 2, 3)
    params = {name: np.ones(shape, np.float32) for name, shape in spec.shapes().items()}
    with pytest.raises(ValueError, match=f"step of Cell 'greedy' should return {message}"):
        jaxrnn.apply(spec, params, np.ones((4, 2), np.float32))


def _layer_norm(a: jax.Array) -> jax.Array:
    a = a - a.mean(-1, keepdims=True)
    return a / jnp.sqrt((a**2).mean(-1, keepdims=True) + 1e-5)


@jax.custom_jvp
def _rolled_derivative(a: jax.Array) -> jax.Array:
    """Pointwise, but its rule is not."""
    return jnp.sin(a)


@_rolled_derivative.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    return _rolled_derivative(*primals), jnp.roll(tangents[0], 1, -1)


@jax.custom_vjp
def _rolled_cotangent(a: jax.Array) -> jax.Array:
    return jnp.sin(a)


_rolled_cotangent.defvjp(lambda a: (jnp.sin(a), None), lambda _, d_a: (jnp.roll(d_a, 1, -1),))


# What a step may do to a gate of 3 features. These are not pointwise:
PLACES = np.array([2, 0, 1])
TRIANGLE = np.array([[2.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.5, 3.0, 1.5]])
NOT_POINTWISE: dict[str, Callable] = {
    "normalised": _layer_norm,
    "cumulative": lambda a: jnp.cumsum(a, -1),
    "reversed": lambda a: a[..., ::-1],
    "permuted": lambda a: a[..., PLACES],
    "mixed": lambda a: a @ jnp.asarray(np.random.RandomState(2).randn(3, 3)),
    "shifted": lambda a: jnp.roll(a, 1, -1),
    "sorted": lambda a: jnp.sort(a, -1),
    "in a branch": lambda a: jax.lax.cond(jnp.array(True), _layer_norm, jnp.sin, a),
    "in a loop": lambda a: jax.lax.fori_loop(0, 2, lambda _, a: jnp.roll(a, 1, -1), a),
    "of the rows": lambda a: a + a.mean(0, keepdims=True),
    "factored": lambda a: jnp.linalg.qr(a)[0],  # a batch of 3, too, so that a gate is square
    "of the spectrum": lambda a: jnp.fft.irfft(jnp.fft.rfft(a) * jnp.array([1 + 0j, 0.5]), 3),
    "convolved": lambda a: jax.vmap(lambda row: jnp.convolve(row, jnp.array([0.5, -1.0, 2.0]), mode="same"))(a),
    "solved for": lambda a: jax.scipy.linalg.solve_triangular(TRIANGLE, a.T, lower=True).T,
    "of the softmax": lambda a: jax.nn.softmax(a, -1),
    "with a rule": _rolled_derivative,
    "with a rule in reverse": _rolled_cotangent,
}
# and these are:
POINTWISE: dict[str, Callable] = {
    "scaled": lambda a: a * jnp.arange(3.0),
    "clipped": lambda a: jnp.clip(a, -0.5, 0.5),
    "where": lambda a: jnp.where(a > 0, a, jax.nn.gelu(a)),
    "special": lambda a: jax.scipy.special.gammainc(2.0, jnp.exp(a)),
    "jitted": jax.jit(jnp.sin),
    "often": lambda a: jax.lax.fori_loop(0, 3, lambda _, a: jnp.sin(a), a),
    "either": lambda a: jax.lax.cond(jnp.array(True), jnp.tanh, jnp.sin, a),
}
CHANGES = NOT_POINTWISE | POINTWISE
MARKS = ("none", "lengths", "reset", "remat")
# Each change with one kind of marks, and the first with all.
STEPS = [*((name, MARKS[k % 4]) for k, name in enumerate(CHANGES)), *(("normalised", marks) for marks in MARKS[1:])]


@pytest.mark.parametrize(("name", "marks"), STEPS)
def test_a_step_of_any_kind(name: str, marks: str) -> None:
    """Values, gradients and, without marks, forward over reverse are autodiff's."""
    change = CHANGES[name]
    cell = jaxrnn.Cell(name, ("h",), ("h",), lambda gates, hidden, state: (jnp.tanh(change(gates[0])),))
    spec = jaxrnn.Spec(cell, 2, 3)
    params, x, hx, lengths = parameters(spec), normal(5, 3, 2), normal(1, 3, 3), np.array([5, 3, 4])
    reset = np.arange(15).reshape(5, 3) == 7
    given: dict = {"none": {}, "lengths": {"lengths": lengths}, "reset": {"reset": reset}, "remat": {"remat": 2}}[marks]

    def ours(params: Tree, hx: jax.Array) -> list[jax.Array]:
        return list(jaxrnn.apply(spec, params, x, hx, **given))

    def plain(params: Tree, hx: jax.Array) -> list[jax.Array]:
        def body(h: jax.Array, step: tuple) -> tuple[jax.Array, jax.Array]:
            x_t, reset_t, ended_t = step
            h = jnp.where(reset_t[:, None], 0.0, h) if marks == "reset" else h
            z = x_t @ params["weight_ih_l0"].T + h @ params["weight_hh_l0"].T
            after = jnp.tanh(change(z + params["bias_ih_l0"] + params["bias_hh_l0"]))
            return jnp.where(ended_t, h, after), jnp.where(ended_t, 0.0, after)

        ended = (np.arange(5)[:, None] >= lengths)[..., None] & (marks == "lengths")
        h, outputs = jax.lax.scan(body, hx[0], (jnp.where(ended, 0.0, x), reset, ended))
        return [outputs, h[None]]

    @jax.jit
    def run(params: Tree, hx: jax.Array) -> list[dict[str, Any]]:
        found = []
        for function in (ours, plain):
            gradient = jax.grad(_loss(function), (0, 1))
            results = {"values": function(params, hx), "grad": gradient(params, hx)}
            if marks == "none" and "rule" not in name:  # JAX has no second derivative for rules that are not true
                tangents = jax.tree.map(jnp.cos, (params, hx))
                results["jvp of grad"] = jax.jvp(gradient, (params, hx), tangents)[1]
            found.append(results)
        return found

    assert_close(*run(params, hx), rtol=1e-13)


def test_a_step_that_adds_up_over_a_mapped_axis() -> None:
    cell = jaxrnn.Cell("summed", ("h",), ("h",), lambda gates, *_: (jnp.tanh(jax.lax.psum(gates[0], "rows")),))
    spec = jaxrnn.Spec(cell, 2, 3)
    params, x = parameters(spec), normal(4, 5, 2)

    def ours(params: Tree) -> list[jax.Array]:
        run = functools.partial(jaxrnn.apply, spec, params)
        return list(jax.vmap(run, in_axes=1, out_axes=1, axis_name="rows")(x))

    def plain(params: Tree) -> list[jax.Array]:
        def body(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
            z = x_t @ params["weight_ih_l0"].T + h @ params["weight_hh_l0"].T
            h = jnp.tanh(jnp.broadcast_to(jnp.sum(z + params["bias_ih_l0"] + params["bias_hh_l0"], 0), h.shape))
            return h, h

        h, outputs = jax.lax.scan(body, jnp.zeros((5, 3)), x)
        return [outputs, h[None]]

    found, expected = jax.jit(lambda p: [(f(p), jax.grad(_loss(f))(p)) for f in (ours, plain)])(params)
    assert_close(found, expected)


@pytest.mark.parametrize("marks", ["none", "remat"])
def test_a_step_with_an_array_from_outside(marks: str) -> None:
    """An IndRNN: its recurrent weight is a vector, which the step closes over."""
    x, hx, u = normal(5, 3, 2), normal(1, 3, 3), normal(3)

    def ours(u: jax.Array, hx: jax.Array, weight: jax.Array) -> list[jax.Array]:
        cell = jaxrnn.Cell("independent", ("h",), ("h",), lambda gates, _, state: (jnp.tanh(gates[0] + u * state[0]),))
        spec = jaxrnn.Spec(cell, 2, 3, bias=False)
        params = {"weight_ih_l0": weight, "weight_hh_l0": jnp.zeros((3, 3))}
        return list(jaxrnn.apply(spec, params, x, hx, remat=2 if marks == "remat" else "none"))

    def plain(u: jax.Array, hx: jax.Array, weight: jax.Array) -> list[jax.Array]:
        def body(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = jnp.tanh(x_t @ weight.T + u * h)
            return h, h

        h, outputs = jax.lax.scan(body, hx[0], x)
        return [outputs, h[None]]

    arguments = (u, hx, normal(3, 2))
    expected = jax.jit(jax.grad(_loss(plain), (0, 1, 2)))(*arguments)
    for gradient in (jax.grad(_loss(ours), (0, 1, 2)), jax.jit(jax.grad(_loss(ours), (0, 1, 2)))):
        assert_close(gradient(*arguments), expected)
    assert np.all(np.abs(expected[0]) > 1e-3)


def test_16_bit_gradients_of_a_step_that_is_not_pointwise_add_up_in_float32() -> None:
    cell = jaxrnn.Cell("normalised", ("h",), ("h",), lambda gates, hidden, state: (jnp.tanh(_layer_norm(gates[0])),))
    spec = jaxrnn.Spec(cell, 2, 3)
    params, x = parameters(spec, jnp.bfloat16), jnp.ones((1000, 2), jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params: Tree, dtype: str) -> Tree:
        def loss(params: Tree) -> jax.Array:
            return jnp.sum(jnp.sin(jnp.arange(3)).astype(dtype) * jaxrnn.apply(spec, params, x, dtype=dtype)[0])

        return jax.grad(loss)({name: value.astype(dtype) for name, value in params.items()})

    exact, found = gradient(params, "float64"), gradient(params, "bfloat16")
    for name, truth in exact.items():
        assert_close({name: found[name]}, {name: truth}, atol=0.02 * np.abs(truth).max())


def _mine(gates: tuple, hidden: tuple, state: tuple) -> tuple:
    """Every gate apart, and four states, two of which do not depend on what was before."""
    (a, b), (a_h, b_h), (h, c, _, _) = gates, hidden, state
    new = jnp.tanh(a * a_h + b) * h + jnp.sin(b_h)
    return new, c + new, jnp.cos(a), jnp.ones_like(a)


def _entangled(gates: tuple, hidden: tuple, state: tuple) -> tuple:
    """States that come from each other, out as they came in, out twice, and from nothing."""
    a, b = gates
    _, p, q, kept, _, _ = state
    p = jnp.tanh(a) * p + jnp.sin(kept)
    q = p * q + b
    return jnp.cos(q) * p + hidden[0], p, q, kept, q, jnp.ones_like(p)


OWN = {
    "mine": jaxrnn.Cell("mine", ("a", "b"), ("h", "c", "d", "e"), _mine, apart=("a", "b")),
    "entangled": jaxrnn.Cell("entangled", ("a", "b"), ("h", "p", "q", "kept", "twice", "one"), _entangled, ("b",)),
}


@pytest.mark.parametrize("name", OWN)
def test_a_cell_of_ones_own(name: str) -> None:
    cell = OWN[name]
    spec = jaxrnn.Spec(cell, INPUT, HIDDEN)
    hx = tuple(normal(1, size, seed=k) for k, size in enumerate(spec.state_sizes()))
    arguments = parameters(spec), normal(TIME, INPUT), hx

    def ours(params: Tree, x: jax.Array, hx: tuple) -> list[jax.Array]:
        return jax.tree.leaves(jaxrnn.apply(spec, params, x, hx))

    def plain(params: Tree, x: jax.Array, hx: tuple) -> list[jax.Array]:
        weights = {name.removesuffix("_l0"): value for name, value in params.items()}

        def body(state: tuple, x_t: jax.Array) -> tuple[tuple, jax.Array]:
            halves = zip(cell.gates, *(jnp.split(a, 2) for a in _sums(x_t, state[0], weights)), strict=True)
            pairs = [(a, b) if name in cell.apart else (a + b, None) for name, a, b in halves]
            gates, hidden = tuple(a for a, _ in pairs), tuple(b for _, b in pairs if b is not None)
            state = cell.step(gates, hidden, state)
            return state, state[0]

        state, outputs = jax.lax.scan(body, tuple(a[0] for a in hx), x)
        return [outputs, *(a[None] for a in state)]

    @jax.jit
    def run(*arguments: Any) -> list[dict[str, Any]]:
        return [
            {
                "values": function(*arguments),
                "grad": jax.grad(_loss(function), (0, 1, 2))(*arguments),
                "jvp": jax.jvp(function, arguments, jax.tree.map(jnp.cos, arguments))[1],
            }
            for function in (ours, plain)
        ]

    assert_close(*run(*arguments))


def _normalised(gates: tuple, hidden: tuple, state: tuple) -> tuple:
    """An output by c over n, both of which may be zero before the first step, and are held past the last."""
    i, f, z, o = gates
    _, c, n = state
    i, f = jnp.exp(i), jax.nn.sigmoid(f)
    c, n = f * c + i * jnp.tanh(z), f * n + i
    return jax.nn.sigmoid(o) * c / n, c, n


def test_a_held_state_where_the_derivative_is_infinite() -> None:
    cell = jaxrnn.Cell("normalised", ("i", "f", "z", "o"), ("h", "c", "n"), _normalised)
    spec = jaxrnn.Spec(cell, INPUT, HIDDEN, bidirectional=True)

    def loss(params: Tree, x: jax.Array, lengths: list[int] | None) -> jax.Array:
        return jnp.sum(jnp.sin(jaxrnn.apply(spec, params, x, lengths=lengths)[0]))

    @jax.jit
    def gradients(params: Tree, x: jax.Array) -> tuple[Tree, Tree]:
        alone = [jax.grad(loss)(params, x[:length, row : row + 1], None) for row, length in ((0, TIME), (1, 2))]
        return jax.grad(loss)(params, x, [TIME, 2, 0]), jax.tree.map(jnp.add, *alone)

    assert_close(*gradients(parameters(spec), normal(TIME, 3, INPUT)))
