"""Flax's recurrent modules, and their weights, as ours."""

import inspect
import re
from collections.abc import Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.traverse_util import flatten_dict

import jaxrnn.linen
import jaxrnn.nnx
from jaxrnn.checkpoint.dialects import DIALECTS, Dialect, Weights
from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.find import find_rnns
from jaxrnn.checkpoint.named import Described, said_of

_ONE_BY_ONE = "convert its cells one by one: jaxrnn.from_flax(module.forward_rnn.cell)"


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
def from_flax(module: Any, variables: Mapping[str, Any] | None = None, rngs: nnx.Rngs | None = None) -> Any: ...
def from_flax(module: Any, variables: Mapping[str, Any] | None = None, rngs: nnx.Rngs | None = None) -> Any:
    """Convert a recurrent module of Flax: the same weights in ours, with the same results.

    Flax has one bias where torch has two. The second, of zeros, is trained too: to train exactly as Flax does, freeze
    `bias_ih` of an LSTM, `bias_hh` of a GRU or RNN.

    Args:
        module: of flax.nnx, an RNN, a Bidirectional of two, or an LSTMCell, OptimizedLSTMCell, GRUCell or SimpleCell;
            or of flax.linen the same, with its variables. Or the weights of one such module alone: Linen's variables or
            an NNX state, nested or with dotted names. They are taken for layers with the usual activations.
        variables: those of a Linen module, as from `module.init`.
        rngs: nnx.Rngs for the new NNX module; `nnx.Rngs(0)` if None.

    Returns:
        For an NNX module, ours: an RNN, LSTM or GRU, with `batch_first` unless it is time-major, or an RNNCell,
        LSTMCell or GRUCell. For a Linen module, ours and its variables, `{"params": ...}`. Ours are called as torch's:
        h comes before c in a state, and the output before the state.

    Raises:
        TypeError: another module, or a Linen module without variables.
        CheckpointError: settings that torch does not have, such as another activation.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> theirs = nnx.RNN(nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)))
    >>> ours = jaxrnn.from_flax(theirs)
    >>> x = jnp.ones((2, 5, 3))
    >>> bool(jnp.allclose(ours(x)[0], theirs(x), atol=1e-6))
    True
    """
    if isinstance(module, Mapping):
        return _from_weights(module, rngs)
    library: Any = linen if isinstance(module, linen.Module) else nnx
    if library is linen and variables is None:
        raise TypeError("variables should be what the Linen module's init returned, got None")
    params = {} if variables is None else dict(variables["params"])
    if isinstance(module, library.Bidirectional):
        default = inspect.signature(library.Bidirectional.__init__).parameters["merge_fn"].default
        if module.merge_fn is not default:
            raise CheckpointError(f"a Bidirectional with another merge_fn than Flax's default\n{_ONE_BY_ONE}")
        names = ("forward_rnn", "backward_rnn")
        layers = [_cell(library, getattr(module, name).cell, params.get(name, {}).get("cell", {})) for name in names]
        dtype = module.forward_rnn.cell.dtype
        time_major = module.time_major or module.forward_rnn.time_major
    elif isinstance(module, library.RNN):
        if module.reverse:
            raise CheckpointError(
                "an RNN with reverse=True\nmake it without, and flip its input along time: jax.numpy.flip"
            )
        layers, time_major = [_cell(library, module.cell, params.get("cell", {}))], module.time_major
        dtype = module.cell.dtype
    else:
        layers, time_major, dtype = [_cell(library, module, params)], None, getattr(module, "dtype", None)
    dialect, nonlinearity, weights = layers[0]
    if any(layer[:2] != (dialect, nonlinearity) for layer in layers):
        raise CheckpointError(f"a Bidirectional of two different cells\n{_ONE_BY_ONE}")
    settings: dict[str, Any] = {"nonlinearity": nonlinearity} if dialect.kind == "RNN" else {}
    settings |= {"input_size": weights["weight_ih"].shape[1], "hidden_size": weights["weight_hh"].shape[1]}
    settings |= {"param_dtype": weights["weight_hh"].dtype, "dtype": dtype}
    if time_major is not None:
        settings |= {"batch_first": not time_major, "bidirectional": len(layers) == 2}
    name = dialect.kind + ("Cell" if time_major is None else "")
    suffixes = [""] if time_major is None else ["_l0", "_l0_reverse"]
    converted = {
        role + suffix: array
        for suffix, (_, _, arrays) in zip(suffixes, layers, strict=False)
        for role, array in arrays.items()
    }
    return _built(library, name, settings, converted, rngs)


