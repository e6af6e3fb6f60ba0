"""Flax's recurrent modules, and their weights, as ours."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.traverse_util import flatten_dict

import jaxrnn.linen
import jaxrnn.nnx
from jaxrnn.activations import gru_cell, lstm_cell, rnn_cell
from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, RNN_TANH, Cell
from jaxrnn.checkpoint.arrays import dtype_of, with_library
from jaxrnn.checkpoint.dialects import DIALECTS, Dialect, Weights
from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.find import FoundRNN, find_rnns
from jaxrnn.checkpoint.flax_layers import default_of
from jaxrnn.checkpoint.flax_names import RANDOM_STATE, stacked_cells, with_torchs_names
from jaxrnn.checkpoint.named import Described, Names, origins_of
from jaxrnn.checkpoint.tables import USED, Row, Table, neutral, refused, warned
from jaxrnn.spec import level_outside

_FLIPPED = "jaxrnn.flip_sequences(x, lengths, batch_first=x.ndim > 2 and not time_major)"
_FLIP = (
    f"make it with reverse=False, flip the input of ours, and with keep_order=True its output, too: {_FLIPPED}, "
    "where lengths may be None"
)
_ONE_BY_ONE = (
    f"convert its forward_rnn and its backward_rnn, and flip the input and the output of the second: {_FLIPPED}, "
    "where lengths may be None"
)
_OWN = (
    "for a residual, write a cell of your own, see jaxrnn.Cell; jaxrnn.checkpoint.dialects.DIALECTS reads the weights "
    "for it"
)
_AS_LAYER = "give an RNN of it, which becomes a jaxrnn.Recurrent: flax.nnx.RNN(cell) or flax.linen.RNN(cell)"
_MERGE = (
    "for another merge_fn, make it with the default, and merge what ours returns: "
    "merge_fn(*jax.numpy.split(output, 2, axis=-1))"
)
_FIRST = (
    "ours starts from zeros: give what cell.initialize_carry makes as hx to each call, h before c, "
    "and to a layer with an axis for directions first"
)
_HALF = (
    "Flax and ours round at other places, and ours returns this dtype: for the same numbers, "
    "make the cell with dtype and param_dtype float32"
)
_PRODUCT = (
    "ours computes the plain product: for the same numbers, make the cell's layers with Flax's default dot_general, "
    "promote_dtype and preferred_element_type"
)
_PRECISION = "call ours under jax.default_matmul_precision with the same precision"
_SCANNED_CELL = (
    "of a scan over one of these cells give the weights alone: {}, or True where in_axes=1; if the cell's activations "
    "are not Flax's defaults, give an RNN of the cell; with reverse=True, flip x and the output along time"
)
_WEIGHTS_ALONE = {
    "flax.nnx": "jaxrnn.from_flax(flax.nnx.state(module), batch_first=False)",
    "flax.linen": "jaxrnn.from_flax(variables['params'], batch_first=False)",
}
_MAPPED = {
    "flax.nnx": "flax.nnx.vmap(jaxrnn.from_flax)(module)",
    "flax.linen": "jax.vmap(lambda variables: jaxrnn.from_flax(module, variables)[1])(variables)",
}
_ONE_PART = "give the part of the weights that belongs to one module"
_TIED = {
    "flax.nnx": "ours train apart: to tie them, ours.weight_ih_l0_reverse = ours.weight_ih_l0, and so on",
    "flax.linen": (
        "ours train apart: to tie them, train the forward ones, and apply "
        "{**params, **{f'{name}_reverse': array for name, array in params.items()}}"
    ),
}
_APART = (
    "ours has a copy for each, and they train apart: to keep them equal, "
    "replace the gradient of each in ours by the sum of all"
)


# The classes that linen.remat and linen.jit make compute what their own base does.
_TRANSFORMED = {
    f"flax.linen.transforms.{prefix}{name}" for prefix in ("Checkpoint", "Jit") for name in ("RNN", "Bidirectional")
}

_INITIAL = neutral("makes the first weights, and those that are there are converted")
_SHAPES = neutral("the shapes of the weights say it")
_METADATA = neutral("how the weights are sharded")
_RANDOM = neutral("random numbers for carry_init alone")
_IN_LAYERS = neutral("the cell gave it to its layers, whose table has it")
_SCANNED = neutral("where a step has weights of its own, these have another axis, and are refused")
_OVERRIDDEN = neutral("a Bidirectional gives it to both, whatever theirs is")
_FLOATS = warned(None, "float32", "float64", remedy=_HALF)
# Functions that have a name in `jaxrnn.activations`, beside those that it knows.
ACTIVATIONS: dict[Any, str] = {
    jax.lax.tanh: "tanh",
    **dict.fromkeys((jax.lax.logistic, jax.scipy.special.expit), "sigmoid"),
}
_LIBRARIES = {"flax.linen": linen, "flax.nnx": nnx}
_EVERY = {
    "flax.linen": {"parent": neutral("where the module is"), "name": neutral("its name there")},
    "flax.nnx": {"rngs": _RANDOM},
}
_SCAN = {
    "flax.linen": ("variable_axes", "variable_broadcast", "variable_carry", "split_rngs"),
    "flax.nnx": ("state_axes", "broadcast_rngs"),
}
_RNN = {
    "cell": USED,
    "time_major": USED,
    "reverse": refused(False, remedy=_FLIP),
    "keep_order": neutral("for reverse=True, whose remedy says it"),
    "return_carry": neutral("each call of ours returns the state"),
    "unroll": neutral("the same steps"),
}
_MEMBER = _RNN | dict.fromkeys(("time_major", "reverse", "keep_order", "return_carry"), _OVERRIDDEN)
_LAYER = {
    "kernel": USED,
    "bias": USED,
    "dtype": _FLOATS,
    "param_dtype": neutral("the weights have it"),
    "precision": warned(None, remedy=_PRECISION),
    "dot_general": warned(None, jax.lax.dot_general, remedy=_PRODUCT),
    "promote_dtype": warned(default_of(nnx.Linear, "promote_dtype"), remedy=_PRODUCT),
    "preferred_element_type": warned(None, remedy=_PRODUCT),
    **dict.fromkeys(("in_features", "out_features", "use_bias"), _SHAPES),
    **dict.fromkeys(("kernel_init", "bias_init", "rngs"), _INITIAL),
    **dict.fromkeys(("kernel_metadata", "bias_metadata"), _METADATA),
}


def _cell_rows(library: str, dialect: Dialect) -> dict[str, Row]:
    rows = {
        "activation_fn": USED,
        "carry_init": warned(None, jax.nn.initializers.zeros, remedy=_FIRST),
        "param_dtype": _FLOATS,
        **dict.fromkeys(("kernel_init", "recurrent_kernel_init", "bias_init"), _INITIAL),
    }
    if dialect.kind == "RNN":
        rows["residual"] = refused(False, remedy=_OWN)
    else:
        rows["gate_fn"] = USED
    if library == "flax.linen":
        return rows | {"features": _SHAPES, "dtype": _FLOATS}
    rows |= dict.fromkeys(("in_features", "hidden_features"), _SHAPES)
    rows |= dict.fromkeys(("dtype", "promote_dtype"), _IN_LAYERS)
    rows |= dict.fromkeys(("kernel_metadata", "recurrent_kernel_metadata", "bias_metadata"), _METADATA)
    return rows | {"keep_rngs": _RANDOM} | dict.fromkeys(_layers(dialect), USED)


def _layers(dialect: Dialect) -> list[str]:
    """The names of a cell's layers."""
    return list(dict.fromkeys(entry.name.partition(".")[0] for entry in dialect.entries))


