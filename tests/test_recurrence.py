"""The derivative rule against plain autodiff of textbook equations: every transform, in float64, to 1e-12."""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxrnn
from jaxrnn import pointwise

Tree = dict[str, jax.Array]


def _rnn(nonlinearity: Callable) -> Callable:
    def step(x: jax.Array, state: tuple, weights: Tree) -> tuple:
        (h,) = state
        z = weights["weight_ih"] @ x + weights["bias_ih"] + weights["weight_hh"] @ h + weights["bias_hh"]
        return (nonlinearity(z),)

    return step


def _lstm(x: jax.Array, state: tuple, weights: Tree) -> tuple:
    h, c = state
    z = weights["weight_ih"] @ x + weights["bias_ih"] + weights["weight_hh"] @ h + weights["bias_hh"]
    i, f, g, o = jnp.split(z, 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (weights["weight_hr"] @ h if "weight_hr" in weights else h), c


def _gru(x: jax.Array, state: tuple, weights: Tree) -> tuple:
    (h,) = state
    x_r, x_z, x_n = jnp.split(weights["weight_ih"] @ x + weights["bias_ih"], 3)
    h_r, h_z, h_n = jnp.split(weights["weight_hh"] @ h + weights["bias_hh"], 3)
    r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
    return ((1 - z) * jnp.tanh(x_n + r * h_n) + z * h,)


KINDS = {
    "rnn_tanh": (jaxrnn.RNN_TANH, 0, _rnn(jnp.tanh)),
    "rnn_relu": (jaxrnn.RNN_RELU, 0, _rnn(jax.nn.relu)),
    "lstm": (jaxrnn.LSTM_CELL, 0, _lstm),
    "lstm_projected": (jaxrnn.LSTM_CELL, 2, _lstm),
    "gru": (jaxrnn.GRU_CELL, 0, _gru),
}
TIME, INPUT, HIDDEN = 4, 2, 3


class Case:
    """One unbatched bidirectional layer of a kind, ours and in plain autodiff, with a scalar loss over every output.

    Or a layer whose row ends a step early, or a layer in one direction that is put back before its third step.
    """

    def __init__(self, kind: str, mark: str = "") -> None:
        cell, proj_size, self.step = KINDS[kind]
        self.length = TIME - (mark == "ends")
        self.resets = mark == "reset"
        self.spec = jaxrnn.Spec(cell, INPUT, HIDDEN, bidirectional=not self.resets, proj_size=proj_size)
        random = np.random.RandomState(0)
        self.params = {name: jnp.asarray(random.randn(*shape)) for name, shape in self.spec.shapes().items()}
        self.x = jnp.asarray(random.randn(TIME, INPUT))
        rows = self.spec.num_directions
        self.hx = tuple(jnp.asarray(random.randn(rows, size)) for size in self.spec.state_sizes())

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
            state = tuple(a[direction] for a in hx)
            hidden = []
            for t in range(self.length)[:: -1 if direction else 1]:
                if self.resets and t == 2:
                    state = tuple(jnp.cos(a[direction]) for a in hx)
                state = self.step(x[t], state, weights)
                hidden.append(state[0])
            zeros = [jnp.zeros_like(hidden[0])] * (TIME - self.length)
            outputs.append(jnp.stack(hidden[:: -1 if direction else 1] + zeros))
            last.append(state)
        return [jnp.concatenate(outputs, -1), *(jnp.stack(rows) for rows in zip(*last, strict=True))]

    @staticmethod
    def loss(function: Callable) -> Callable:
        return lambda *arguments: sum(jnp.sum(jnp.sin(a + k)) for k, a in enumerate(function(*arguments)))

    @property
    def arguments(self) -> tuple:
        return self.params, self.x, self.hx


MARKED = [f"{kind} {mark}" for kind in ("lstm_projected", "gru") for mark in ("ends", "reset")]


@pytest.fixture(params=[*KINDS, *MARKED])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param.split())


