"""Nothing of Flax is passed over: its own lists of settings, and each one set to another value."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from comparing import assert_close
from flax import nnx
from flax_models import (
    FLAX,
    FLIP,
    F,
    H,
    Made,
    N,
    Settings,
    Theirs,
    as_ours,
    assert_equal_modules,
    assert_same,
    expression,
    make_cell,
    make_rnn,
    quietly,
)

import jaxrnn
from jaxrnn.checkpoint import CheckpointError
from jaxrnn.checkpoint.flax_cells import TABLES

pytest_plugins = "shared_fixtures"
pytestmark = pytest.mark.usefixtures("compiled_once", "standard_promotion")


def _hard(x: Any) -> Any:
    return jnp.clip(x, -1, 1)


def _doubled(*args: Any, **kwargs: Any) -> Any:
    return 2 * jax.lax.dot_general(*args, **kwargs)


def _rounded(arrays: Any, *, dtype: Any = None, inexact: bool = True) -> Any:
    return [None if array is None else jnp.asarray(jnp.round(array, 1), dtype) for array in arrays]


# Another value for each setting of a table.
_OTHER_CELL = Made(lambda library, rngs: make_cell(library, "GRUCell", rngs, {}))
_OTHER_RNN = Made(lambda library, rngs: FLAX[library].RNN(make_cell(library, "SimpleCell", rngs, {}), unroll=2))
OTHERS: Settings = {
    "cell": _OTHER_CELL,
    **dict.fromkeys(("forward_rnn", "backward_rnn"), _OTHER_RNN),
    **dict.fromkeys(("time_major", "reverse", "keep_order", "return_carry", "keep_rngs", "residual"), True),
    "merge_fn": lambda a, b: a * b,
    "unroll": 2,
    "variable_axes": {"cache": 0},
    "variable_broadcast": ("params", "cache"),
    "variable_carry": "cache",
    "split_rngs": {"params": False, "dropout": True},
    "state_axes": nnx.StateAxes({...: None}),
    "broadcast_rngs": ...,
    "rngs": Made(lambda library, rngs: nnx.Rngs(7)),
    **dict.fromkeys(("features", "in_features", "hidden_features"), 6),
    **dict.fromkeys(("dtype", "param_dtype"), jnp.bfloat16),
    **dict.fromkeys(("gate_fn", "activation_fn"), _hard),
    "carry_init": jax.nn.initializers.normal(),
    **dict.fromkeys(("kernel_init", "recurrent_kernel_init", "bias_init"), jax.nn.initializers.ones),
    **{name: {"note": 1} for name in ("kernel_metadata", "recurrent_kernel_metadata", "bias_metadata")},
    "promote_dtype": _rounded,
    "name": "encoder",
    "parent": None,
    **dict.fromkeys(("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho", "dense_i", "dense_h"), Made(lambda *_: None)),
    "use_bias": False,
    "precision": "highest",
    "dot_general": _doubled,
    "preferred_element_type": jnp.float32,
}
# Flax draws recurrent weights by a QR decomposition, which JAX 0.12 does not have in bfloat16.
HALF = {"param_dtype": jnp.bfloat16, "recurrent_kernel_init": jax.nn.initializers.normal()}
# Where it takes other changes to the cell, such as for the value of a Linear.
ELSEWHERE = {
    **{(name, "param_dtype"): (name, HALF) for name in ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell")},
    ("Linear", "in_features"): ("OptimizedLSTMCell", {"hidden_features": 6}),
    ("Linear", "out_features"): ("OptimizedLSTMCell", {"hidden_features": 6}),
    ("Linear", "kernel"): ("OptimizedLSTMCell", {"kernel_init": jax.nn.initializers.ones}),
    ("Linear", "bias"): ("OptimizedLSTMCell", {"dense_h": Made(lambda *_: None)}),
    ("Linear", "param_dtype"): ("OptimizedLSTMCell", {"param_dtype": jnp.float64}),
    ("Linear", "dtype"): ("OptimizedLSTMCell", {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}),
}


def _flipped(words: str, theirs: Theirs, ours: Callable[..., Any], keep_order: bool) -> Callable[..., Any]:
    def call(x: Any, lengths: Any) -> Any:
        names = {"lengths": lengths, "time_major": theirs.module.time_major}
        output, state = ours(expression(FLIP, words, x=x, **names), lengths=lengths)
        return theirs.valid(expression(FLIP, words, x=output, **names) if keep_order else output, lengths), state

    return call


def _steps(kind: str, act: Any, gate: Any, residual: bool) -> jaxrnn.Cell:
    """The equations of Flax's cells, with other functions."""

    def lstm(gates: Any, hidden: Any, state: Any) -> Any:
        (i, f, g, o), (_, c) = gates, state
        c = gate(f) * c + gate(i) * act(g)
        return gate(o) * act(c), c

    def gru(gates: Any, hidden: Any, state: Any) -> Any:
        (r, z, n), (h,) = gates, state
        n = act(n + gate(r) * hidden[0])
        return ((1 - gate(z)) * n + gate(z) * h,)

    def rnn(gates: Any, hidden: Any, state: Any) -> Any:
        return (act(gates[0] + (state[0] if residual else 0)),)

    if kind == "LSTM":
        return jaxrnn.Cell("own", ("i", "f", "g", "o"), ("h", "c"), lstm)
    if kind == "GRU":
        return jaxrnn.Cell("own", ("r", "z", "n"), ("h",), gru, apart=("n",))
    return jaxrnn.Cell("own", ("h",), ("h",), rnn)