def _tables(library: str) -> dict[tuple[str, str], Table]:
    merge_fn = default_of(_LIBRARIES[library].Bidirectional, "merge_fn")
    scan = dict.fromkeys(_SCAN[library], _SCANNED)
    rows: dict[str, dict[str, Row]] = {
        "RNN": _RNN | scan,
        "RNN in a Bidirectional": _MEMBER | scan,
        "Bidirectional": {
            "forward_rnn": USED,
            "backward_rnn": USED,
            "merge_fn": refused(merge_fn, remedy=_MERGE),
            "time_major": USED,
            "return_carry": _RNN["return_carry"],
        },
    }
    rows |= {name: _cell_rows(library, dialect) for (where, name), dialect in DIALECTS.items() if where == library}
    return {(library, name): Table(f"{library}.{name}", each | _EVERY[library]) for name, each in rows.items()}


# By library and class. An NNX cell has layers, and Linen's has not.
TABLES = {**_tables("flax.linen"), **_tables("flax.nnx"), ("flax.nnx", "Linear"): Table("flax.nnx.Linear", _LAYER)}


@overload
def from_flax(
    module: nnx.LSTMCell | nnx.OptimizedLSTMCell, variables: None = None, rngs: nnx.Rngs | None = None
) -> jaxrnn.nnx.LSTMCell: ...
@overload
def from_flax(
    module: linen.LSTMCell | linen.OptimizedLSTMCell, variables: Mapping[str, Any], rngs: nnx.Rngs | None = None
) -> tuple[jaxrnn.linen.LSTMCell, dict[str, Any]]: ...
@overload
def from_flax(module: nnx.GRUCell, variables: None = None, rngs: nnx.Rngs | None = None) -> jaxrnn.nnx.GRUCell: ...
@overload
def from_flax(
    module: linen.GRUCell, variables: Mapping[str, Any], rngs: nnx.Rngs | None = None
) -> tuple[jaxrnn.linen.GRUCell, dict[str, Any]]: ...
@overload
def from_flax(module: nnx.SimpleCell, variables: None = None, rngs: nnx.Rngs | None = None) -> jaxrnn.nnx.RNNCell: ...
@overload
def from_flax(
    module: linen.SimpleCell, variables: Mapping[str, Any], rngs: nnx.Rngs | None = None
) -> tuple[jaxrnn.linen.RNNCell, dict[str, Any]]: ...
@overload
def from_flax(
    module: linen.RNN | linen.Bidirectional, variables: Mapping[str, Any], rngs: nnx.Rngs | None = None
) -> tuple[Any, dict[str, Any]]: ...
@overload
def from_flax(
    module: Any,
    variables: Mapping[str, Any] | None = None,
    rngs: nnx.Rngs | None = None,
    batch_first: bool | None = None,
) -> Any: ...
def from_flax(
    module: Any,
    variables: Mapping[str, Any] | None = None,
    rngs: nnx.Rngs | None = None,
    batch_first: bool | None = None,
) -> Any:
    """Convert a recurrent module of Flax: the same weights in ours, with the same results. Also inside jit and vmap.

    Flax has one bias where torch has two. The second begins as zeros, and is trained too. To train exactly as Flax
    does, keep its gradient 0: it is `bias_ih` of an LSTM, `bias_hh` of an RNN or an NNX GRU, and the rows of the gates
    r and z in `bias_hh` of a Linen GRU. `jaxrnn.checkpoint.dialects.Dialect.has` tells.

    Args:
        module: of flax.nnx, an RNN, a Bidirectional of two, or an LSTMCell, OptimizedLSTMCell, GRUCell or SimpleCell;
            or of flax.linen the same, with its variables. Or the weights of one such module alone: Linen's variables or
            an NNX state, nested or with dotted names. They are taken for layers with the usual settings. All may have
            more axes first, as `jax.vmap` makes them over seeds: then so have the weights of ours.
        variables: those of a Linen module, as from `module.init`.
        rngs: nnx.Rngs for the new NNX module; `nnx.Rngs(0)` if None.
        batch_first: of weights alone, whether x is `(batch, time, features)`, as Flax's RNN has it, or
            `(time, batch, features)`, as a scan over the first axis has it. Give it: weights do not say.

    Returns:
        For an NNX module, ours: an RNN, LSTM or GRU, with `batch_first` unless it is time-major, or an RNNCell,
        LSTMCell or GRUCell; a Recurrent if its activations are others than torch's. For a Linen module, ours and its
        variables, `{"params": ...}`. Ours are called as torch's: h comes before c in a state, and the output before the
        state.

    Raises:
        TypeError: another module, such as a scan over a cell; a Linen module without variables; or `batch_first` beside
            a module.
        CheckpointError: settings that torch does not have, such as a residual; a cell alone with other activations; a
            subclass of RNN or Bidirectional with a `__call__` of its own; or weights under one name.

    Warns:
        UserWarning: a setting that changes the results and is not converted, such as `carry_init`; one that is unknown;
            parameters that an NNX module has at several places; of weights alone, which `batch_first` is assumed if it
            is not given, what is beside a cell, and that `forward_rnn` and `backward_rnn` are taken for the two
            directions of a Bidirectional. The second line says what to do.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> theirs = nnx.RNN(nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)))
    >>> ours = jaxrnn.from_flax(theirs)
    >>> x = jnp.ones((2, 5, 3))
    >>> bool(jnp.allclose(ours(x)[0], theirs(x), atol=1e-6))
    True
    """
    if isinstance(module, Mapping):
        return _from_weights(module, rngs, batch_first)
    if batch_first is not None:
        raise TypeError("batch_first is for weights alone: an RNN says by time_major which axis is time")
    library = "flax.linen" if isinstance(module, linen.Module) else "flax.nnx"
    if library == "flax.linen" and variables is None:
        raise TypeError("variables should be what the Linen module's init returned, got None")
    if library == "flax.nnx" and variables is not None:
        raise TypeError("variables are for a Linen module; an NNX module has its own")
    if variables is not None and not variables:
        cause = "variables is empty: if the module is a bound one, its cell may belong to the module around it"
        remedy = "give those of the cell where an RNN has them: {'params': {'cell': around.variables['params'][name]}}"
        raise CheckpointError(f"{cause}\n{remedy}")
    if variables is not None and "params" not in variables:
        cause = f"variables should be a dict with 'params' in it, but it has {listed(variables)}"
        raise CheckpointError(f"{cause}\ngive {{'params': variables}}")
    params = {} if variables is None else dict(linen.unbox(variables["params"]))
    cells, time_major = _converted(library, module, params)
    kind, settings, _ = cells[0]
    for other in cells[1:]:
        one, two = {"kind": kind, **settings}, {"kind": other.kind, **other.settings}
        if differ := [
            f"{key}={one.get(key)} and {two.get(key)}" for key in {**one, **two} if one.get(key) != two.get(key)
        ]:
            raise CheckpointError(f"a Bidirectional of two cells that differ: {listed(differ)}\n{_ONE_BY_ONE}")
    if time_major is not None:
        settings = settings | {"batch_first": not time_major, "bidirectional": len(cells) == 2}
    suffixes = [""] if time_major is None else ["_l0", "_l0_reverse"]
    weights = {
        role + suffix: array
        for suffix, cell in zip(suffixes, cells, strict=False)
        for role, array in cell.weights.items()
    }
    if "cell" in settings and time_major is None:
        cause = f"{type(module).__name__} with other activations than torch's, {settings['cell'].name}"
        raise CheckpointError(f"{cause}\n{_AS_LAYER}")
    name = "Recurrent" if "cell" in settings else kind + ("Cell" if time_major is None else "")
    return _built(library, name, settings, weights, rngs)