def assert_same(ours: object, plain: object) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_forward(case: Case) -> None:
    assert_same(case.ours(*case.arguments), case.plain(*case.arguments))


def test_grad(case: Case) -> None:
    every = (0, 1, 2)
    gradients = jax.jit(jax.value_and_grad(case.loss(case.ours), every))(*case.arguments)
    assert_same(gradients, jax.jit(jax.value_and_grad(case.loss(case.plain), every))(*case.arguments))
    assert all(np.abs(a).max() > 1e-3 for a in jax.tree.leaves(gradients))


def test_jvp(case: Case) -> None:
    tangents = jax.tree.map(lambda a: jnp.cos(3 * a), case.arguments)
    assert_same(jax.jvp(case.ours, case.arguments, tangents), jax.jvp(case.plain, case.arguments, tangents))


def test_jacfwd_and_jacrev(case: Case) -> None:
    plain = jax.jit(jax.jacfwd(case.plain, (0, 1)))(*case.arguments)
    assert_same(jax.jacfwd(case.ours, (0, 1))(*case.arguments), plain)
    assert_same(jax.jacrev(case.ours, (0, 1))(*case.arguments), plain)


def test_hessian(case: Case) -> None:
    ours = jax.jit(jax.hessian(case.loss(case.ours), (0, 2)))(*case.arguments)
    assert_same(ours, jax.hessian(case.loss(case.plain), (0, 2))(*case.arguments))


def test_reverse_over_reverse(case: Case) -> None:
    def penalty(function: Callable) -> Callable:
        return lambda params: sum(jnp.sum(g**2) for g in jax.grad(case.loss(function), 1)(params, case.x, case.hx))

    assert_same(jax.grad(penalty(case.ours))(case.params), jax.grad(penalty(case.plain))(case.params))


def test_second_order_against_finite_differences() -> None:
    case = Case("lstm_projected")
    check_grads(case.loss(case.ours), case.arguments, order=2, rtol=1e-5)


def test_vmap_of_grad_over_examples(case: Case) -> None:
    x = jnp.stack([case.x, 2 * case.x, -case.x])

    def per_example(function: Callable) -> Callable:
        return jax.vmap(jax.grad(case.loss(function)), in_axes=(None, 0, None))

    assert_same(per_example(case.ours)(case.params, x, case.hx), per_example(case.plain)(case.params, x, case.hx))


def test_vmap_over_stacked_parameters(case: Case) -> None:
    params = jax.tree.map(lambda a: jnp.stack([a, -a, a / 2]), case.params)

    def each(function: Callable) -> Callable:
        return jax.vmap(jax.grad(case.loss(function), (0, 1)), in_axes=(0, None, None))

    assert_same(each(case.ours)(params, case.x, case.hx), each(case.plain)(params, case.x, case.hx))


def test_checkpoint(case: Case) -> None:
    remat = jax.grad(jax.checkpoint(case.loss(case.ours)))(*case.arguments)
    assert_same(remat, jax.jit(jax.grad(case.loss(case.plain)))(*case.arguments))


def test_linearize_and_transpose(case: Case) -> None:
    """The tangent's transpose is the gradient: <u, J v> = <J' u, v>."""
    _, push = jax.linearize(lambda x: case.ours(case.params, x, case.hx)[0], case.x)
    v = jnp.cos(case.x)
    u = jnp.sin(push(v))
    (pulled,) = jax.linear_transpose(push, case.x)(u)
    np.testing.assert_allclose(jnp.vdot(u, push(v)), jnp.vdot(pulled, v), rtol=1e-12)


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
    with pytest.raises(ValueError, match=f"step of Cell 'greedy' should return {message}"):
        jaxrnn.apply(spec, spec.init(jax.random.key(0)), jnp.ones((4, 2), jnp.float32))