def _follow(words: str, setting: str, library: str, name: str, theirs: Theirs) -> None:
    """Do what a remedy says, and check that the numbers are the same then."""
    cell = theirs.cells[0]
    if setting == "reverse":
        forward = Theirs(library, make_rnn(library, name, {"reverse": False}))
        assert_same(theirs, _flipped(words, theirs, forward.ours(), theirs.module.keep_order))
    elif setting == "residual":
        own = expression(r"jaxrnn\.Cell", words)
        dialect = expression(r"jaxrnn\.checkpoint\.dialects\.DIALECTS", words)[library, name]
        spec_cell = _steps(
            dialect.kind, cell.activation_fn, getattr(cell, "gate_fn", None), getattr(cell, "residual", False)
        )
        assert isinstance(spec_cell, own)
        tree = (
            theirs.weights["params"]["cell"]
            if library == "flax.linen"
            else nnx.to_pure_dict(nnx.state(cell, nnx.Param))
        )
        arrays = {".".join(path): array for path, array in nnx.traversals.flatten_mapping(tree).items()}
        spec = jaxrnn.Spec(spec_cell, F, H, batch_first=True)
        params = {f"{role}_l0": array for role, array in dialect.read(arrays).items()}

        assert_same(theirs, lambda x, lengths: jaxrnn.apply(spec, params, x, lengths=lengths))
    elif setting == "carry_init":
        assert re.search(r"cell\.initialize_carry .* as hx .* h before c, .* with an axis for directions first", words)
        shape = (N, F)
        first = (
            cell.initialize_carry(jax.random.key(0), shape)
            if library == "flax.linen"
            else cell.initialize_carry(shape, nnx.Rngs(0).carry)
        )
        hx = as_ours(first, [cell])
        ours = quietly(theirs.ours)
        assert_same(theirs, lambda x, lengths: ours(x, hx, lengths=lengths))
    elif setting == "merge_fn":
        plain = Theirs(library, make_rnn(library, name, {}))

        def merged(x: Any, lengths: Any) -> Any:
            output, state = plain.ours()(x, lengths=lengths)
            return expression(r"merge_fn\(.*\)", words, output=output, merge_fn=theirs.module.merge_fn), state

        assert_same(theirs, merged)
    elif setting == "precision":
        ours = quietly(theirs.ours)
        with expression(r"jax\.default_matmul_precision", words)("highest"):
            assert_same(theirs, ours)
    elif setting in ("dtype", "param_dtype"):
        dtype = jnp.dtype(re.search(r"with dtype and param_dtype (\w+)$", words)[1])
        plain = Theirs(library, make_rnn(library, _cell_of(name), {"dtype": dtype, "param_dtype": dtype}), dtype)
        assert_same(plain, plain.ours(), atol=1e-6)
    else:
        assert re.search(rf"make the cell's layers with Flax's default .*\b{setting}\b", words)
        plain = Theirs(library, make_rnn(library, _cell_of(name), {}))
        assert_same(plain, plain.ours())