class _FlaxCell(NamedTuple):
    """A cell of Flax: what it is in torch, the settings of our class, and the weights by role."""

    kind: str
    settings: dict[str, Any]
    weights: Weights


def _converted(library: str, module: Any, params: Mapping[str, Any]) -> tuple[list[_FlaxCell], bool | None]:
    """The cells of a module, the forward one first; and whether it is time-major, or None for a cell."""
    flax = _LIBRARIES[library]
    if isinstance(module, flax.Bidirectional):
        _check(library, "Bidirectional", module)
        names = ("forward_rnn", "backward_rnn")
        rnns = [getattr(module, name) for name in names]
        parts = [params.get(name, {}) for name in names]
        if not all(isinstance(rnn, flax.RNN) for rnn in rnns):
            got = listed(type(rnn).__name__ for rnn in rnns)
            raise TypeError(f"the two of a Bidirectional should be {library}.RNN, got {got}")
        if rnns[0].cell is rnns[1].cell:
            parts[1] = parts[0]  # Linen has them once
        if same := rnns[0].cell is rnns[1].cell or (library == "flax.nnx" and _same_params(*rnns)):
            _warn(f"a {library}.Bidirectional whose two directions have the same weights\n{_TIED[library]}")
        where = "RNN in a Bidirectional"
        cells = [_rnn(library, where, *each) for each in zip(rnns, parts, strict=True)]
        _warn_of_ties(library, {"": rnns[0]} if same else dict(zip(names, rnns, strict=True)))
        return cells, module.time_major
    rnn = isinstance(module, flax.RNN)
    cell = _rnn(library, "RNN", module, params) if rnn else _cell(library, module, params)
    _warn_of_ties(library, {"": module})
    return [cell], module.time_major if rnn else None


