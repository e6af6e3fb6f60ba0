"""Planted faults: each turns a comparison red, and is found where it is, by its name."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close

import jaxrnn
from jaxrnn._core import recurrence, steps
from jaxrnn.cells import sigmoid
from jaxrnn.nnx import base, cells, layers
from parity import __main__ as runner
from parity import oracle, sides
from parity.cases import CASES, Case, NamedArrays
from parity.compare import LARGEST, compare
from parity.locate import Place, locate
from parity.reference import Recorded, truth_of

RECORDED = Recorded()
GRU = CASES["GRU-layers2-bidirectional-hx"]
LSTM = CASES["LSTM-layers2-bidirectional-hx"]
RAGGED = CASES["LSTM-layers2-bidirectional-batch_first-hx-lengths-unsorted"]
MASKED = CASES["RNN_TANH-layers2-bidirectional-batch_first-hx-mask"]
RNN = CASES["RNN_TANH-layers2-hx"]
# One layer compiles in half the time.
GRU_1, LSTM_1 = CASES["GRU-layers1-bidirectional-hx"], CASES["LSTM-layers1-bidirectional-hx"]
RAGGED_1 = CASES["LSTM-layers1-bidirectional-hx-lengths-unsorted"]


# Puts a fault in place, and tells whether programs that are compiled already would not notice.
Plant = Callable[[pytest.MonkeyPatch], bool]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Plant], None]]:
    """A function that plants a fault for one test, and has everything compiled anew where that takes it."""
    forgotten = []

    def forget() -> None:
        sides._differentiate.cache_clear()
        jax.clear_caches()

    def plant(fault: Plant) -> None:
        if fault(monkeypatch):
            forget()
            forgotten.append(fault)

    yield plant
    monkeypatch.undo()
    if forgotten:
        forget()


def _cell(cell: jaxrnn.Cell, step: Callable) -> Plant:
    """Another step for a cell, which the modules look up by name: another cell has other programs."""

    def plant(patch: pytest.MonkeyPatch) -> bool:
        for module in (layers, cells):
            patch.setattr(module, f"{cell.name}_CELL", dataclasses.replace(cell, step=step))
        return False

    return plant


def _function(module: Any, name: str, wrap: Callable) -> Plant:
    """A function of jaxrnn's in another form."""

    def plant(patch: pytest.MonkeyPatch) -> bool:
        patch.setattr(module, name, wrap(getattr(module, name)))
        return True

    return plant


def _results(change: Callable[[Case, NamedArrays], None]) -> Plant:
    """A change of what jaxrnn returned."""

    def plant(patch: pytest.MonkeyPatch) -> bool:
        run = sides.run_jaxrnn

        def changed(case: Case, dtype: str) -> NamedArrays:
            arrays = {name: array.copy() for name, array in run(case, dtype).items()}
            change(case, arrays)
            return arrays

        patch.setattr(sides, "run_jaxrnn", changed)
        return False

    return plant


def _swapped(gates: tuple, hidden: tuple, state: tuple) -> tuple:
    i, f, g, o = gates
    return jaxrnn.LSTM_CELL.step((f, i, g, o), hidden, state)


def _wrong_sign(gates: tuple, hidden: tuple, state: tuple) -> tuple:
    r, z, n = gates
    n = jnp.tanh(n + sigmoid(r) * hidden[0])
    return ((n - state[0]) * sigmoid(z) + state[0],)


def _stale(gates: tuple, hidden: tuple, state: tuple) -> tuple:
    return jaxrnn.LSTM_CELL.step(gates, hidden, state)[0], state[1]


