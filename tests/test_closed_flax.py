"""Nothing of Flax is passed over: its own lists of settings, and each one set to another value."""

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import normal
from comparing import assert_close
from flax import linen, nnx
from making import filled, filled_variables

import jaxrnn
from jaxrnn.checkpoint import CheckpointError, find_rnns
from jaxrnn.checkpoint.dialects import DIALECTS
from jaxrnn.checkpoint.flax_cells import TABLES, with_torchs_names

pytest_plugins = "compiling"
pytestmark = pytest.mark.usefixtures("compiled_once")
F, H, T, N = 5, 4, 2, 3
LENGTHS = jnp.array([1, 2, 2])
FLAX = {"flax.linen": linen, "flax.nnx": nnx}
Settings = dict[str, Any]


@pytest.fixture(autouse=True)
def _the_promotion_that_flax_needs() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield


@dataclasses.dataclass
class Made:
    """A value of a setting that is made anew for each module."""

    make: Callable[[str, nnx.Rngs], Any]


def _make(library: str, name: str, changed: Settings) -> Callable[[nnx.Rngs], Any]:
    """A function that makes an RNN or a Bidirectional, in which the class of a table has changed settings."""
    flax, is_cell = FLAX[library], (library, name) in DIALECTS

    def resolved(rngs: nnx.Rngs) -> Settings:
        return {key: value.make(library, rngs) if isinstance(value, Made) else value for key, value in changed.items()}

    def cell(rngs: nnx.Rngs) -> Any:
        kind = name if is_cell else "OptimizedLSTMCell" if name == "Linear" else "SimpleCell"
        made = _cell(library, kind, rngs, resolved(rngs) if is_cell else {})
        if name == "Linear":
            settings = {"in_features": H, "out_features": 4 * H, "dtype": jnp.float64, "param_dtype": jnp.float64}
            made.dense_h = nnx.Linear(**{**settings, "rngs": rngs, **resolved(rngs)})
        return made

    def make(rngs: nnx.Rngs) -> Any:
        if name.startswith("RNN in"):
            return flax.Bidirectional(*(flax.RNN(**{"cell": cell(rngs), **resolved(rngs)}) for _ in range(2)))
        if name == "Bidirectional":
            members = {"forward_rnn": flax.RNN(cell(rngs)), "backward_rnn": flax.RNN(cell(rngs))}
            return flax.Bidirectional(**{**members, **resolved(rngs)})
        return flax.RNN(**{"cell": cell(rngs), **(resolved(rngs) if name == "RNN" else {})})

    return make


def _cell(library: str, kind: str, rngs: nnx.Rngs, changed: Settings) -> Any:
    """A cell in float64. A change that an NNX cell does not read is an attribute, None for another layer."""
    settings = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    settings |= {"features": H} if library == "flax.linen" else {"in_features": F, "hidden_features": H, "rngs": rngs}
    kind = getattr(FLAX[library], kind)
    later = changed.keys() - inspect.signature(kind.__init__).parameters.keys()
    if library == "flax.nnx" and "param_dtype" not in changed:
        later |= changed.keys() & {"dtype", "promote_dtype"}
    made = kind(**settings | {key: value for key, value in changed.items() if key not in later})
    for key in later:
        if changed[key] is None:
            old = getattr(made, key)
            sizes = {"in_features": old.in_features, "out_features": old.out_features, "use_bias": not old.use_bias}
            changed[key] = nnx.Linear(**sizes, dtype=jnp.float64, param_dtype=jnp.float64, rngs=rngs)
        setattr(made, key, changed[key])
    return made