def _params_of(module: Any, path: tuple[str, ...] = (), above: tuple[int, ...] = ()) -> Iterator[tuple[str, int]]:
    """The places of an NNX module's parameters, and which they are, each time that one is there."""
    for name, value in vars(module).items():
        if isinstance(value, nnx.Param):
            yield ".".join((*path, name)), id(value)
        elif isinstance(value, nnx.Module) and id(value) not in above:
            yield from _params_of(value, (*path, name), (*above, id(module)))


def _same_params(one: Any, other: Any) -> bool:
    return dict(_params_of(one)) == dict(_params_of(other))


def _warn_of_ties(library: str, modules: Mapping[str, Any]) -> None:
    """Warn of parameters that NNX modules have at several places, if there are any."""
    places: dict[int, list[str]] = {}
    for name, module in modules.items() if library == "flax.nnx" else ():
        for place, key in _params_of(module, (name,) * bool(name)):
            places.setdefault(key, []).append(place)
    if tied := [listed(each) for each in places.values() if len(each) > 1]:
        _warn(f"one parameter at several places: {'; '.join(tied)}\n{_APART}")


def _rnn(library: str, name: str, rnn: Any, params: Mapping[str, Any]) -> _FlaxCell:
    _check(library, name, rnn)
    return _cell(library, rnn.cell, params.get("cell", {}))