def _layer_norm(a: jax.Array) -> jax.Array:
    a = a - a.mean(-1, keepdims=True)
    return a / jnp.sqrt((a**2).mean(-1, keepdims=True) + 1e-5)


# What a step may do to a gate of 3 features. By the rule for pointwise steps the gradients would be wrong.
PLACES = jnp.array([2, 0, 1])
NOT_POINTWISE: dict[str, Callable] = {
    "normalised": _layer_norm,
    "cumulative": lambda a: jnp.cumsum(a, -1),
    "turned around": lambda a: a[..., ::-1],
    "permuted": lambda a: a[..., PLACES],
    "mixed": lambda a: a @ jnp.asarray(np.random.RandomState(2).randn(3, 3)),
    "shifted": lambda a: jnp.roll(a, 1, -1),
    "sorted": lambda a: jnp.sort(a, -1),
    "in a branch": lambda a: jax.lax.cond(jnp.array(True), _layer_norm, jnp.sin, a),
    "in a loop": lambda a: jax.lax.fori_loop(0, 2, lambda _, a: jnp.roll(a, 1, -1), a),
    "of the rows": lambda a: a + a.mean(0, keepdims=True),
}
POINTWISE: dict[str, Callable] = {
    "scaled": lambda a: a * jnp.arange(3.0),
    "clipped": lambda a: jnp.clip(a, -0.5, 0.5),
    "where": lambda a: jnp.where(a > 0, a, jax.nn.gelu(a)),
    "special": lambda a: jax.scipy.special.gammainc(2.0, jnp.exp(a)),
    "jitted": jax.jit(jnp.sin),
    "often": lambda a: jax.lax.fori_loop(0, 3, lambda _, a: jnp.sin(a), a),
    "either": lambda a: jax.lax.cond(jnp.array(True), jnp.tanh, jnp.sin, a),
}


@pytest.mark.parametrize("marks", ["", "lengths", "reset", "remat"])
@pytest.mark.parametrize("name", NOT_POINTWISE)
def test_a_step_that_is_not_pointwise(name: str, marks: str) -> None:
    """It has autodiff of the scan: values, gradients, and forward over reverse."""
    change = NOT_POINTWISE[name]
    cell = jaxrnn.Cell(name, ("h",), ("h",), lambda gates, hidden, state: (jnp.tanh(change(gates[0])),))
    spec = jaxrnn.Spec(cell, 2, 3)
    params = spec.init(jax.random.key(0), jnp.float64)
    x, hx = (jnp.asarray(np.random.RandomState(1).randn(*shape)) for shape in ((5, 2, 2), (1, 2, 3)))
    lengths = jnp.array([5, 3])
    given: dict = {"lengths": lengths} if marks == "lengths" else {}
    given |= {"reset": jnp.arange(10).reshape(5, 2) == 4} if marks == "reset" else {}
    given |= {"remat": 2} if marks == "remat" else {}

    def ours(params: Tree, hx: jax.Array) -> list[jax.Array]:
        return list(jaxrnn.apply(spec, params, x, hx, **given))

    def plain(params: Tree, hx: jax.Array) -> list[jax.Array]:
        h, outputs = hx[0], []
        for t in range(5):
            if marks == "reset":
                h = jnp.where(given["reset"][t][:, None], 0.0, h)
            ended = (t >= lengths)[:, None] & (marks == "lengths")
            z = jnp.where(ended, 0.0, x[t]) @ params["weight_ih_l0"].T + h @ params["weight_hh_l0"].T
            after = jnp.tanh(change(z + params["bias_ih_l0"] + params["bias_hh_l0"]))
            h = jnp.where(ended, h, after)
            outputs.append(jnp.where(ended, 0.0, after))
        return [jnp.stack(outputs), h[None]]

    losses = (Case.loss(ours), Case.loss(plain))
    assert_same(*(jax.jit(jax.value_and_grad(loss, (0, 1)))(params, hx) for loss in losses))
    if not marks:
        tangents = jax.tree.map(jnp.cos, (params, hx))
        assert_same(*(jax.jvp(jax.grad(loss, (0, 1)), (params, hx), tangents) for loss in losses))