def _built(library: Any, name: str, settings: dict[str, Any], params: Mapping[str, Any], rngs: nnx.Rngs | None) -> Any:
    arrays = {key: jnp.asarray(array) for key, array in params.items()}
    if library is linen:
        return getattr(jaxrnn.linen, name)(**settings), {"params": arrays}
    ours = getattr(jaxrnn.nnx, name)(**settings, rngs=rngs or nnx.Rngs(0))
    for key, array in arrays.items():
        getattr(ours, key)[...] = array
    return ours


def _from_weights(weights: Mapping[str, Any], rngs: nnx.Rngs | None) -> Any:
    """As `from_flax`, of the weights of one module."""
    tree = nnx.to_pure_dict(weights) if isinstance(weights, nnx.State) else linen.unbox(dict(weights))
    named = {".".join(map(str, path)): array for path, array in flatten_dict(tree).items()}
    flat = {name: np.asarray(array) for name, array in named.items() if jnp.issubdtype(array.dtype, jnp.floating)}
    cells, params = flax_cells(flat), with_torchs_names(flat)
    found = find_rnns(params)
    if len(found) != 1 or not cells:
        there = f"the cells {listed(cells)}" if cells else f"no cell; the names are {listed(flat)}"
        cause = f"the weights should be those of one recurrent module of Flax, and hold {there}"
        raise CheckpointError(f"{cause}\ngive the part of them that belongs to one module")
    [rnn] = found
    settings = rnn.arguments | {"batch_first": True, "param_dtype": rnn.dtype}
    arrays = {name: params[rnn.prefix + name] for name in rnn.spec.shapes()}
    library = linen if any(library == "flax.linen" for library, _, _ in cells.values()) else nnx
    return _built(library, rnn.class_name, settings, arrays, rngs)


def flax_cells(tensors: Mapping[str, Any]) -> dict[str, tuple[str, Dialect, dict[str, Any]]]:
    """The cells of Flax in a flat dict, by prefix: Flax's module, the dialect, and the arrays by name."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        prefix, _, leaf = key.rpartition(".")
        above, _, layer = prefix.rpartition(".")
        groups.setdefault(f"{above}." * bool(above), {})[f"{layer}.{leaf}"] = value
    found = {}
    for prefix, arrays in groups.items():
        for (library, _), dialect in DIALECTS.items():
            if library.startswith("flax.") and dialect.fits(arrays):
                found[prefix] = library, dialect, arrays
                break
    return found


def with_torchs_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A flat dict in which the weights of Flax's cells have torch's names and layouts, each as a layer.

    The two of a Bidirectional are one layer. Its prefix, and that of an RNN, is without the names inside it.
    """
    cells = flax_cells(tensors)
    converted = Described(tensors, said_of(tensors))
    for prefix, (_, dialect, arrays) in cells.items():
        for name in arrays:
            del converted[prefix + name]
        short = _INSIDE.sub("", f".{prefix}").removeprefix(".")
        suffix = "_l0_reverse" if "backward_rnn." in prefix else "_l0"
        converted |= {f"{short}{role}{suffix}": array for role, array in dialect.read(arrays).items()}
    return converted


# What RNN and Bidirectional add to names, and the collection of Linen's.
_INSIDE = re.compile(r"(?<=\.)((forward_rnn|backward_rnn)\.)?cell\.$|(?<=^\.)params\.")


def _cell(library: Any, cell: Any, params: Mapping[str, Any]) -> tuple[Dialect, str, Weights]:
    name = f"flax.{library.__name__.rpartition('.')[2]}", type(cell).__name__
    if name not in DIALECTS or type(cell) is not getattr(library, name[1]):
        known = [key[1] for key in DIALECTS if key[0] == name[0]]
        raise TypeError(
            f"module should be an RNN, a Bidirectional or one of {listed(known)}, got {type(cell).__name__}"
        )
    dialect = DIALECTS[name]
    activations = {jnp.tanh: "tanh", nnx.tanh: "tanh", jax.nn.relu: "relu", nnx.relu: "relu"}
    nonlinearity = activations.get(cell.activation_fn, "")
    gate = getattr(cell, "gate_fn", jax.nn.sigmoid)
    if (
        nonlinearity not in dialect.nonlinearities
        or gate not in (jax.nn.sigmoid, nnx.sigmoid)
        or getattr(cell, "residual", False)
    ):
        remedy = "write a cell of your own: see jaxrnn.Cell"
        raise CheckpointError(f"{dialect.title} with activations that torch does not have\n{remedy}")
    if library is nnx:
        arrays = {".".join(map(str, path)): a for path, a in nnx.to_flat_state(nnx.state(cell, nnx.Param))}
        arrays = {path: a[...] for path, a in arrays.items()}
    else:
        arrays = {".".join(path): a for path, a in flatten_dict(params).items()}
    return dialect, nonlinearity, dialect.read({path: np.asarray(a) for path, a in arrays.items()})