def _no_b_hn(lay_out: Callable) -> Callable:
    def laid_out(settings: Any, weights: Any) -> Any:
        laid = lay_out(settings, weights)
        bias = laid.recurrent.bias
        return laid._replace(recurrent=laid.recurrent._replace(bias=bias.at[-bias.size // 3 :].set(0)))

    return laid_out


def _folded(lay_out: Callable) -> Callable:
    def laid_out(settings: Any, weights: Any) -> Any:
        b_hn = lay_out(settings, weights).recurrent.bias
        laid = _no_b_hn(lay_out)(settings, weights)
        n = slice(-b_hn.size // 3, None)
        return laid._replace(bias_ih=laid.bias_ih.at[n].add(b_hn[n]))

    return laid_out


def _transposed(lay_out: Callable) -> Callable:
    def laid_out(settings: Any, weights: Any) -> Any:
        laid = lay_out(settings, weights)
        return laid._replace(recurrent=laid.recurrent._replace(weight_hh=laid.recurrent.weight_hh.T))

    return laid_out


def _unmarked(reverse: bool) -> Callable:
    def wrap(advance: Callable) -> Callable:
        def advanced(run: steps.Run, gates: Any, marks: steps.Marks, state: Any) -> Any:
            if run.settings.reverse == reverse:
                marks = marks._replace(ended=None, skipped=None)
            return advance(run, gates, marks, state)

        return advanced

    return wrap


def _tf32(product: Callable) -> Callable:
    def rounded(array: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(array, 8, 10) if array.dtype == jnp.float32 else array

    return lambda settings, a, weight, contract=0: product(settings, rounded(a), rounded(weight), contract)


def _shorter(apply: Callable) -> Callable:
    return lambda *a, lengths=None, **k: apply(*a, lengths=None if lengths is None else lengths - 1, **k)


def _ignored(apply: Callable) -> Callable:
    return lambda *a, mask=None, **k: apply(*a, **k)


def _zeroed(advance: Callable) -> Callable:
    def advanced(run: steps.Run, gates: Any, marks: steps.Marks, state: Any) -> Any:
        after, sums = advance(run, gates, marks, state)
        return steps.zero_if_held(marks, after), sums

    return advanced


def _h_n_order(case: Case, arrays: NamedArrays) -> None:
    if case.arguments["num_layers"] == 2:
        arrays["h_n"] = arrays["h_n"][[0, 2, 1, 3]]


def _dropped(case: Case, arrays: NamedArrays) -> None:
    keep = np.random.RandomState(0).random_sample(arrays["output"].shape) < 0.5
    arrays["output"] = arrays["output"] * keep * 2


BOTH = ("forward", "backward")
# What is planted, in which case, where it has to be found, and what in the cause tells it.
FAULTS: dict[str, tuple[Plant, Case, dict[str, Any], str]] = {
    "swap two gates": (
        _cell(jaxrnn.LSTM_CELL, _swapped),
        LSTM,
        {"layer": 0, "directions": BOTH, "step": 0, "gates": ("i", "f")},
        "the gates i and f are exchanged",
    ),
    "drop b_hn": (
        _function(recurrence, "_laid_out", _no_b_hn),
        GRU_1,
        {"layer": 0, "directions": BOTH, "step": 0, "gates": ("n",)},
        "b_hn is missing",
    ),
    "fold the biases": (
        _function(recurrence, "_laid_out", _folded),
        GRU,
        {"layer": 0, "directions": BOTH, "step": 0, "gates": ("n",)},
        "the biases are folded",
    ),
    "forget the reverse start": (
        _function(steps, "advance", _unmarked(True)),
        RAGGED_1,
        {"layer": 0, "directions": ("backward",), "gates": ()},
        "the backward direction does not start",
    ),
    "leak padding": (
        _function(steps, "advance", _unmarked(False)),
        RAGGED,
        {"layer": None, "arrays": ("h_n", "c_n")},  # the outputs past the end are zeros all the same
        "padding leaks",
    ),
    "transpose W_hh of a square layer": (
        _function(recurrence, "_laid_out", _transposed),
        RNN,
        {"layer": 0, "directions": ("forward",), "step": 0},
        "W_hh is transposed",
    ),
    "wrong h_n order": (
        _results(_h_n_order),
        GRU,
        {"layer": None, "arrays": ("h_n",)},
        "h_n is ordered by direction",
    ),
    "dropout on the last layer": (
        _results(_dropped),
        GRU,
        {"layer": 0, "gates": (), "arrays": ("output",)},
        "the last layer's output goes through dropout",
    ),
    "TF32-like products": (
        _function(steps, "product", _tf32),
        LSTM_1,
        {"layer": 0, "directions": BOTH, "step": 0},
        "TF32",
    ),
    "off-by-one length": (
        _function(base, "call", _shorter),
        RAGGED,
        {"layer": 0, "gates": ()},
        "lengths are one too short",
    ),
    "ignore the mask": (
        _function(base, "call", _ignored),
        MASKED,
        {"layer": 0, "directions": BOTH},
        "the mask is ignored",
    ),
    "forget the mask backward": (
        _function(steps, "advance", _unmarked(True)),
        MASKED,
        {"layer": 0, "directions": ("backward",)},
        "the backward direction does not start",
    ),
    "zero the state at masked steps": (
        _function(steps, "advance", _zeroed),
        MASKED,
        {"layer": 0, "directions": BOTH},
        "the state becomes 0 at masked steps",
    ),
    "wrong sign in the GRU": (
        _cell(jaxrnn.GRU_CELL, _wrong_sign),
        GRU,
        {"layer": 0, "directions": BOTH, "step": 0, "gates": ("z",)},
        "z is taken the other way round",
    ),
    "stale carry": (
        _cell(jaxrnn.LSTM_CELL, _stale),
        LSTM,
        {"layer": 0, "directions": BOTH, "step": 1},
        "c is not kept from step to step",
    ),
}


QUICK = ("drop b_hn", "forget the reverse start", "wrong h_n order", "TF32-like products")


@pytest.mark.parametrize("fault", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAULTS])
def test_a_planted_fault_is_red_and_located(fault: str, plant: Callable[[Plant], None]) -> None:
    planted, case, where, cause = FAULTS[fault]
    plant(planted)
    dtype = "float32" if "TF32" in fault else "float64"
    side = sides.run_jaxrnn
    assert compare(case, RECORDED(case), side, [dtype]).failure()
    place = locate(case, side, dtype)
    assert {name: getattr(place, name) for name in where} == where
    assert cause in place.cause
    assert cause in str(place)


@pytest.mark.slow
def test_a_fault_in_a_second_layer_and_one_that_nobody_knows(plant: Callable[[Plant], None]) -> None:
    def change(case: Case, arrays: NamedArrays) -> None:
        if case.arguments["num_layers"] == 2:
            arrays["output"][3, :, -1] += 0.1  # the backward half

    plant(_results(change))
    place = locate(GRU, sides.run_jaxrnn)
    assert place == Place(1, ("backward",), 3, (), "", ("output",))
    assert str(place) == "first off at layer 1, backward direction, step 3; no known mistake"


def test_cells(plant: Callable[[Plant], None]) -> None:
    plant(_cell(jaxrnn.GRU_CELL, _wrong_sign))
    place = locate(CASES["GRUCell-hx"], sides.run_jaxrnn)
    assert (place.layer, place.gates, place.arrays) == (None, ("z",), ("h_n",))
    assert str(place) == "first off at gate z; it looks as if z is taken the other way round: h' = (h - n) * z + n"


@pytest.mark.parametrize("case", [GRU, CASES["GRUCell-hx"]], ids=lambda case: case.name)
def test_what_is_off_in_gradients_only(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    cell = case.steps is None

    def change(case: Case, arrays: NamedArrays) -> None:
        for name in ("weight_hh.grad",) if cell else ("weight_ih_l0.grad", "weight_hh_l1_reverse.grad"):
            arrays[name][4:8] *= 1.01  # the rows of z

    def change_all(case: Case, arrays: NamedArrays) -> None:
        arrays["input.grad"] *= 1.01

    truth = truth_of(case, RECORDED(case))
    with monkeypatch.context() as patch:
        _results(change)(patch)
        place = locate(case, sides.run_jaxrnn, gradients=truth)
        assert place.gates == ("z",)
        name = "weight_hh.grad" if cell else "weight_hh_l1_reverse.grad"
        where = "gate z" if cell else "layer 1, backward direction, gate z"
        assert str(place) == f"first off at {where}, only {name}; no known mistake"
        assert str(locate(case, sides.run_jaxrnn)).startswith("first off at only the gradients")
    _results(change_all)(monkeypatch)
    assert "first off at only input.grad" in str(locate(case, sides.run_jaxrnn, gradients=truth))


@pytest.mark.parametrize(
    "case", [*[case for case in CASES.values() if case.small and case.way != "chunked"][::11], MASKED]
)
def test_the_oracle_is_torchs(case: Case) -> None:
    parameters, inputs, _ = case.arrays()
    found, truth = oracle.run(case, (parameters, inputs)), truth_of(case, RECORDED(case))
    assert truth is not None
    for name, array in truth.items():
        if "." not in name:
            assert_close({name: found[name]}, {name: array}, atol=1e-14)


@pytest.mark.parametrize("case", [GRU, LSTM, RAGGED, MASKED, RNN, CASES["LSTMCell-hx"]], ids=lambda case: case.name)
def test_every_known_mistake_is_another(case: Case) -> None:
    arrays = case.arrays()[:2]
    known = [oracle.NONE, *oracle.mistakes(case)]
    assert len(known) > 3
    results = [oracle.run(case, arrays, mistake) for mistake in known]
    names = [name for name in results[0] if name != "layers"]
    for (one, a), (other, b) in itertools.combinations(zip(known, results, strict=True), 2):
        apart = max(np.max(np.abs(a[name] - b[name])) for name in names)
        assert apart > LARGEST["float64"], (one.cause, other.cause)


@pytest.mark.parametrize("mistake", [*oracle.mistakes(MASKED)], ids=lambda mistake: mistake.what)
def test_a_mistake_with_a_mask_is_recognised(mistake: oracle.Mistake) -> None:
    place = locate(MASKED, lambda case, dtype: oracle.run(case, case.arrays()[:2], mistake))
    assert place.cause == mistake.cause
    assert (place.layer == 0) == (mistake.what != "h_n order")


def test_the_runner_says_where(plant: Callable[[Plant], None], capsys: pytest.CaptureFixture[str]) -> None:
    plant(_function(recurrence, "_laid_out", _transposed))
    assert runner.main(["--filter", "RNN_TANH-layers1-hx-lengths", "--dtype", "float64"]) == 1
    printed = capsys.readouterr().out
    assert "WHERE RNN_TANH-layers1-hx-lengths-unsorted: first off at layer 0, forward direction, step 0" in printed
    assert "it looks as if W_hh is transposed" in printed