class Theirs:
    """A recurrent module of either API, with random numbers in it."""

    def __init__(self, library: str, make: Callable[[nnx.Rngs], Any], dtype: Any = jnp.float64) -> None:
        self.api = library
        self.module = filled(lambda: make(nnx.Rngs(0))) if library == "flax.nnx" else make(nnx.Rngs(0))
        cell = getattr(self.module, "forward_rnn", self.module).cell
        features = getattr(cell, "in_features", F)
        shape = (T, N, features) if self.module.time_major else (N, T, features)
        self.x = jnp.asarray(normal(*shape), dtype)
        self.variables = filled_variables(self.module, self.x) if library == "flax.linen" else None
        self.weights = self.variables or nnx.state(self.module)

    def __call__(self, x: Any, lengths: Any) -> Any:
        """The output where it is valid, and the carry as ours."""
        settings = {"seq_lengths": lengths, "return_carry": True}
        if self.api == "flax.linen":
            carry, output = jax.jit(lambda x: self.module.apply(self.variables, x, **settings))(x)
        else:
            carry, output = self.module(x, **settings, rngs=nnx.Rngs(0).carry)
        return self.valid(output, lengths), _as_ours(carry, self.cells)

    @property
    def cells(self) -> list[Any]:
        if isinstance(self.module, FLAX[self.api].RNN):
            return [self.module.cell]
        return [self.module.forward_rnn.cell, self.module.backward_rnn.cell]

    def valid(self, output: Any, lengths: Any) -> Any:
        """The output, with zeros after a row's end."""
        keep = jnp.arange(T) < (jnp.full(N, T) if lengths is None else lengths)[:, None]
        return output * (keep.T if self.module.time_major else keep)[..., None]

    def ours(self) -> Callable[..., Any]:
        """Ours, as a function of x, hx and lengths."""
        made = jaxrnn.from_flax(self.module, self.variables)
        return (
            made if self.api == "flax.nnx" else jax.jit(lambda *args, **kwargs: made[0].apply(made[1], *args, **kwargs))
        )


def _as_ours(carry: Any, cells: list[Any]) -> Any:
    """A carry as a state of ours: h first, and an axis for directions."""
    each = carry if len(cells) == 2 else (carry,)
    if isinstance(each[0], tuple):
        return jnp.stack([h for _, h in each]), jnp.stack([c for c, _ in each])
    return jnp.stack(each)


def _same(theirs: Theirs, ours: Callable[..., Any], atol: float = 1e-12) -> None:
    """Check that both give the same numbers. One row is shorter."""
    assert_close(ours(theirs.x, lengths=LENGTHS), theirs(theirs.x, LENGTHS), atol=atol)


def _equal(one: Any, other: Any) -> None:
    """Check that two modules of ours, with variables or not, are the same."""
    if isinstance(one, nnx.Module):
        assert one.spec == other.spec
        assert_close(jaxrnn.state_dict(one), jaxrnn.state_dict(other), atol=0)
    else:
        assert one[0].spec == other[0].spec
        assert_close(one[1], other[1], atol=0)


def _hard(x: Any) -> Any:
    return jnp.clip(x, -1, 1)


def _doubled(*args: Any, **kwargs: Any) -> Any:
    return 2 * jax.lax.dot_general(*args, **kwargs)


def _rounded(arrays: Any, *, dtype: Any = None, inexact: bool = True) -> Any:
    return [None if array is None else jnp.asarray(jnp.round(array, 1), dtype) for array in arrays]


# Another value for each setting of a table.
_OTHER_CELL = Made(lambda library, rngs: _cell(library, "GRUCell", rngs, {}))
_OTHER_RNN = Made(lambda library, rngs: FLAX[library].RNN(_cell(library, "SimpleCell", rngs, {}), unroll=2))
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
# Where other changes to the cell make the value of a Linear.
ELSEWHERE = {
    ("Linear", "in_features"): ("OptimizedLSTMCell", {"hidden_features": 6}),
    ("Linear", "out_features"): ("OptimizedLSTMCell", {"hidden_features": 6}),
    ("Linear", "kernel"): ("OptimizedLSTMCell", {"kernel_init": jax.nn.initializers.ones}),
    ("Linear", "bias"): ("OptimizedLSTMCell", {"dense_h": Made(lambda *_: None)}),
    ("Linear", "param_dtype"): ("OptimizedLSTMCell", {"param_dtype": jnp.float64}),
    ("Linear", "dtype"): ("OptimizedLSTMCell", {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}),
}


def _expression(pattern: str, words: str, **names: Any) -> Any:
    """The value of an expression that a remedy has."""
    found = re.search(pattern, words)
    assert found, f"{words!r} should have {pattern}"
    return eval(found[0], {"flax": __import__("flax.linen.recurrent"), "jax": jax, "jaxrnn": jaxrnn, **names})


_FLIP = r"flax\.linen\.recurrent\.flip_sequences\([^)]*\)"