def _cell(library: str, cell: Any, params: Mapping[str, Any]) -> _FlaxCell:
    name = type(cell).__name__
    if (library, name) not in DIALECTS or type(cell) is not getattr(_LIBRARIES[library], name):
        known = [name for where, name in DIALECTS if where == library]
        cause = f"module should be an RNN, a Bidirectional or one of {listed(known)}, got {name}"
        raise TypeError(f"{cause}\n{_SCANNED_CELL.format(_WEIGHTS_ALONE[library])}")
    dialect = DIALECTS[library, name]
    if library == "flax.linen":
        arrays, dtype = flatten_dict(params, sep="."), cell.dtype
    else:
        arrays, dtype = _of_layers({name: getattr(cell, name) for name in _layers(dialect)}, dialect)
        dialect = dialect.with_biases(arrays)
    arrays = {name: _array(array) for name, array in arrays.items()}
    if more := [f"{name} is {np.shape(array)}" for name, array in arrays.items() if np.ndim(array) > 2]:
        cause = f"{more[0]}, and should have two axes in a {dialect.title}"
        raise CheckpointError(f"{cause}\nof several that vmap stacked, convert each by vmap: {_MAPPED[library]}")
    weights = dialect.read(arrays)
    _report(TABLES[library, name], _settings(cell) | {"param_dtype": weights["weight_hh"].dtype.name})
    settings = {
        "input_size": weights["weight_ih"].shape[1],
        "hidden_size": weights["weight_hh"].shape[1],
        "bias": "bias_ih" in weights,
        "param_dtype": weights["weight_hh"].dtype,
        "dtype": None if dtype is None else jnp.dtype(dtype),
    }
    ours = _with_activations(dialect.kind, cell)
    if ours in (RNN_TANH, RNN_RELU):
        settings["nonlinearity"] = ours.name.removeprefix("RNN_").lower()
    elif ours not in (LSTM_CELL, GRU_CELL):
        settings["cell"] = ours
    return _FlaxCell(dialect.kind, settings, weights)