def _cell_of(name: str) -> str:
    return "OptimizedLSTMCell" if name == "Linear" else name


ROWS = [(library, name, setting) for (library, name), table in TABLES.items() for setting in table]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:carry_init is provided|keep_rngs argument")
@pytest.mark.parametrize(("library", "name", "setting"), ROWS, ids=str)
def test_each_setting_with_another_value(library: str, name: str, setting: str) -> None:
    # A scan refuses a state whose dtype changes.
    with jax.disable_jit(library == "flax.linen" and setting in ("dtype", "param_dtype")):
        _check(library, name, setting)


def _check(library: str, name: str, setting: str) -> None:
    row = TABLES[library, name][setting]
    changed_in, changed = ELSEWHERE.get((name, setting), (name, None))
    theirs = Theirs(library, make_rnn(library, changed_in, changed or {setting: OTHERS[setting]}))
    if row.use == "refused":
        with pytest.raises(CheckpointError, match=f" with {setting}=.*\n{re.escape(row.words)}$"):
            theirs.ours()
    elif row.use == "warned":
        with pytest.warns(UserWarning, match=f" with {setting}=.*\n{re.escape(row.words)}$"):
            theirs.ours()
    else:
        assert_same(theirs, theirs.ours())
        if row.use == "neutral" and setting != "use_bias":  # from weights alone, too
            module = jaxrnn.from_flax(theirs.module, theirs.variables)
            assert_equal_modules(quietly(lambda: jaxrnn.from_flax(theirs.weights)), module)
        return
    _follow(row.words, setting, library, name, theirs)


def _own_list(library: str, name: str) -> set[str]:
    """The settings that a class of Flax has: its constructor's arguments, and an NNX module's attributes."""
    kind = getattr(FLAX[library], name.partition(" ")[0])
    names = inspect.signature(kind.__init__).parameters.keys() - {"self"}
    if library == "flax.nnx":
        theirs = Theirs(library, make_rnn(library, name, {}))
        cell = theirs.cells[0]
        member = getattr(theirs.module, "forward_rnn", None)
        module = next(m for m in (theirs.module, member, cell, getattr(cell, "dense_h", None)) if type(m) is kind)
        return names | {attribute for attribute in vars(module) if not attribute.startswith("_")}
    return names | {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(("library", "name"), TABLES, ids=str)
def test_the_tables_have_all_settings(library: str, name: str) -> None:
    if missing := _own_list(library, name) - TABLES[library, name].keys():
        pytest.fail(f"{library}.{name} has settings that its table has not: {sorted(missing)}")
    assert set(map(type, TABLES[library, name])) == {str}


@pytest.mark.slow
@pytest.mark.parametrize("library", FLAX)
def test_a_reversed_rnn_that_keeps_the_order(library: str) -> None:
    theirs = Theirs(library, make_rnn(library, "RNN", {"reverse": True, "keep_order": True}))
    _follow(TABLES[library, "RNN"]["reverse"].words, "reverse", library, "RNN", theirs)


@pytest.mark.parametrize("library", FLAX)
def test_other_names_of_torchs_activations(library: str) -> None:
    changed = {"activation_fn": jax.lax.tanh, "gate_fn": jax.lax.logistic}
    theirs = Theirs(library, make_rnn(library, "GRUCell", changed))
    assert_close(theirs.ours()(theirs.x), theirs(theirs.x, None), atol=1e-12)
    module = jaxrnn.from_flax(theirs.module, theirs.variables)
    assert type(module[0] if library == "flax.linen" else module).__name__ == "GRU"


def test_a_cell_alone_with_other_activations() -> None:
    """It has no class of its own here: as a layer it has."""
    cell = nnx.GRUCell(F, H, gate_fn=_hard, dtype=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(
        CheckpointError, match=r"gru_cell\(recurrent_activation=_hard\)\ngive an RNN of it, .*"
    ) as caught:
        jaxrnn.from_flax(cell)
    assert "flax.nnx.RNN(cell)" in str(caught.value)
    ours = jaxrnn.from_flax(nnx.RNN(cell))
    assert type(ours) is jaxrnn.Recurrent
    x = jnp.ones((2, 3, F), jnp.float32)
    assert_close(ours(x)[0], nnx.RNN(cell)(x), atol=1e-6)
