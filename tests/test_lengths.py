"""Rows of different lengths, and masks: each row as if alone, and padding that reaches nothing."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import named, normal, parameters
from comparing import assert_close
from flax import nnx

import jaxrnn
from jaxrnn import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH

T, N, F, H = 5, 4, 2, 4  # time, batch, input features, hidden size
ROWS = np.array([3, 5, 0, 1])
VALID = np.arange(T)[:, None] < ROWS
HOLES = np.array([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
LSTM = jaxrnn.Spec(LSTM_CELL, F, H, num_layers=2, bidirectional=True, proj_size=2)
GRU = jaxrnn.Spec(GRU_CELL, F, H, num_layers=2, bidirectional=True, batch_first=True)
ONE = jaxrnn.Spec(GRU_CELL, F, H)


class Ragged:
    """A batch of rows with padding, time first whatever the spec, given with any number in the padding.

    Without `valid` the padding is at the end of rows.
    """

    def __init__(self, spec: jaxrnn.Spec, valid: np.ndarray | None = None) -> None:
        self.spec = spec
        self.valid = VALID if valid is None else valid
        self.marks = {"lengths": ROWS} if valid is None else {"mask": self.swap(valid)}
        self.params, self.x = parameters(spec), normal(T, N, F)
        rows = spec.num_layers * spec.num_directions
        self.hx = tuple(normal(rows, N, size, seed=k) for k, size in enumerate(spec.state_sizes()))
        self._differentiate = jax.jit(self._differentiate_)
        self._alone = jax.jit(self._alone_, static_argnums=0)

    def swap(self, a: jax.Array) -> jax.Array:
        return a.swapaxes(0, 1) if self.spec.batch_first and (a.ndim == 3 or a.dtype == bool) else a

    def run(self, params: dict, x: jax.Array, hx: tuple, **arguments: Any) -> dict[str, jax.Array]:
        output, state = jaxrnn.apply(self.spec, params, self.swap(x), hx if len(hx) > 1 else hx[0], **arguments)
        return named(self.spec, (self.swap(output), state))

    def results(self, output: Any, hx: Any) -> dict[str, Any]:
        return named(self.spec, (output, hx if len(hx) > 1 else hx[0]))

    def cotangents(self) -> dict[str, np.ndarray]:
        output = normal(T, N, self.spec.output_size * self.spec.num_directions, seed=7)
        return self.results(output, tuple(map(np.cos, self.hx)))

    def _differentiate_(self, x: jax.Array, cotangents: dict) -> dict[str, Any]:
        results, pullback = jax.vjp(lambda *arguments: self.run(*arguments, **self.marks), self.params, x, self.hx)
        return _with_gradients(results, pullback(cotangents))

    def differentiate(self, padding: float, cotangent_padding: float = 0.0) -> dict[str, Any]:
        """The results and the gradients of parameters, x and hx."""
        cotangents = self.cotangents()
        x, output = (
            np.where(self.valid[..., None], a, value)
            for value, a in ((padding, self.x), (cotangent_padding, cotangents["output"]))
        )
        return self._differentiate(x, cotangents | {"output": output})

    def _alone_(self, row: int) -> dict[str, Any]:
        steps = self.valid[:, row]
        arguments = self.params, self.x[steps, row], tuple(a[:, row] for a in self.hx)
        results, pullback = jax.vjp(self.run, *jax.tree.map(jnp.asarray, arguments))
        cotangents = {name: a[steps, row] if name == "output" else a[:, row] for name, a in self.cotangents().items()}
        return _with_gradients(results, pullback(jax.tree.map(jnp.asarray, cotangents)))

    def alone(self) -> dict[str, Any]:
        """What `differentiate` should give, from each row by itself."""
        rows, params = [], jax.tree.map(np.zeros_like, self.params)
        for row, steps in enumerate(self.valid.T):
            if steps.any():
                found = self._alone(row)
                params = jax.tree.map(np.add, params, found.pop("params.grad"))
            else:  # its state comes out as it came in, and so does the state's cotangent
                output = np.zeros((0, self.spec.output_size * self.spec.num_directions))
                results = self.results(output, tuple(a[:, row] for a in self.hx))
                _, *d_states = self.cotangents().values()
                found = results | {"x.grad": np.zeros((0, F)), "hx.grad": tuple(a[:, row] for a in d_states)}
            for name in ("output", "x.grad"):
                every = np.zeros((T, found[name].shape[1]))
                every[steps] = found[name]
                found[name] = every
            rows.append(found)
        return jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *rows) | {"params.grad": params}


def _with_gradients(results: dict[str, Any], gradients: tuple) -> dict[str, Any]:
    return results | {f"{name}.grad": a for name, a in zip(("params", "x", "hx"), gradients, strict=True)}


@pytest.fixture(params=[(LSTM, None), (GRU, HOLES)], ids=["lengths", "mask"], scope="module")
def ragged(request: pytest.FixtureRequest) -> Ragged:
    return Ragged(*request.param)


def test_each_row_as_if_alone(ragged: Ragged) -> None:
    found = ragged.differentiate(7.0)
    assert_close(found, ragged.alone())
    assert all(np.abs(gradient).max() > 1e-3 for gradient in found["params.grad"].values())


KINDS = [(RNN_TANH, 0), (RNN_RELU, 0), (LSTM_CELL, 0), (LSTM_CELL, 2), (GRU_CELL, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bidirectional"), [*itertools.product(KINDS, (False, True))])
def test_each_row_as_if_alone_for_every_kind(kind: tuple, bidirectional: bool) -> None:
    (cell, proj_size), num_layers = kind, 1 + KINDS.index(kind) % 3
    valid = None if bidirectional else HOLES
    ragged = Ragged(jaxrnn.Spec(cell, F, H, num_layers, bidirectional=bidirectional, proj_size=proj_size), valid)
    assert_close(ragged.differentiate(7.0), ragged.alone())


@pytest.mark.parametrize("padding", [np.nan, np.inf, 1e308])
def test_padding_reaches_nothing(ragged: Ragged, padding: float) -> None:
    zeros = ragged.differentiate(0.0)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(zeros))
    # To the bit; and what a loss does with the outputs past the end does not come back either.
    assert_close(ragged.differentiate(padding, padding), zeros, atol=0)


@pytest.mark.parametrize("marks", [{"lengths": np.zeros(N, np.int32)}, {"mask": np.zeros((N, T), bool)}], ids=[*"lm"])
def test_a_row_without_steps_keeps_its_state(marks: dict) -> None:
    ragged = Ragged(GRU)
    found = ragged.run(ragged.params, ragged.x, ragged.hx, **marks)
    assert_close(found, ragged.results(np.zeros_like(found["output"]), ragged.hx), atol=0)


@pytest.mark.parametrize("valid", [None, HOLES], ids=["lengths", "mask"])
def test_a_state_that_no_step_reads_reaches_nothing(valid: np.ndarray | None) -> None:
    """NaN in the hx of a row without steps."""
    ragged, empty = Ragged(jaxrnn.Spec(LSTM_CELL, F, H, bidirectional=True), valid), ~VALID.any(axis=0)

    def run(params: dict, odd: float) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        hx = tuple(jnp.where(empty[:, None], odd, a) for a in ragged.hx)
        found = ragged.run(params, ragged.x, hx, **ragged.marks)
        return found, {name: a[:, ~empty] for name, a in found.items()}

    def differentiate(odd: float) -> Any:
        rows, pullback, found = jax.vjp(lambda params: run(params, odd)[::-1], ragged.params, has_aux=True)
        return rows, pullback(jax.tree.map(jnp.cos, rows)), found

    *found, (every) = jax.jit(differentiate)(jnp.nan)
    assert_close(tuple(found), jax.jit(differentiate)(0.0)[:2], atol=1e-15)
    for name, a in every.items():
        assert np.all(np.isnan(a[:, empty])) or name == "output", name
    assert np.all(every["output"][:, empty] == 0)


@pytest.mark.parametrize("marks", ["lengths", "mask"])
@pytest.mark.parametrize("spec", [ONE, jaxrnn.Spec(LSTM_CELL, F, H, num_layers=2)], ids=str)
def test_a_reset_in_the_padding_reaches_nothing(spec: jaxrnn.Spec, marks: str) -> None:
    params, x, reset = parameters(spec), normal(T, N, F), np.arange(T)[:, None] >= np.array([3, 4, 0, 2])
    valid = VALID if marks == "lengths" else HOLES
    given = {"lengths": ROWS} if marks == "lengths" else {"mask": HOLES}
    inside = reset & valid
    assert inside.any()
    assert not np.array_equal(inside, reset)

    @jax.jit
    def differentiate(odd: float, reset: np.ndarray) -> Any:
        # Of the rows that are reset past their ends alone.
        state = [jnp.where(np.any(inside, axis=0)[:, None], normal(1, H), odd) for _ in spec.cell.states]
        whole = tuple(jnp.broadcast_to(a, (spec.num_layers, N, H)) for a in state)
        resets = {"reset": reset, "reset_state": whole if len(whole) > 1 else whole[0]}

        def loss(params: dict) -> jax.Array:
            return jnp.sum(jnp.sin(jaxrnn.apply(spec, params, x, **given, **resets)[0]))

        return jax.value_and_grad(loss)(params)

    assert_close(differentiate(jnp.nan, reset), differentiate(0.0, inside), atol=1e-15)


def test_the_states_of_every_step() -> None:
    """In padding they are held, and the gates are 0."""
    hx = normal(1, N, H)
    inside = jaxrnn.trajectory(ONE, parameters(ONE), normal(T, N, F), hx, mask=HOLES)
    states, gates = np.asarray(inside.states["h"][0]), np.stack([a[0] for a in inside.gates.values()])
    before = np.concatenate([hx, states[:-1]])
    assert_close({"held": states[~HOLES]}, {"held": before[~HOLES]}, atol=0)
    assert_close({"gates": gates[:, ~HOLES]}, {"gates": np.zeros_like(gates[:, ~HOLES])}, atol=0)
    assert np.all(states[HOLES] != before[HOLES])
    assert np.all(gates[:, HOLES] != 0)


@pytest.mark.torch
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_mask_is_torchs_packed_rows(torch: Any, batch_first: bool) -> None:
    """The valid steps of each row, packed."""
    spec = jaxrnn.Spec(LSTM_CELL, F, H, num_layers=2, bidirectional=True, batch_first=batch_first)
    valid, x = HOLES[:, [0, 1, 3]], normal(T, 3, F)
    module = torch.nn.LSTM(F, H, 2, bidirectional=True, dtype=torch.float64)
    module.load_state_dict(jax.tree.map(torch.tensor, parameters(spec)))
    rows = [torch.tensor(x[steps, row]) for row, steps in enumerate(valid.T)]
    packed, state = module(torch.nn.utils.rnn.pack_sequence(rows, enforce_sorted=False))
    output = np.zeros((T, 3, 2 * H))
    for row, one in enumerate(torch.nn.utils.rnn.unpack_sequence(packed)):
        output[valid[:, row], row] = one.detach().numpy()
    first = (lambda a: a.swapaxes(0, 1)) if batch_first else (lambda a: a)
    found = jaxrnn.apply(spec, parameters(spec), first(x), mask=first(valid))
    expected = first(output), tuple(a.detach().numpy() for a in state)
    assert_close(named(spec, found), named(spec, expected), atol=1e-12)


def test_a_mask_of_whole_ends_is_lengths(ragged: Ragged) -> None:
    """To the bit; and of a mask with lengths, what both allow is valid."""
    arguments, time = (ragged.params, ragged.x, ragged.hx), np.arange(T)[:, None]
    found = ragged.run(*arguments, mask=ragged.swap(VALID))
    assert_close(found, ragged.run(*arguments, lengths=ROWS), atol=0)
    both = ragged.run(*arguments, mask=ragged.swap(HOLES), lengths=np.array([2, 4, 5, 5]))
    valid = HOLES & (time < np.array([2, 4, 5, 5]))
    assert_close(both, ragged.run(*arguments, mask=ragged.swap(valid)), atol=0)


def test_a_mask_of_packed_rows() -> None:
    """Laid out like the data."""
    rows = [normal(n, F, seed=n) for n in (2, 5, 3)]
    masks = [np.arange(len(row)) != 1 for row in rows]
    params = parameters(GRU)
    packed = jaxrnn.pack_sequence(rows, enforce_sorted=False)
    mask = jaxrnn.pack_sequence(masks, enforce_sorted=False).data
    output, h_n = jaxrnn.apply(GRU, params, packed, mask=mask)
    x, valid = jaxrnn.pad_sequence(rows, batch_first=True), jaxrnn.pad_sequence(masks, batch_first=True)
    expected, state = jaxrnn.apply(GRU, params, x, mask=valid)
    padded, _ = jaxrnn.pad_packed_sequence(output, batch_first=True)
    assert_close((padded, h_n), (expected, state), atol=1e-15)


def test_a_mask_of_modules() -> None:
    x, mask = normal(N, T, F), HOLES.T
    ours, linen = jaxrnn.GRU(F, H, batch_first=True, rngs=nnx.Rngs(0)), jaxrnn.linen.GRU(F, H, batch_first=True)
    x = x.astype(np.float32)
    params = nnx.to_pure_dict(nnx.state(ours, nnx.Param))
    expected = jaxrnn.apply(ours.spec, params, x, mask=mask)
    assert_close(ours(x, mask=mask), expected, atol=0)
    assert_close(linen.apply({"params": params}, x, mask=mask), expected, atol=0)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (HOLES.T, RuntimeError, r"mask should have the shape of x without its features, \(5, 4\), got \(4, 5\)"),
        (HOLES[..., None], RuntimeError, r"mask should have the shape of x without its features"),
        (HOLES.astype(np.int32), TypeError, "mask should be boolean, True at valid steps, got int32"),
    ],
)
def test_bad_masks(mask: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        jaxrnn.apply(ONE, parameters(ONE), normal(T, N, F), mask=mask)


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