def test_16_bit_gradients_of_a_step_that_is_not_pointwise_add_up_in_float32() -> None:
    cell = jaxrnn.Cell("normalised", ("h",), ("h",), lambda gates, hidden, state: (jnp.tanh(_layer_norm(gates[0])),))
    spec = jaxrnn.Spec(cell, 2, 3)
    params, x = spec.init(jax.random.key(0), jnp.bfloat16), jnp.ones((1000, 2), jnp.bfloat16)

    def gradient(dtype: str) -> Tree:
        def loss(params: Tree) -> jax.Array:
            return jnp.sum(jnp.sin(jnp.arange(3)).astype(dtype) * jaxrnn.apply(spec, params, x, dtype=dtype)[0])

        return jax.grad(loss)({name: value.astype(dtype) for name, value in params.items()})

    exact = gradient("float64")
    for name, found in gradient("bfloat16").items():
        np.testing.assert_allclose(found.astype("float64"), exact[name], rtol=0, atol=0.02 * np.abs(exact[name]).max())


def test_which_steps_are_pointwise() -> None:
    def pointwise_of(change: Callable) -> bool:
        cell = jaxrnn.Cell("mine", ("h",), ("h",), lambda gates, hidden, state: (change(gates[0]),))
        return pointwise.is_pointwise(cell, (4, 3), ((4, 3),), jnp.dtype("float64"))

    assert {name for name, change in NOT_POINTWISE.items() if pointwise_of(change)} == set()
    assert {name for name, change in POINTWISE.items() if not pointwise_of(change)} == set()
    for cell, proj_size, _ in KINDS.values():
        states = ((1, proj_size or 3), (1, 3))[: len(cell.states)]
        assert pointwise.is_pointwise(cell, (1, 3), states, jnp.dtype("float32"))


def test_a_cell_of_ones_own() -> None:
    """Every gate apart, and four states, of which two forget what was before: values and gradients."""

    def step(gates: tuple, hidden: tuple, state: tuple) -> tuple:
        (a, b), (a_h, b_h), (h, c, _, _) = gates, hidden, state
        new = jnp.tanh(a * a_h + b) * h + jnp.sin(b_h)
        return new, c + new, jnp.cos(a), jnp.ones_like(a)

    cell = jaxrnn.Cell("mine", gates=("a", "b"), states=("h", "c", "d", "e"), step=step, apart=("a", "b"))
    spec = jaxrnn.Spec(cell, 2, 3)
    params = spec.init(jax.random.key(0), jnp.float64)
    x = jnp.asarray(np.random.RandomState(0).randn(4, 2))
    hx = tuple(jnp.asarray(np.random.RandomState(k).randn(1, 3)) for k in range(4))

    def ours(params: Tree, x: jax.Array, hx: tuple) -> list[jax.Array]:
        return jax.tree.leaves(jaxrnn.apply(spec, params, x, hx))

    def plain(params: Tree, x: jax.Array, hx: tuple) -> list[jax.Array]:
        state, outputs = tuple(a[0] for a in hx), []
        for x_t in x:
            gates = jnp.split(params["weight_ih_l0"] @ x_t + params["bias_ih_l0"], 2)
            hidden = jnp.split(params["weight_hh_l0"] @ state[0] + params["bias_hh_l0"], 2)
            state = step(tuple(gates), tuple(hidden), state)
            outputs.append(state[0])
        return [jnp.stack(outputs), *(a[None] for a in state)]

    assert_same(ours(params, x, hx), plain(params, x, hx))
    gradient = jax.grad(Case.loss(ours), (0, 1, 2))(params, x, hx)
    assert_same(gradient, jax.grad(Case.loss(plain), (0, 1, 2))(params, x, hx))