def _flipped(words: str, theirs: Theirs, ours: Callable[..., Any], keep_order: bool) -> Callable[..., Any]:
    def call(x: Any, lengths: Any) -> Any:
        names = {"lengths": lengths, "time_major": theirs.module.time_major}
        output, state = ours(_expression(_FLIP, words, x=x, **names), lengths=lengths)
        return theirs.valid(_expression(_FLIP, words, x=output, **names) if keep_order else output, lengths), state

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
        forward = Theirs(library, _make(library, name, {"reverse": False}))
        _same(theirs, _flipped(words, theirs, forward.ours(), theirs.module.keep_order))
    elif setting in ("activation_fn", "gate_fn", "residual"):
        own = _expression(r"jaxrnn\.Cell", words)
        dialect = _expression(r"jaxrnn\.checkpoint\.dialects\.DIALECTS", words)[library, name]
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

        _same(theirs, lambda x, lengths: jaxrnn.apply(spec, params, x, lengths=lengths))
    elif setting == "carry_init":
        assert re.search(r"cell\.initialize_carry .* as hx .* h before c, .* with an axis for directions first", words)
        shape = (N, F)
        first = (
            cell.initialize_carry(jax.random.key(0), shape)
            if library == "flax.linen"
            else cell.initialize_carry(shape, nnx.Rngs(0).carry)
        )
        hx = _as_ours(first, [cell])
        ours = _quietly(theirs.ours)
        _same(theirs, lambda x, lengths: ours(x, hx, lengths=lengths))
    elif setting == "merge_fn":
        plain = Theirs(library, _make(library, name, {}))

        def merged(x: Any, lengths: Any) -> Any:
            output, state = plain.ours()(x, lengths=lengths)
            return _expression(r"merge_fn\(.*\)", words, output=output, merge_fn=theirs.module.merge_fn), state

        _same(theirs, merged)
    elif setting == "precision":
        ours = _quietly(theirs.ours)
        with _expression(r"jax\.default_matmul_precision", words)("highest"):
            _same(theirs, ours)
    elif setting in ("dtype", "param_dtype"):
        dtype = jnp.dtype(re.search(r"with dtype and param_dtype (\w+)$", words)[1])
        plain = Theirs(library, _make(library, _cell_of(name), {"dtype": dtype, "param_dtype": dtype}), dtype)
        _same(plain, plain.ours(), atol=1e-6)
    else:
        assert re.search(rf"make the cell's layers with Flax's default .*\b{setting}\b", words)
        plain = Theirs(library, _make(library, _cell_of(name), {}))
        _same(plain, plain.ours())


def _cell_of(name: str) -> str:
    return "OptimizedLSTMCell" if name == "Linear" else name


