"""Rows of different lengths: each row as if alone, and padding that reaches nothing."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import named, normal, parameters
from comparing import assert_close

import jaxrnn
from jaxrnn import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH

T, N, F, H = 5, 4, 2, 4  # time, batch, input features, hidden size
ROWS = np.array([3, 5, 0, 1])
PADDING = np.arange(T)[:, None] >= ROWS
LSTM = jaxrnn.Spec(LSTM_CELL, F, H, num_layers=2, bidirectional=True, proj_size=2)
GRU = jaxrnn.Spec(GRU_CELL, F, H, num_layers=2, bidirectional=True, batch_first=True)
ONE = jaxrnn.Spec(GRU_CELL, F, H)


class Ragged:
    """A batch of rows of different lengths, time first whatever the spec, given with any number in the padding."""

    def __init__(self, spec: jaxrnn.Spec) -> None:
        self.spec = spec
        self.params, self.x = parameters(spec), normal(T, N, F)
        rows = spec.num_layers * spec.num_directions
        self.hx = tuple(normal(rows, N, size, seed=k) for k, size in enumerate(spec.state_sizes()))
        self._differentiate = jax.jit(self._differentiate_)
        self._alone = jax.jit(self._alone_, static_argnums=0)

    def swap(self, a: jax.Array) -> jax.Array:
        return a.swapaxes(0, 1) if self.spec.batch_first and a.ndim == 3 else a

    def run(self, params: dict, x: jax.Array, hx: tuple, **arguments: Any) -> dict[str, jax.Array]:
        output, state = jaxrnn.apply(self.spec, params, self.swap(x), hx if len(hx) > 1 else hx[0], **arguments)
        return named(self.spec, (self.swap(output), state))

    def results(self, output: Any, hx: Any) -> dict[str, Any]:
        return named(self.spec, (output, hx if len(hx) > 1 else hx[0]))

    def cotangents(self) -> dict[str, np.ndarray]:
        output = normal(T, N, self.spec.output_size * self.spec.num_directions, seed=7)
        return self.results(output, tuple(map(np.cos, self.hx)))

    def _differentiate_(self, x: jax.Array, cotangents: dict) -> dict[str, Any]:
        results, pullback = jax.vjp(lambda *arguments: self.run(*arguments, lengths=ROWS), self.params, x, self.hx)
        return _with_gradients(results, pullback(cotangents))

    def differentiate(self, padding: float, cotangent_padding: float = 0.0) -> dict[str, Any]:
        """The results and the gradients of parameters, x and hx."""
        cotangents = self.cotangents()
        x, output = (
            np.where(PADDING[..., None], value, a)
            for value, a in ((padding, self.x), (cotangent_padding, cotangents["output"]))
        )
        return self._differentiate(x, cotangents | {"output": output})

    def _alone_(self, row: int) -> dict[str, Any]:
        length = ROWS[row]
        arguments = self.params, self.x[:length, row], tuple(a[:, row] for a in self.hx)
        results, pullback = jax.vjp(self.run, *jax.tree.map(jnp.asarray, arguments))
        cotangents = {name: a[:length, row] if name == "output" else a[:, row] for name, a in self.cotangents().items()}
        return _with_gradients(results, pullback(jax.tree.map(jnp.asarray, cotangents)))

    def alone(self) -> dict[str, Any]:
        """What `differentiate` should give, from each row by itself."""
        rows, params = [], jax.tree.map(np.zeros_like, self.params)
        for row, length in enumerate(ROWS):
            if length:
                found = self._alone(row)
                params = jax.tree.map(np.add, params, found.pop("params.grad"))
            else:  # its state comes out as it came in, and so does the state's cotangent
                output = np.zeros((0, self.spec.output_size * self.spec.num_directions))
                results = self.results(output, tuple(a[:, row] for a in self.hx))
                _, *d_states = self.cotangents().values()
                found = results | {"x.grad": np.zeros((0, F)), "hx.grad": tuple(a[:, row] for a in d_states)}
            for name in ("output", "x.grad"):
                found[name] = np.pad(found[name], ((0, T - length), (0, 0)))
            rows.append(found)
        return jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *rows) | {"params.grad": params}


def _with_gradients(results: dict[str, Any], gradients: tuple) -> dict[str, Any]:
    return results | {f"{name}.grad": a for name, a in zip(("params", "x", "hx"), gradients, strict=True)}


@pytest.fixture(params=[LSTM, GRU], ids=["LSTM", "GRU"], scope="module")
def ragged(request: pytest.FixtureRequest) -> Ragged:
    return Ragged(request.param)


def test_each_row_as_if_alone(ragged: Ragged) -> None:
    found = ragged.differentiate(7.0)
    assert_close(found, ragged.alone())
    assert all(np.abs(gradient).max() > 1e-3 for gradient in found["params.grad"].values())


KINDS = [(RNN_TANH, 0), (RNN_RELU, 0), (LSTM_CELL, 0), (LSTM_CELL, 2), (GRU_CELL, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bidirectional"), [*itertools.product(KINDS, (False, True))])
def test_each_row_as_if_alone_for_every_kind(kind: tuple, bidirectional: bool) -> None:
    (cell, proj_size), num_layers = kind, 1 + KINDS.index(kind) % 3
    ragged = Ragged(jaxrnn.Spec(cell, F, H, num_layers, bidirectional=bidirectional, proj_size=proj_size))
    assert_close(ragged.differentiate(7.0), ragged.alone())


@pytest.mark.parametrize("padding", [np.nan, np.inf, 1e308])
def test_padding_reaches_nothing(ragged: Ragged, padding: float) -> None:
    zeros = ragged.differentiate(0.0)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(zeros))
    # To the bit; and what a loss does with the outputs past the end does not come back either.
    assert_close(ragged.differentiate(padding, padding), zeros, atol=0)


def test_a_row_of_length_0_keeps_its_state(ragged: Ragged) -> None:
    found = ragged.run(ragged.params, ragged.x, ragged.hx, lengths=np.zeros(N, np.int32))
    assert_close(found, ragged.results(np.zeros_like(found["output"]), ragged.hx), atol=0)


def test_a_state_that_no_step_reads_reaches_nothing() -> None:
    """NaN in the hx of a row of length 0."""
    ragged, empty = Ragged(jaxrnn.Spec(LSTM_CELL, F, H, bidirectional=True)), ROWS == 0

    def run(params: dict, odd: float) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        hx = tuple(jnp.where(empty[:, None], odd, a) for a in ragged.hx)
        found = ragged.run(params, ragged.x, hx, lengths=ROWS)
        return found, {name: a[:, ~empty] for name, a in found.items()}

    def differentiate(odd: float) -> Any:
        rows, pullback, found = jax.vjp(lambda params: run(params, odd)[::-1], ragged.params, has_aux=True)
        return rows, pullback(jax.tree.map(jnp.cos, rows)), found

    *found, (every) = jax.jit(differentiate)(jnp.nan)
    assert_close(tuple(found), jax.jit(differentiate)(0.0)[:2], atol=1e-15)
    for name, a in every.items():
        assert np.all(np.isnan(a[:, empty])) or name == "output", name
    assert np.all(every["output"][:, empty] == 0)


@pytest.mark.parametrize("spec", [ONE, jaxrnn.Spec(LSTM_CELL, F, H, num_layers=2)], ids=str)
def test_a_reset_past_the_end_reaches_nothing(spec: jaxrnn.Spec) -> None:
    params, x, reset = parameters(spec), normal(T, N, F), np.arange(T)[:, None] >= np.array([3, 4, 0, 2])
    inside = reset & ~PADDING
    assert inside.any()

    @jax.jit
    def differentiate(odd: float, reset: np.ndarray) -> Any:
        # Of the rows that are reset past their ends alone.
        state = [jnp.where(np.any(inside, axis=0)[:, None], normal(1, H), odd) for _ in spec.cell.states]
        whole = tuple(jnp.broadcast_to(a, (spec.num_layers, N, H)) for a in state)
        given = {"lengths": ROWS, "reset": reset, "reset_state": whole if len(whole) > 1 else whole[0]}
        return jax.value_and_grad(lambda params: jnp.sum(jnp.sin(jaxrnn.apply(spec, params, x, **given)[0])))(params)

    assert_close(differentiate(jnp.nan, reset), differentiate(0.0, inside), atol=1e-15)


def test_the_states_of_every_step_of_a_row_of_length_0() -> None:
    hx = normal(1, N, H)
    inside = jaxrnn.trajectory(ONE, parameters(ONE), normal(T, N, F), hx, lengths=ROWS)
    assert_close(inside.states["h"][:, :, 2], np.broadcast_to(hx[:, None, 2], (1, T, H)), atol=0)


@pytest.mark.parametrize("through", [jax.jit, jax.vmap], ids=lambda transform: transform.__name__)
def test_lists_of_traced_numbers(through: Any) -> None:
    """As of a batch that goes through jit as it is."""
    params, x = parameters(ONE), normal(2, T, 3, F)
    lengths, reset = [[1, 3, 5], [0, 2, 4]], normal(2, T, 3) > 1

    def run(x: Any, lengths: Any, reset: Any) -> Any:
        return jaxrnn.apply(ONE, params, x, lengths=lengths, reset=reset)

    expected = [run(x[k], lengths[k], reset[k]) for k in range(2)]
    if through is jax.jit:
        assert_close(jax.jit(run)(x[0], lengths[0], reset[0].tolist()), expected[0], atol=1e-15)
        assert_close(jax.jit(run)(x[0], tuple(lengths[0]), [list(row) for row in reset[0]]), expected[0], atol=1e-15)
        return
    rows = jnp.array(lengths).T
    steps = jnp.moveaxis(jnp.array(reset), 0, -1)
    found = jax.vmap(lambda x, a, b: run(x, list(a), [list(row) for row in b]), (0, 1, 2))(x, rows, steps)
    assert_close(found, jax.tree.map(lambda *a: np.stack(a), *expected), atol=1e-15)


def test_whole_lengths_are_no_lengths(ragged: Ragged) -> None:
    whole = ragged.run(ragged.params, ragged.x, ragged.hx, lengths=[T] * N)
    assert_close(whole, ragged.run(ragged.params, ragged.x, ragged.hx), atol=1e-15)


def test_unbatched() -> None:
    x = normal(T, F)
    x[3:] = np.nan
    output, h_n = jaxrnn.apply(ONE, parameters(ONE), x, lengths=3)
    expected, h = jaxrnn.apply(ONE, parameters(ONE), x[:3])
    assert_close((output[:3], output[3:], h_n), (expected, np.zeros((2, H)), h), atol=1e-15)


def test_one_trace_for_all_lengths() -> None:
    traces = []

    def step(gates: tuple, hidden: tuple, state: tuple) -> tuple:
        traces.append(gates[0].shape)
        return (jnp.tanh(gates[0]),)

    spec = jaxrnn.Spec(jaxrnn.Cell("counted", ("h",), ("h",), step), F, H)
    params, x = parameters(spec), normal(T, 3, F)
    rows = [np.array([k % (T + 1), (k + 2) % (T + 1), T]) for k in range(10)]
    jitted = jax.jit(lambda lengths: jaxrnn.apply(spec, params, x, lengths=lengths)[1])
    last = [jitted(lengths) for lengths in rows]
    under_jit = len(traces)
    assert len({np.asarray(a).tobytes() for a in last}) > 4
    jaxrnn.apply(spec, params, x, lengths=rows[0])
    once = len(traces)
    for lengths in rows:
        jitted(lengths)
        jaxrnn.apply(spec, params, x, lengths=lengths)
    assert under_jit
    assert len(traces) == once


def test_out_of_range_under_jit_counts_as_the_nearest() -> None:
    run = jax.jit(lambda lengths: jaxrnn.apply(ONE, parameters(ONE), normal(T, 3, F), lengths=lengths))
    assert_close(run(np.array([-3, 2, 99])), run(np.array([0, 2, T])), atol=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_any_integer_dtype(dtype: type) -> None:
    x = normal(300, 1, F)  # more steps than a uint8 counts
    output, _ = jaxrnn.apply(ONE, parameters(ONE), x, lengths=np.array([250], dtype))
    assert np.all(np.any(np.asarray(output)[:, 0] != 0, axis=1) == (np.arange(300) < 250))


def test_vmap() -> None:
    x, lengths = normal(2, T, 3, F), np.array([[1, 2, 3], [5, 0, 4]])

    @jax.jit
    def run(x: Any, lengths: Any) -> Any:
        return jaxrnn.apply(ONE, parameters(ONE), x, lengths=lengths)

    together = jax.vmap(run)(x, lengths)
    assert_close(together, jax.tree.map(lambda *a: np.stack(a), *(run(x[k], lengths[k]) for k in range(2))), atol=1e-15)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([1, 2], RuntimeError, r"lengths should have shape \(3,\), one for each row of x, got \(2,\)"),
        (3, RuntimeError, r"lengths should have shape \(3,\)"),
        ([1.0, 2.0, 3.0], TypeError, "lengths should be integers, got float64"),
        ([True, True, True], TypeError, "lengths should be integers, got bool"),
        ([1, T + 1, 2], ValueError, r"lengths should be from 0 to 5, the time steps of x, got \[1, 6, 2\]"),
        (jnp.array([1, 9, 2]), ValueError, r"from 0 to 5, the time steps of x, got \[1, 9, 2\]"),
        ([1, -1, 2], ValueError, r"from 0 to 5, the time steps of x, got \[1, -1, 2\]"),
    ],
)
def test_bad_lengths(lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        jaxrnn.apply(ONE, parameters(ONE), normal(T, 3, F), lengths=lengths)
