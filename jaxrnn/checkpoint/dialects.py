"""A table of how other libraries store the weights of one layer in one direction; conversion to torch's, and back.

Each library lays the same numbers out in its own way: the order of the gates, transposed or not, and one bias or two.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from jaxrnn.checkpoint.arrays import to_numpy
from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.spec import Spec

Weights = dict[str, NDArray[Any]]  # torch's, by role: weight_ih, weight_hh, bias_ih, bias_hh
_ArrayT = TypeVar("_ArrayT")
_GATES = {"LSTM": "ifgo", "GRU": "rzn", "RNN": "h"}  # torch's order
_APART = {"GRU": "n"}  # the gate whose two biases do not add up


class Entry(NamedTuple):
    """One array of a dialect.

    Attributes:
        name: what it is called there, dotted.
        sources: "i" for weights of the input, "h" for weights of the state, "ih" for both in one array: weights joined
            along the features, biases stacked.
        gates: the gates in it, in their order.
        bias: whether it holds biases.
        transposed: whether weights have the features first.
        flat: whether the biases of two sources are joined end to end, and not stacked.
    """

    name: str
    sources: str
    gates: str
    bias: bool = False
    transposed: bool = True
    flat: bool = False


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a library stores a kind of layer.

    Attributes:
        title: the class in that library.
        kind: "LSTM", "GRU" or "RNN".
        entries: its arrays.
        added: what the library adds to the bias of a gate when it computes.
        nonlinearities: those of an RNN that it can have.
    """

    title: str
    kind: str
    entries: tuple[Entry, ...]
    added: Mapping[str, float] = dataclasses.field(default_factory=dict)
    nonlinearities: tuple[str, ...] = ("tanh",)

    def write(self, weights: Mapping[str, Any]) -> Weights:
        """Convert torch's weights of one layer in one direction.

        Args:
            weights: by role, such as `{role: params[name] for role, name in spec.names(0, 0).items()}`; biases may be
                missing.

        Returns:
            The arrays by name, in their dtypes; biases are added up in float64.

        Raises:
            CheckpointError: the library has no place for a number; the message says how large it is.
        """
        arrays = {role: to_numpy(role, value) for role, value in weights.items()}
        gates = _GATES[self.kind]
        if others := arrays.keys() - {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}:
            raise CheckpointError(
                f"{self.title} has no {listed(others)}\ngive weight_ih, weight_hh, bias_ih and bias_hh alone"
            )
        no_bias = np.zeros(len(arrays["weight_ih"]), arrays["weight_ih"].dtype)
        parts: dict[tuple[str, str, bool], NDArray[Any]] = {}
        for source in "ih":
            for bias in (False, True):
                whole = arrays.get(f"bias_{source}h", no_bias) if bias else arrays[f"weight_{source}h"]
                each = zip(gates, np.split(whole, len(gates)), strict=True)
                parts |= {(source, gate, bias): part for gate, part in each}
        for gate in gates:
            self._join_biases(gate, parts)
        return {entry.name: _joined(entry, parts) for entry in self.entries}

    def read(self, arrays: Mapping[str, Any]) -> Weights:
        """Convert the library's arrays of one layer in one direction to torch's weights, by role.

        Without any bias among the arrays, as of a layer with use_bias=False, there is none in the result.

        Raises:
            CheckpointError: an array is missing, or its shape does not fit.
        """
        bias = bool(self.added) or any(entry.bias and entry.name in arrays for entry in self.entries)
        entries = [entry for entry in self.entries if bias or not entry.bias]
        if missing := [entry.name for entry in entries if entry.name not in arrays]:
            raise CheckpointError(
                f"{self.title} should have {listed(missing)}, which is not there\nthe arrays given: {listed(arrays)}"
            )
        gates, parts = _GATES[self.kind], dict[tuple[str, str, bool], NDArray[Any]]()
        state = next(entry for entry in entries if "h" in entry.sources and not entry.bias)
        rows = tuple(arrays[state.name].shape)[1 if state.transposed else 0 :][:1]
        hidden = sum(rows) // len(state.gates)
        for entry in entries:
            try:
                parts |= _parted(entry, to_numpy(entry.name, arrays[entry.name]), hidden)
            except ValueError as error:
                shape = tuple(arrays[entry.name].shape)
                cause = f"{entry.name} of {self.title} is {shape}, which does not fit hidden_size={hidden}"
                raise CheckpointError(f"{cause}\ngive the arrays of one layer in one direction") from error
        zero = np.zeros(hidden, next(iter(parts.values())).dtype)
        for gate, amount in self.added.items():  # in the bias that only torch has: a sum would be rounded
            other = "h" if self._holders(gate) == ["i"] else "i"
            parts[other, gate, True] = np.full_like(zero, amount)
        return {
            f"{'bias' if bias else 'weight'}_{source}h": np.concatenate(
                [parts.get((source, gate, bias), zero) for gate in gates]
            )
            for bias in ((False, True) if bias else (False,))
            for source in "ih"
        }

    def fits(self, arrays: Mapping[str, Any]) -> bool:
        """Whether arrays have the names of this class, and the state's weights as many gates."""
        if {entry.name for entry in self.entries} != arrays.keys():
            return False
        state = next(entry for entry in self.entries if "h" in entry.sources and not entry.bias)
        shape = tuple(arrays[state.name].shape)[:: -1 if state.transposed else 1]
        if len(shape) != 2:
            return False
        hidden, rest = divmod(shape[0], len(state.gates))
        return rest == 0 and bool(shape[1] == hidden if state.sources == "h" else shape[1] >= hidden)

    def with_biases(self, arrays: Mapping[str, Any]) -> "Dialect":
        """The same dialect with a bias for each kernel whose bias is among the arrays, and with no other bias."""
        entries = []
        for kernel in self.entries:
            bias = kernel.name.replace("kernel", "bias")
            entries += [] if kernel.bias else [kernel]
            entries += [] if kernel.bias or bias not in arrays else [kernel._replace(name=bias, bias=True)]
        return dataclasses.replace(self, entries=tuple(entries))

    def has(self, params: Mapping[str, Any]) -> dict[str, NDArray[np.bool_]]:
        """Where the library has a number of its own, too: everywhere but in the biases that only torch has.

        These are zeros after `read`, or the constant that the library adds. To train as the library does, keep their
        gradients 0: see examples/from_flax.md.

        Args:
            params: those of one of our modules, by torch's names; only the shapes are read.

        Returns:
            By name an array of bools, of the parameter's shape.

        >>> import jax, jaxrnn
        >>> from jaxrnn.checkpoint.dialects import DIALECTS
        >>> spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 1, 2)
        >>> DIALECTS["flax.linen", "GRUCell"].has(spec.init(jax.random.key(0)))["bias_hh_l0"]
        array([False, False, False, False,  True,  True])
        """
        gates = _GATES[self.kind]
        held = {f"bias_{source}h": [source in self._holders(gate) for gate in gates] for source in "ih"}
        found = {}
        for name, array in params.items():
            rows = held.get(name.partition("_l")[0], [True] * len(gates))
            shape = np.shape(array)
            each = np.repeat(rows, shape[0] // len(gates)).reshape(-1, *[1] * (len(shape) - 1))
            found[name] = np.array(np.broadcast_to(each, shape))
        return found

    def _join_biases(self, gate: str, parts: dict[tuple[str, str, bool], NDArray[Any]]) -> None:
        """Where the library has one bias for a gate, add the other to it, or refuse to lose it; less what it adds."""
        holders = self._holders(gate)
        if len(holders) == 2:
            return
        held, other = (holders[0], gate, True), ("h" if holders == ["i"] else "i", gate, True)
        amount = self.added.get(gate, 0)
        if not amount and not np.any(parts[other] != 0):
            return
        if gate in _APART.get(self.kind, ""):
            worst = float(np.max(np.abs(parts[other])))
            cause = f"{self.title} has no second bias for the gate {gate}: numbers up to {worst:.3g} would be lost"
            raise CheckpointError(f"{cause}\nuse a cell that has it, such as flax.linen.GRUCell")
        parts[held] = (parts[held].astype(np.float64) + parts[other] - amount).astype(parts[held].dtype)

    def _holders(self, gate: str) -> list[str]:
        """Which of "i" and "h" have a bias for this gate."""
        return [source for source in "ih" for e in self.entries if e.bias and source in e.sources and gate in e.gates]


def _joined(entry: Entry, parts: Mapping[tuple[str, str, bool], NDArray[Any]]) -> NDArray[Any]:
    each = [np.concatenate([parts[source, gate, entry.bias] for gate in entry.gates]) for source in entry.sources]
    if entry.bias:
        return np.concatenate(each) if entry.flat or len(each) == 1 else np.stack(each)
    return np.concatenate([a.T for a in each]) if entry.transposed else np.concatenate(each, axis=1)


def _parted(entry: Entry, array: NDArray[Any], hidden: int) -> dict[tuple[str, str, bool], NDArray[Any]]:
    """The inverse of `_joined`."""
    if entry.bias:
        each = (
            np.split(array, len(entry.sources)) if entry.flat else [array] if len(entry.sources) == 1 else list(array)
        )
    else:
        array = array.T if entry.transposed else array
        each = [array] if len(entry.sources) == 1 else np.split(array, [array.shape[1] - hidden], axis=1)
    found: dict[tuple[str, str, bool], NDArray[Any]] = {}
    for source, whole in zip(entry.sources, each, strict=True):
        fits = whole.ndim == 1 if entry.bias else whole.ndim == 2 and (source == "i" or whole.shape[1] == hidden)
        if not fits or len(whole) != len(entry.gates) * hidden:
            raise ValueError
        found |= {
            (source, g, entry.bias): part
            for g, part in zip(entry.gates, np.split(whole, len(entry.gates)), strict=True)
        }
    return found


def _gate_by_gate(gates: str, biases: str, rename: Mapping[str, str] | None = None) -> tuple[Entry, ...]:
    """Flax's layers named `ii`, `hi` and so on: a kernel each, and a bias where `biases` names it."""
    entries = []
    for source in "ih":
        for gate in gates:
            layer = (rename or {}).get(source + gate, source + gate)
            entries.append(Entry(f"{layer}.kernel", source, gate))
            if source + gate in biases.split():
                entries.append(Entry(f"{layer}.bias", source, gate, bias=True))
    return tuple(entries)


def _together(gates: str, bias: str, names: tuple[str, str, str], **more: Any) -> tuple[Entry, ...]:
    """All gates in one array: kernels of the input and of the state, and biases."""
    inputs, state, biases = names
    kernels = Entry(inputs, "i", gates, **more), Entry(state, "h", gates, **more)
    return (*kernels, Entry(biases, bias, gates, bias=True))


_LSTM_BIASES = "hi hf hg ho"
_DENSE = "dense_i.kernel", "dense_h.kernel"
_KERAS = "kernel", "recurrent_kernel", "bias"
_EQUINOX = functools.partial(_together, names=("weight_ih", "weight_hh", "bias"), transposed=False)


def _onnx(gates: str) -> tuple[Entry, ...]:
    """One direction of what an ONNX node has; there, directions have the first axis."""
    kernels = Entry("W", "i", gates, transposed=False), Entry("R", "h", gates, transposed=False)
    return (*kernels, Entry("B", "ih", gates, bias=True, flat=True))


# By library and class.
DIALECTS: dict[tuple[str, str], Dialect] = {
    ("flax.linen", "LSTMCell"): Dialect("flax.linen.LSTMCell", "LSTM", _gate_by_gate("ifgo", _LSTM_BIASES)),
    ("flax.linen", "OptimizedLSTMCell"): Dialect(
        "flax.linen.OptimizedLSTMCell", "LSTM", _gate_by_gate("ifgo", _LSTM_BIASES)
    ),
    ("flax.linen", "GRUCell"): Dialect("flax.linen.GRUCell", "GRU", _gate_by_gate("rzn", "ir iz in hn")),
    ("flax.linen", "SimpleCell"): Dialect(
        "flax.linen.SimpleCell", "RNN", _gate_by_gate("h", "ih", {"ih": "i", "hh": "h"}), {}, ("tanh", "relu")
    ),
    ("flax.nnx", "LSTMCell"): Dialect("flax.nnx.LSTMCell", "LSTM", _gate_by_gate("ifgo", _LSTM_BIASES, {"if": "if_"})),
    ("flax.nnx", "OptimizedLSTMCell"): Dialect(
        "flax.nnx.OptimizedLSTMCell", "LSTM", _together("ifgo", "h", (*_DENSE, "dense_h.bias"))
    ),
    ("flax.nnx", "GRUCell"): Dialect("flax.nnx.GRUCell", "GRU", _together("rzn", "i", (*_DENSE, "dense_i.bias"))),
    ("flax.nnx", "SimpleCell"): Dialect(
        "flax.nnx.SimpleCell", "RNN", _together("h", "i", (*_DENSE, "dense_i.bias")), {}, ("tanh", "relu")
    ),
    ("keras", "LSTM"): Dialect("keras.layers.LSTM", "LSTM", _together("ifgo", "i", _KERAS)),
    ("keras", "GRU"): Dialect("keras.layers.GRU(reset_after=True)", "GRU", _together("zrn", "ih", _KERAS)),
    ("keras", "SimpleRNN"): Dialect("keras.layers.SimpleRNN", "RNN", _together("h", "i", _KERAS), {}, ("tanh", "relu")),
    ("haiku", "LSTM"): Dialect(
        "haiku.LSTM",
        "LSTM",
        (Entry("linear.w", "ih", "igfo"), Entry("linear.b", "i", "igfo", bias=True)),
        {"f": 1.0},  # which haiku adds to the forget gate
    ),
    ("haiku", "VanillaRNN"): Dialect(
        "haiku.VanillaRNN",
        "RNN",
        (
            Entry("linear.w", "i", "h"),
            Entry("linear.b", "i", "h", bias=True),
            Entry("linear_1.w", "h", "h"),
            Entry("linear_1.b", "h", "h", bias=True),
        ),
        {},
        ("relu",),
    ),
    ("equinox", "LSTMCell"): Dialect("equinox.nn.LSTMCell", "LSTM", _EQUINOX("ifgo", "i")),
    ("equinox", "GRUCell"): Dialect(
        "equinox.nn.GRUCell", "GRU", (*_EQUINOX("rzn", "i"), Entry("bias_n", "h", "n", bias=True))
    ),
    ("onnx", "LSTM"): Dialect("ONNX's LSTM", "LSTM", _onnx("iofg")),
    ("onnx", "GRU"): Dialect("ONNX's GRU (linear_before_reset=1)", "GRU", _onnx("zrn")),
    ("onnx", "RNN"): Dialect("ONNX's RNN", "RNN", _onnx("h"), {}, ("tanh", "relu")),
}


def to_flat(spec: Spec, params: Mapping[str, _ArrayT]) -> _ArrayT:
    """All weights of layers in one array, as cuDNN takes them: all weights by layer and direction, then all biases.

    That is what `jax.experimental.rnn` calls weights, and what torch makes of its own on a GPU.

    Args:
        spec: the layers' settings, without a projection.
        params: from name to array of numpy or jax; inside jit, too. Without biases, theirs are zeros.

    Returns:
        A one-dimensional array of the same library and dtype.

    Raises:
        CheckpointError: the layers have a projection, or parameters of their own.

    >>> import jax, jaxrnn
    >>> spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, 2, 3)
    >>> jaxrnn.checkpoint.dialects.to_flat(spec, spec.init(jax.random.key(0))).shape  # 12 * 2 + 12 * 3 + 12 + 12
    (84,)
    """
    shapes, arrays = _flat_shapes(spec), dict[str, Any](params)
    library = next(iter(arrays.values())).__array_namespace__()
    dtype = next(iter(arrays.values())).dtype
    return library.concatenate(
        [arrays[name].reshape(-1) if name in arrays else library.zeros(shape, dtype) for name, shape in shapes.items()]
    )


def from_flat(spec: Spec, flat: _ArrayT) -> dict[str, _ArrayT]:
    """The inverse of `to_flat`: the parameters by torch's names.

    Args:
        spec: the layers' settings, without a projection.
        flat: all weights and biases in one array; with `bias=False` the biases may be missing.

    Raises:
        CheckpointError: the array has another size; with `bias=False` a bias is not zero; or as `to_flat`.

    >>> import numpy as np, jaxrnn
    >>> spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 2, 3, bias=False)
    >>> params = jaxrnn.checkpoint.dialects.from_flat(spec, np.zeros(9 * 2 + 9 * 3))
    >>> {name: array.shape for name, array in params.items()}
    {'weight_ih_l0': (9, 2), 'weight_hh_l0': (9, 3)}
    """
    shapes = _flat_shapes(spec)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    array: Any = flat
    weights = sum(size for name, size in sizes.items() if name.startswith("weight"))
    if array.ndim != 1 or (array.size != total and (spec.bias or array.size != weights)):
        cause = f"flat is of shape {array.shape}, should be {(total,)} for {spec}"
        raise CheckpointError(f"{cause}\ngive the spec of the module that it comes from")
    if not spec.bias and np.any(biases := np.asarray(array[weights:])):
        cause = f"flat has biases up to {np.max(np.abs(biases)):.3g}, which bias=False would lose"
        raise CheckpointError(f"{cause}\ngive a spec with bias=True")
    found, begin = {}, 0
    for name, shape in shapes.items():
        if name in spec.shapes():
            found[name] = array[begin : begin + sizes[name]].reshape(shape)
        begin += sizes[name]
    return {name: found[name] for name in spec.shapes()}


def _flat_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """The shapes by torch's names, in cuDNN's order, always with biases."""
    if spec.proj_size or spec.cell.own:
        cause = "proj_size" if spec.proj_size else listed(spec.cell.own)
        raise CheckpointError(
            f"cuDNN's layout has no place for {cause}\nsave the weights by name instead: jaxrnn.checkpoint.save"
        )
    shapes = dataclasses.replace(spec, bias=True).shapes()
    return {name: shapes[name] for name in sorted(shapes, key=lambda name: name.startswith("bias"))}