def _with_activations(kind: str, cell: Any) -> Cell:
    """Our cell with the activations of Flax's."""
    activation = ACTIVATIONS.get(cell.activation_fn, cell.activation_fn)
    if kind == "RNN":
        return rnn_cell(activation)
    make: Callable[..., Cell] = lstm_cell if kind == "LSTM" else gru_cell
    return make(activation, ACTIVATIONS.get(cell.gate_fn, cell.gate_fn))


def _of_layers(layers: Mapping[str, Any], dialect: Dialect) -> tuple[dict[str, Any], Any]:
    """The arrays of an NNX cell's layers, and the dtype in which they compute."""
    for name, layer in layers.items():
        if type(layer) is not nnx.Linear:
            cause = f"{name} of a {dialect.title} is of type {type(layer).__name__}"
            raise CheckpointError(f"{cause}\nput an nnx.Linear with the same result in its place")
    settings = [_settings(layer) for layer in layers.values()]
    if len({each["dtype"] for each in settings}) > 1:
        raise CheckpointError(f"the layers of a {dialect.title} have several dtypes\ngive them the same dtype")
    _report(TABLES["flax.nnx", "Linear"], *settings)
    arrays = {
        f"{name}.{leaf}": getattr(layer, leaf)[...]
        for name, layer in layers.items()
        for leaf in ("kernel", "bias")
        if getattr(layer, leaf) is not None
    }
    return arrays, next(iter(layers.values())).dtype


def _check(library: str, name: str, module: Any) -> None:
    """Report an RNN's or a Bidirectional's settings, and refuse a subclass that computes something else."""
    table, flax = TABLES[library, name], getattr(_LIBRARIES[library], name.partition(" ")[0])
    kind = type(module)
    if f"{kind.__module__}.{kind.__name__}" in _TRANSFORMED:
        kind = kind.__mro__[1]
    if kind.__call__ is not flax.__call__:
        cause = f"{type(module).__name__} has another __call__ than {library}.{flax.__name__}"
        raise CheckpointError(f"{cause}\nif it computes the same, give a {library}.{flax.__name__} of the same cells")
    _report(table, _settings(module))


def _settings(module: Any) -> dict[str, Any]:
    """The fields of a Linen module, or the attributes of an NNX one, with dtypes by their names."""
    names = [f.name for f in dataclasses.fields(module)] if isinstance(module, linen.Module) else list(vars(module))
    found = {name: getattr(module, name) for name in names if not name.startswith("_")}
    dtypes = {name: found[name] for name in ("dtype", "param_dtype", "preferred_element_type") if name in found}
    return found | {name: jnp.dtype(value).name for name, value in dtypes.items() if value is not None}


def _report(table: Table, *settings: Mapping[str, Any]) -> None:
    """Refuse, or warn of, the settings that are neither used nor plain, each once."""
    findings = {str(finding): finding for each in settings for finding in table.findings(each)}
    for text, finding in findings.items():
        message = f"{table.title} with {text}\n{finding.row.words}"
        if finding.refused:
            raise CheckpointError(message)
        _warn(message)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=level_outside())