def _quietly(make: Callable[..., Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


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
    theirs = Theirs(library, _make(library, changed_in, changed or {setting: OTHERS[setting]}))
    if row.use == "refused":
        with pytest.raises(CheckpointError, match=f" with {setting}=.*\n{re.escape(row.words)}$"):
            theirs.ours()
    elif row.use == "warned":
        with pytest.warns(UserWarning, match=f" with {setting}=.*\n{re.escape(row.words)}$"):
            theirs.ours()
    else:
        _same(theirs, theirs.ours())
        if row.use == "neutral" and setting != "use_bias":  # from weights alone, too
            module = jaxrnn.from_flax(theirs.module, theirs.variables)
            _equal(_quietly(lambda: jaxrnn.from_flax(theirs.weights)), module)
        return
    _follow(row.words, setting, library, name, theirs)


def _own_list(library: str, name: str) -> set[str]:
    """The settings that a class of Flax has: its constructor's arguments, and an NNX module's attributes."""
    kind = getattr(FLAX[library], name.partition(" ")[0])
    names = inspect.signature(kind.__init__).parameters.keys() - {"self"}
    if library == "flax.nnx":
        theirs = Theirs(library, _make(library, name, {}))
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


def _bidirectional(library: str, forward: Any, backward: Any) -> Theirs:
    """A Bidirectional of two kinds of cell with settings."""

    def make(rngs: nnx.Rngs) -> Any:
        cells = [_cell(library, kind, rngs, settings) for kind, settings in (forward, backward)]
        return FLAX[library].Bidirectional(*map(FLAX[library].RNN, cells))

    return Theirs(library, make)


SIZE = {"flax.linen": "features", "flax.nnx": "hidden_features"}
APART = {
    "hidden_size=4 and 6": lambda library: _bidirectional(library, ("GRUCell", {}), ("GRUCell", {SIZE[library]: 6})),
    "nonlinearity=tanh and relu": lambda library: _bidirectional(
        library, ("SimpleCell", {}), ("SimpleCell", {"activation_fn": jax.nn.relu})
    ),
    "dtype=float64 and float32": lambda library: _bidirectional(
        library, ("SimpleCell", {}), ("SimpleCell", {"dtype": jnp.float32, "param_dtype": jnp.float32})
    ),
    "cell=LSTM and GRU": lambda library: _bidirectional(library, ("LSTMCell", {}), ("GRUCell", {})),
}


@pytest.mark.slow
@pytest.mark.parametrize("library", FLAX)
@pytest.mark.parametrize("differ", APART)
def test_two_directions_that_differ_are_converted_one_by_one(differ: str, library: str) -> None:
    theirs = APART[differ](library)
    with pytest.raises(CheckpointError, match=f"a Bidirectional of two cells that differ: .*{differ}.*\n") as caught:
        theirs.ours()
    words = str(caught.value).partition("\n")[2]
    ways = []
    for name in re.findall(r"\w+_rnn", words):
        part = theirs.variables and {"params": theirs.variables["params"][name]}
        ours = jaxrnn.from_flax(getattr(theirs.module, name), part)
        ways.append(ours if part is None else lambda *a, made=ours, **k: made[0].apply(made[1], *a, **k))
    names = {"lengths": LENGTHS, "time_major": False}
    forward, _ = ways[0](theirs.x, lengths=LENGTHS)
    backward, _ = ways[1](_expression(_FLIP, words, x=theirs.x, **names), lengths=LENGTHS)
    output = jnp.concatenate([forward, _expression(_FLIP, words, x=backward, **names)], axis=-1)
    carry, expected = _call(theirs, theirs.x)
    assert len(carry) == 2
    assert_close(output, theirs.valid(expected, LENGTHS), atol=1e-6 if "dtype" in differ else 1e-12)


def _call(theirs: Theirs, x: Any) -> Any:
    """The carry and the output."""
    if theirs.api == "flax.linen":
        return theirs.module.apply(theirs.variables, x, seq_lengths=LENGTHS, return_carry=True)
    return theirs.module(x, seq_lengths=LENGTHS, return_carry=True)


@pytest.mark.slow
@pytest.mark.parametrize("library", FLAX)
def test_a_reversed_rnn_that_keeps_the_order(library: str) -> None:
    theirs = Theirs(library, _make(library, "RNN", {"reverse": True, "keep_order": True}))
    _follow(TABLES[library, "RNN"]["reverse"].words, "reverse", library, "RNN", theirs)


@pytest.mark.slow
@pytest.mark.parametrize("library", FLAX)
@pytest.mark.parametrize("whole", [False, True])
def test_directions_that_share_their_weights(library: str, whole: bool) -> None:
    def make(rngs: nnx.Rngs) -> Any:
        cell, flax = _cell(library, "GRUCell", rngs, {}), FLAX[library]
        rnn = flax.RNN(cell)
        return flax.Bidirectional(rnn, rnn if whole else flax.RNN(cell))

    theirs = Theirs(library, make)
    with pytest.warns(
        UserWarning, match="two directions have the same weights\nours train apart: to tie them, "
    ) as caught:
        made = jaxrnn.from_flax(theirs.module, theirs.variables)
    words = str(caught[0].message)
    if library == "flax.linen":
        ours, variables = made
        params = {name: a for name, a in variables["params"].items() if not name.endswith("_reverse")}
        params = _expression(r"\{\*\*.*\}$", words, params=params)
        _same(theirs, lambda *args, **kwargs: ours.apply({"params": params}, *args, **kwargs))
    else:
        _same(theirs, made)
        exec(re.search(r"ours\.weight_ih_l0_reverse = ours.weight_ih_l0", words)[0], {"ours": made})
        assert made.weight_ih_l0_reverse is made.weight_ih_l0


@pytest.mark.slow
@pytest.mark.parametrize("library", FLAX)
@pytest.mark.parametrize("name", ["RNN", "Bidirectional"])
def test_a_subclass_with_a_call_of_its_own(name: str, library: str) -> None:
    flax = FLAX[library]
    same = type("Named", (getattr(flax, name),), {"__module__": __name__, "__annotations__": {}})
    other = type("Louder", (same,), {"__module__": __name__, "__annotations__": {}, "__call__": _louder})
    settings = dict(_fields(Theirs(library, _make(library, name, {})).module))
    theirs = Theirs(library, lambda rngs: same(**settings))
    _same(theirs, theirs.ours())
    with pytest.raises(CheckpointError, match=f"Louder has another __call__ than {library}.{name}\nif it computes the"):
        jaxrnn.from_flax(other(**settings), theirs.variables)


def _louder(self: Any, x: Any, **settings: Any) -> Any:
    return 2 * x


def _fields(module: Any) -> Iterator[tuple[str, Any]]:
    for name in ("cell", "forward_rnn", "backward_rnn"):
        if hasattr(module, name):
            yield name, getattr(module, name)


@pytest.mark.slow
@pytest.mark.parametrize("transform", [linen.remat, linen.jit], ids=lambda transform: transform.__name__)
def test_a_linen_class_that_was_transformed(transform: Any) -> None:
    module, x = transform(linen.RNN)(linen.GRUCell(H, param_dtype=jnp.float64)), jnp.asarray(normal(N, T, F))
    variables = filled_variables(module, x)
    ours, converted = jaxrnn.from_flax(module, variables)
    assert_close(ours.apply(converted, x)[0], module.apply(variables, x), atol=1e-12)
    louder = type("RNN", (linen.RNN,), {"__module__": __name__, "__annotations__": {}, "__call__": _louder})
    with pytest.raises(CheckpointError, match=r"has another __call__ .*\n.* give a flax.linen.RNN of the same cells$"):
        jaxrnn.from_flax(transform(louder)(module.cell), variables)


def test_what_is_in_no_table_is_named() -> None:
    theirs = Theirs("flax.nnx", _make("flax.nnx", "GRUCell", {}))
    cell = theirs.module.cell
    cell.initialize_carry = lambda shape, rngs: jnp.ones((N, H))
    with pytest.warns(
        UserWarning, match=r"^flax\.nnx\.GRUCell with initialize_carry=<function .*\njaxrnn does not know"
    ):
        theirs.ours()
    del cell.initialize_carry
    cell.dense_i = filled(lambda: nnx.LoRALinear(F, 3 * H, lora_rank=2, rngs=nnx.Rngs(0)))
    with pytest.raises(
        CheckpointError, match=r"dense_i of a flax\.nnx\.GRUCell is of type LoRALinear\nput an nnx\.Linear"
    ):
        theirs.ours()
    cell.dense_i = filled(lambda: nnx.Linear(F, 3 * H, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    with pytest.raises(CheckpointError, match=r"the layers of a flax\.nnx\.GRUCell have several dtypes\ngive them the"):
        theirs.ours()
    with pytest.raises(TypeError, match=r"two of a Bidirectional should be flax\.nnx\.RNN, got GRUCell, GRUCell"):
        jaxrnn.from_flax(nnx.Bidirectional(cell, cell))
    with pytest.raises(TypeError, match="variables are for a Linen module"):
        jaxrnn.from_flax(theirs.module, {"params": {}})
    theirs = Theirs("flax.linen", _make("flax.linen", "GRUCell", {}))
    with pytest.raises(CheckpointError, match=r"'params' in it, but it has cell\ngive \{'params': variables\}"):
        jaxrnn.from_flax(theirs.module, theirs.variables["params"])


@pytest.mark.slow
def test_boxes_of_partitioned_weights() -> None:
    init = linen.with_partitioning(jax.nn.initializers.ones, (None, "model"))
    theirs = Theirs("flax.linen", _make("flax.linen", "GRUCell", {"kernel_init": init}))
    assert isinstance(theirs.variables["params"]["cell"]["in"]["kernel"], linen.Partitioned)
    _same(theirs, theirs.ours())


class Custom(nnx.Module):
    """Two recurrent modules of any names, both of which run forward."""

    def __init__(self, **members: Any) -> None:
        for name, member in members.items():
            setattr(self, name, member)


def _gru(features: int = F) -> Any:
    return filled(lambda: nnx.RNN(nnx.GRUCell(features, H, rngs=nnx.Rngs(0))))


def _flat(module: Any) -> dict[str, Any]:
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): np.asarray(value[...]) for path, value in state}


def test_two_that_run_forward_are_not_taken_for_a_bidirectional_without_a_word() -> None:
    both = Custom(forward_rnn=_gru(), backward_rnn=_gru())
    x = jnp.asarray(normal(N, T, F), jnp.float32)
    with pytest.warns(
        UserWarning, match="^forward_rnn and backward_rnn are read as a Bidirectional, .*\nif both run for"
    ):
        assert jaxrnn.from_flax(nnx.state(both)).bidirectional
    for name in ("forward_rnn", "backward_rnn"):
        ours = jaxrnn.from_flax({key: a for key, a in _flat(both).items() if key.startswith(name)})
        assert_close(ours(x)[0], getattr(both, name)(x), atol=1e-6)
    other = Custom(my_forward_rnn=_gru(), my_backward_rnn=_gru(), backward_rnn=_gru())
    assert [rnn.prefix for rnn in find_rnns(with_torchs_names(_flat(other)))] == [
        "backward_rnn.",
        "my_backward_rnn.",
        "my_forward_rnn.",
    ]
    sizes = Custom(forward_rnn=_gru(), backward_rnn=_gru(F + 2))
    assert [rnn.input_size for rnn in find_rnns(with_torchs_names(_flat(sizes)))] == [F + 2, F]


def test_two_cells_under_one_name() -> None:
    one = _flat(_gru())
    tensors = {f"enc.{name}": a for name, a in one.items()} | {f"enc.forward_rnn.{name}": a for name, a in one.items()}
    assert [rnn.prefix for rnn in find_rnns(with_torchs_names(tensors))] == ["enc.", "enc.forward_rnn."]
    tensors |= {f"enc.backward_rnn.{name}": a for name, a in one.items()}
    with (
        pytest.warns(UserWarning, match="read as a Bidirectional"),
        pytest.raises(
            CheckpointError, match=r"enc\.cell and .*enc\.forward_rnn\.cell are both read as enc\.weight_ih_l0\n"
        ),
    ):
        with_torchs_names(tensors)
    with pytest.raises(CheckpointError, match=r"^a/b and a\.b are both read as a\.b\n"):
        jaxrnn.from_flax({"a": {"b": np.ones(2)}, "a.b": np.ones(2)})


def test_what_stands_beside_a_cell_is_named() -> None:
    theirs = Theirs("flax.nnx", _make("flax.nnx", "GRUCell", {}))
    beside = {"norm": {"scale": np.ones(4)}, "count": np.array(3)}
    with pytest.warns(
        UserWarning, match=r"beside the cell cell\. there are count, norm\.scale, .*\n.* part of the weights"
    ):
        ours = jaxrnn.from_flax({**nnx.to_pure_dict(theirs.weights), **beside})
    _same(theirs, ours)


def _trained(graph: Any, params: Any, call: Any, masks: Any) -> list[Any]:
    """For each mask of the gradients, the losses of four steps of Adam, with clipping."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.05))

    @jax.jit
    def step(params: Any, state: Any, mask: Any) -> Any:
        value, gradient = jax.value_and_grad(lambda params: jnp.mean(call(graph, params) ** 3))(params)
        masked = jax.tree.map(lambda keep, gradient: jnp.where(keep, gradient, 0), mask, gradient)
        updates, state = optimizer.update(masked, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for mask in masks:
        trained, state = params, optimizer.init(params)
        losses.append([])
        for _ in range(4):
            trained, state, value = step(trained, state, mask)
            losses[-1].append(value)
    return [jnp.stack(each) for each in losses]


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name"), [key for key in DIALECTS if key[0] in FLAX], ids=str)
def test_training_as_flax_with_the_gradients_of_new_biases_masked(library: str, name: str) -> None:
    theirs = Theirs(library, _make(library, name, {}))
    made = jaxrnn.from_flax(theirs.module, theirs.variables)

    def call(module: Any, params: Any, **settings: Any) -> Any:
        if library == "flax.linen":
            return module.apply({"params": params}, theirs.x)
        graph, *others = module
        return nnx.merge(graph, params, *others)(theirs.x, **settings)

    def split(module: Any, variables: Any) -> tuple[Any, Any]:
        if variables:
            return module, variables["params"]
        graph, params, *others = nnx.split(module, nnx.Param, ...)
        return (graph, *others), params

    zero = {} if theirs.variables else {"initial_carry": theirs.cells[0].initialize_carry((N, F), nnx.Rngs(0))}
    module, params = split(theirs.module, theirs.variables)
    every = jax.tree.map(lambda array: np.ones(np.shape(array), bool), params)
    [expected] = _trained(module, params, lambda *arguments: call(*arguments, **zero), [every])
    module, params = split(*(made if theirs.variables else (made, None)))
    every = jax.tree.map(lambda array: np.ones(np.shape(array), bool), params)
    arrays = params if theirs.variables else nnx.to_pure_dict(params)
    has = DIALECTS[library, name].has(arrays)
    mask = has if theirs.variables else nnx.State({key: params[key].replace(jnp.asarray(a)) for key, a in has.items()})
    found = _trained(module, params, lambda *arguments: call(*arguments)[0], [mask, every])
    assert [float(jnp.max(jnp.abs(each - expected))) < 1e-10 for each in found] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("tied", ["layers", "one of both", "all of both"])
def test_parameters_that_are_shared(tied: str) -> None:
    def make(rngs: nnx.Rngs) -> Any:
        one, other = _cell("flax.nnx", "LSTMCell", rngs, {}), _cell("flax.nnx", "LSTMCell", rngs, {})
        if tied == "layers":
            one.hi = one.hf
            return nnx.RNN(one)
        for name, layer in vars(one).items():
            if isinstance(layer, nnx.Linear) and (tied == "all of both" or name == "hi"):
                setattr(other, name, layer)
        return nnx.Bidirectional(nnx.RNN(one), nnx.RNN(other))

    theirs = Theirs("flax.nnx", make)
    words = {
        "layers": r"one parameter at several places: .*cell\.hf\.kernel, cell\.hi\.kernel\nours has a copy",
        "one of both": r"places: .*; forward_rnn\.cell\.hi\.kernel, backward_rnn\.cell\.hi\.kernel\nours has a copy",
        "all of both": "two directions have the same weights\nours train apart",
    }
    with pytest.warns(UserWarning, match=words[tied]) as caught:
        ours = theirs.ours()
    assert len(caught) == 1
    assert_close(ours(theirs.x), theirs(theirs.x, None), atol=1e-12)


@pytest.mark.parametrize("library", FLAX)
def test_other_names_of_torchs_activations(library: str) -> None:
    changed = {"activation_fn": jax.lax.tanh, "gate_fn": jax.lax.logistic}
    theirs = Theirs(library, _make(library, "GRUCell", changed))
    assert_close(theirs.ours()(theirs.x), theirs(theirs.x, None), atol=1e-12)
    assert jax.scipy.special.expit in TABLES[library, "LSTMCell"]["gate_fn"].plain


@pytest.mark.slow
def test_a_bound_rnn_whose_cell_is_elsewhere() -> None:
    class Around(linen.Module):
        def setup(self) -> None:
            self.inner = linen.GRUCell(H, param_dtype=jnp.float64)
            self.rnn = linen.RNN(self.inner)

        def __call__(self, x: Any) -> Any:
            return self.rnn(x)

    x = jnp.asarray(normal(N, T, F))
    around = Around().bind(Around().init(jax.random.key(0), x))
    with pytest.raises(CheckpointError, match="its cell may belong to the module around it\ngive those of") as caught:
        jaxrnn.from_flax(around.rnn, around.rnn.variables)
    variables = _expression(r"\{'params'.*$", str(caught.value), around=around, name="inner")
    ours, variables = jaxrnn.from_flax(around.rnn, variables)
    assert_close(ours.apply(variables, x)[0], around(x), atol=1e-12)


def test_a_dict_of_states() -> None:
    theirs = Theirs("flax.nnx", _make("flax.nnx", "GRUCell", {}))
    for weights in (dict(nnx.state(theirs.module)), dict(nnx.state(theirs.module.cell))):
        assert_close(jaxrnn.from_flax(weights)(theirs.x)[0], theirs(theirs.x, None)[0], atol=1e-12)