def _made_in_loops(function: Callable, *arguments: object) -> set[str]:
    """The shapes of the arrays that operations inside the loops of the compiled function make."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    bodies = set(re.findall(r"body=%([\w.\-]+)", text))
    assert bodies, "the compiled function has no loop"
    made, inside = set(), False
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) \(", line):
            inside = header[1] in bodies
        elif inside and (operation := re.match(r"\s+(?:ROOT )?%\S+ = \w+(\[[\d,]+\])\S* ([\w\-]+)\(", line)):
            shape, name = operation.groups()
            if name not in ("parameter", "get-tuple-element", "bitcast", "copy"):
                made.add(shape)
    return made


@pytest.mark.parametrize(("cell", "gates"), [(jaxrnn.LSTM_CELL, 4), (jaxrnn.GRU_CELL, 3)], ids=["LSTM", "GRU"])
def test_the_weight_gradient_is_no_sum_inside_the_loop(cell: jaxrnn.Cell, gates: int) -> None:
    hidden = 24
    spec = jaxrnn.Spec(cell, 7, hidden)
    params = spec.init(jax.random.key(0))
    x = jnp.ones((6, 5, 7), jnp.float32)
    weight = {f"[{gates * hidden},{hidden}]", f"[{hidden},{gates * hidden}]"}

    def loss(params: Tree, x: jax.Array) -> jax.Array:
        return jnp.sum(jaxrnn.apply(spec, params, x)[0] ** 2)

    def plain_loss(params: Tree, x: jax.Array) -> jax.Array:
        def body(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, None]:
            z = x_t @ params["weight_ih_l0"].T + h @ params["weight_hh_l0"].T
            return jnp.tanh(z[:, :hidden]) + jnp.tanh(z[:, hidden : 2 * hidden]), None

        return jnp.sum(jax.lax.scan(body, jnp.zeros((5, hidden), jnp.float32), x)[0] ** 2)

    assert not _made_in_loops(jax.grad(loss), params, x) & weight
    # The check sees what it looks for: plain autodiff does add up the weight gradient in its loop.
    assert _made_in_loops(jax.grad(plain_loss), params, x) & weight


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what a CPU runs")
@pytest.mark.parametrize("cell", [jaxrnn.LSTM_CELL, jaxrnn.GRU_CELL, jaxrnn.RNN_TANH], ids=lambda cell: cell.name)
def test_gates_are_computed_several_numbers_at_a_time(cell: jaxrnn.Cell, tmp_path: Path) -> None:
    spec = jaxrnn.Spec(cell, 16, 128)
    params = spec.init(jax.random.key(0))

    def run(params: Tree, x: jax.Array) -> jax.Array:
        return jnp.sum(jaxrnn.apply(spec, params, x)[0] ** 2)

    for name, function in (("inference", run), ("training", jax.grad(run, (0, 1)))):
        lowered = jax.jit(function).lower(params, jnp.ones((50, 4, 16), jnp.float32))
        lowered.compile(compiler_options={"xla_dump_to": str(tmp_path / name)})
        gates = 0
        for kernel in (tmp_path / name).glob("*.ir-with-opt.ll"):
            operations = re.findall(r"= f(?:add|sub|mul|div) (<\d+ x )?float", kernel.read_text())
            several = sum(kind not in ("", "<1 x ") for kind in operations)
            if len(operations) > 40:  # with a tanh or a logistic; the same one by one is for arrays that overlap
                gates += 1
                assert several >= len(operations) / 2, (kernel.name, several, len(operations))
        assert gates, f"{name} has no kernel that computes gates"


def test_a_state_that_comes_from_another_is_differentiated_by_that_one() -> None:
    step = jaxrnn.LSTM_CELL.step
    order, stages = pointwise.stages(jax.make_jaxpr(lambda *a: step(a[:4], (), a[4:]))(*jnp.ones((6, 2, 3))))
    # i f g o h c, then the new h and c
    assert order == [1, 0]
    assert {index: slots for index, (_, slots) in stages.items()} == {1: [0, 1, 2, 5], 0: [3, 7]}


def _entangled(gates: tuple, hidden: tuple, state: tuple) -> tuple:
    """States that come from each other, out as they came in, out twice, and from nothing."""
    a, b = gates
    _, p, q, kept, _, _ = state
    p = jnp.tanh(a) * p + jnp.sin(kept)
    q = p * q + b
    return jnp.cos(q) * p + hidden[0], p, q, kept, q, jnp.ones_like(p)


def test_states_that_hang_together_in_any_way() -> None:
    cell = jaxrnn.Cell("entangled", ("a", "b"), ("h", "p", "q", "kept", "twice", "one"), _entangled, apart=("b",))
    spec = jaxrnn.Spec(cell, INPUT, HIDDEN)
    random = np.random.RandomState(0)
    params = {name: jnp.asarray(random.randn(*shape)) for name, shape in spec.shapes().items()}
    x = jnp.asarray(random.randn(TIME, INPUT))
    hx = tuple(jnp.asarray(random.randn(1, size)) for size in spec.state_sizes())

    def ours(params: Tree, x: jax.Array, hx: tuple) -> list[jax.Array]:
        return jax.tree.leaves(jaxrnn.apply(spec, params, x, hx))

    def plain(params: Tree, x: jax.Array, hx: tuple) -> list[jax.Array]:
        w = {name.removesuffix("_l0"): value for name, value in params.items()}
        state, outputs = tuple(a[0] for a in hx), []
        for row in x:
            a_x, b_x = jnp.split(w["weight_ih"] @ row + w["bias_ih"], 2)
            a_h, b_h = jnp.split(w["weight_hh"] @ state[0] + w["bias_hh"], 2)
            h, *others = _entangled((a_x + a_h, b_x), (b_h,), state)
            state = (h, *others)
            outputs.append(h)
        return [jnp.stack(outputs), *(a[None] for a in state)]

    arguments = params, x, hx
    assert_same(ours(*arguments), plain(*arguments))
    gradients = [jax.grad(Case.loss(function), (0, 1, 2))(*arguments) for function in (ours, plain)]
    assert_same(*gradients)
    tangents = jax.tree.map(jnp.cos, arguments)
    assert_same(*[jax.jvp(function, arguments, tangents)[1] for function in (ours, plain)])


def _normalised(gates: tuple, hidden: tuple, state: tuple) -> tuple:
    """An output by c over n, both of which may be zero before the first step, and are held past the last."""
    i, f, z, o = gates
    _, c, n = state
    i, f = jnp.exp(i), jax.nn.sigmoid(f)
    c, n = f * c + i * jnp.tanh(z), f * n + i
    return jax.nn.sigmoid(o) * c / n, c, n


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_held_state_where_the_derivative_is_infinite(bidirectional: bool) -> None:
    cell = jaxrnn.Cell("normalised", ("i", "f", "z", "o"), ("h", "c", "n"), _normalised)
    spec = jaxrnn.Spec(cell, INPUT, HIDDEN, bidirectional=bidirectional)
    params = spec.init(jax.random.key(0), jnp.float64)
    x = jnp.asarray(np.random.RandomState(0).randn(TIME, 3, INPUT))

    def loss(params: Tree, x: jax.Array, lengths: list[int] | None) -> jax.Array:
        return jnp.sum(jnp.sin(jaxrnn.apply(spec, params, x, lengths=lengths)[0]))

    gradients = jax.grad(loss)(params, x, [TIME, 2, 0])
    alone = [jax.grad(loss)(params, x[:length, row : row + 1], None) for row, length in ((0, TIME), (1, 2))]
    assert_same(gradients, jax.tree.map(jnp.add, *alone))