def _built(library: str, name: str, settings: dict[str, Any], params: Mapping[str, Any], rngs: nnx.Rngs | None) -> Any:
    arrays = {key: jnp.asarray(array) for key, array in params.items()}
    if library == "flax.linen":
        return getattr(jaxrnn.linen, name)(**settings), {"params": arrays}
    ours = getattr(jaxrnn.nnx, name)(**settings, rngs=rngs or nnx.Rngs(0))
    for key, array in arrays.items():
        getattr(ours, key).set_value(array)
    return ours


def _from_weights(weights: Mapping[str, Any], rngs: nnx.Rngs | None, batch_first: bool | None) -> Any:
    """As `from_flax`, of the weights of one module, or of several that `jax.vmap` stacked."""
    others: list[str] = []
    if isinstance(weights, Described):  # which a file held
        params: Mapping[str, Any] = weights
    else:
        tree = nnx.to_pure_dict(weights) if isinstance(weights, nnx.State) else linen.unbox(_pure(weights))
        named = Names[Any](_ONE_PART)
        for path, array in flatten_dict(tree).items():
            named.put(".".join(map(str, path)), array, "/".join(map(str, path)))
        arrays = {name: _array(value) for name, value in named.items()}
        others = [name for name, array in arrays.items() if not jnp.issubdtype(dtype_of(array), jnp.floating)]
        params = {name: array for name, array in arrays.items() if name not in others}
    cells, beside, axes = stacked_cells(params)
    found: list[tuple[str, FoundRNN]] = []

    def read(params: Mapping[str, Any]) -> dict[str, Any]:
        library, rnn, arrays = _read(params, [*beside, *others] if axes else others)
        found.append((library, rnn))
        return arrays

    for _ in range(axes):
        read = jax.vmap(read)
    arrays = read(with_library(cells)[1] if axes else params)
    [(library, rnn)] = found
    settings = rnn.arguments | {"param_dtype": rnn.dtype}
    if batch_first is not None:
        settings["batch_first"] = batch_first
    elif "batch_first" in rnn.assumed:
        cause = f"weights alone do not say which axis of x is time: batch_first={rnn.assumed['batch_first']} is assumed"
        _warn(
            f"{cause}\ngive batch_first=True, as Flax's RNN has it, or batch_first=False, as a scan over axis 0 has it"
        )
    return _built(library, rnn.class_name, settings, arrays, rngs)


def _read(params: Mapping[str, Any], others: list[str]) -> tuple[str, FoundRNN, dict[str, Any]]:
    """The library and the one recurrent module of weights, and its arrays by torch's names."""
    tensors = with_torchs_names(params)
    found, origins = find_rnns(tensors), origins_of(tensors)
    if len(found) != 1 or found[0].prefix not in origins:
        there = f"the cells {listed(map(repr, origins))}" if origins else f"no cell; the names are {listed(params)}"
        cause = f"the weights should be those of one recurrent module of Flax, and hold {there}"
        raise CheckpointError(f"{cause}\n{_ONE_PART}")
    [rnn] = found
    names = {name: rnn.prefix + name for name in rnn.spec.shapes()}
    others = [name for name in others if not RANDOM_STATE.search(name)]
    if beside := [name for name in tensors if name not in names.values()] + others:
        cause = f"beside the weights of {origins[rnn.prefix].title} there are {listed(beside)}, which are not converted"
        _warn(f"{cause}\nif the module computes with it, do the same around ours; {_ONE_PART}")
    library = "flax.linen" if origins[rnn.prefix].title.startswith("flax.linen.") else "flax.nnx"
    return library, rnn, {name: tensors[key] for name, key in names.items()}


def _array(value: Any) -> Any:
    """The array of a variable of NNX, or an array."""
    return value[...] if isinstance(value, nnx.Variable) else value


def _pure(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights without the states in them, as in `dict(nnx.state(module))`."""
    return {name: nnx.to_pure_dict(each) if isinstance(each, nnx.State) else each for name, each in weights.items()}
