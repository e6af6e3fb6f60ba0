"""A table of how other libraries store the weights of one layer in one direction; conversion to torch's, and back.

Each library lays the same numbers out in its own way: the order of the gates, transposed or not, and one bias or two.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrnn._compat import is_traced
from jaxrnn.checkpoint.arrays import with_library
from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.spec import Spec

Weights = dict[str, NDArray[Any]]  # torch's, by role: weight_ih, weight_hh, bias_ih, bias_hh
_ArrayT = TypeVar("_ArrayT")
_GATES = {"LSTM": "ifgo", "GRU": "rzn", "RNN": "h"}  # torch's order
_APART = {"GRU": "n"}  # the gate whose two biases do not add up
_ROLES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_ONE_LAYER = "give the arrays of one layer in one direction, or map this over the axes before theirs by jax.vmap"


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
            The arrays by name, in their dtypes; biases are added up in float64. Inside jit and vmap these are jax
            arrays, and biases are added up in float32 unless jax_enable_x64 is set.

        Raises:
            CheckpointError: the library has no place for a number; the message says how large it is. Inside jit and
                vmap, where numbers are not known: it has no place for an array. Or weights do not fit together.
        """
        library, arrays = with_library(weights)
        gates = _GATES[self.kind]
        if others := arrays.keys() - _ROLES:
            raise CheckpointError(
                f"{self.title} has no {listed(others)}\ngive weight_ih, weight_hh, bias_ih and bias_hh alone"
            )
        if missing := [role for role in _ROLES[:2] if role not in arrays]:
            raise CheckpointError(f"{self.title} needs {listed(missing)}\ngive the weights of one layer by role")
        rows = len(gates) * arrays["weight_hh"].shape[-1]
        for role, array in arrays.items():
            if array.ndim != (1 if role.startswith("bias") else 2) or len(array) != rows:
                cause = f"{role} is {array.shape}, which does not fit weight_hh of {arrays['weight_hh'].shape}"
                raise CheckpointError(f"{cause}\n{_ONE_LAYER}")
        no_bias = np.zeros(rows, arrays["weight_ih"].dtype)
        parts: dict[tuple[str, str, bool], Any] = {}
        for source in "ih":
            for bias in (False, True):
                whole = arrays.get(f"bias_{source}h", no_bias) if bias else arrays[f"weight_{source}h"]
                each = zip(gates, _split(whole, len(gates)), strict=True)
                parts |= {(source, gate, bias): part for gate, part in each}
        for gate in gates:
            self._join_biases(gate, parts, np.float64 if library is np else jnp.result_type(float))
        return {entry.name: _joined(entry, parts, library) for entry in self.entries}

    def read(self, arrays: Mapping[str, Any]) -> Weights:
        """Convert the library's arrays of one layer in one direction to torch's weights, by role.

        Without any bias among the arrays, as of a layer with use_bias=False, there is none in the result. Inside jit
        and vmap these are jax arrays.

        Raises:
            CheckpointError: an array is missing, or its shape does not fit.
        """
        bias = bool(self.added) or any(entry.bias and entry.name in arrays for entry in self.entries)
        entries = [entry for entry in self.entries if bias or not entry.bias]
        if missing := [entry.name for entry in entries if entry.name not in arrays]:
            raise CheckpointError(
                f"{self.title} should have {listed(missing)}, which is not there\nthe arrays given: {listed(arrays)}"
            )
        library, arrays = with_library({entry.name: arrays[entry.name] for entry in entries})
        gates, parts = _GATES[self.kind], dict[tuple[str, str, bool], Any]()
        state = next(entry for entry in entries if "h" in entry.sources and not entry.bias)
        rows = arrays[state.name].shape[1 if state.transposed else 0 :][:1]
        hidden = sum(rows) // len(state.gates)
        for entry in entries:
            try:
                parts |= _parted(entry, arrays[entry.name], hidden)
            except ValueError as error:
                shape = arrays[entry.name].shape
                cause = f"{entry.name} of {self.title} is {shape}, which does not fit hidden_size={hidden}"
                raise CheckpointError(f"{cause}\n{_ONE_LAYER}") from error
        if len({part.shape for (source, _, bias), part in parts.items() if source == "i" and not bias}) > 1:
            names = listed(entry.name for entry in entries if "i" in entry.sources and not entry.bias)
            raise CheckpointError(f"{names} of {self.title} are of different input sizes\n{_ONE_LAYER}")
        zero = np.zeros(hidden, next(iter(parts.values())).dtype)
        for gate, amount in self.added.items():  # in the bias that only torch has: a sum would be rounded
            other = "h" if self._holders(gate) == ["i"] else "i"
            parts[other, gate, True] = np.full_like(zero, amount)
        return {
            f"{'bias' if bias else 'weight'}_{source}h": library.concatenate(
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

        Raises:
            CheckpointError: a shape is that of several modules' parameters.

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
            if len(shape) != (1 if name.startswith("bias") else 2) or shape[0] % len(gates):
                raise CheckpointError(f"{name} is {shape}, which is no array of a layer of {self.title}\n{_ONE_LAYER}")
            each = np.repeat(rows, shape[0] // len(gates)).reshape(-1, *[1] * (len(shape) - 1))
            found[name] = np.array(np.broadcast_to(each, shape))
        return found

    def _join_biases(self, gate: str, parts: dict[tuple[str, str, bool], Any], wide: Any) -> None:
        """Where the library has one bias for a gate, add the other to it, or refuse to lose it; less what it adds."""
        holders = self._holders(gate)
        if len(holders) == 2:
            return
        held, other = (holders[0], gate, True), ("h" if holders == ["i"] else "i", gate, True)
        amount, traced = self.added.get(gate, 0), is_traced(parts[other])
        if not amount and not traced and not np.any(parts[other] != 0):
            return
        if gate in _APART.get(self.kind, "") and traced:
            cause = f"{self.title} has no second bias for the gate {gate}, and jit or vmap hides whether bias_hh is 0"
            raise CheckpointError(f"{cause}\nif it is 0, give the weights without bias_hh; else write outside of both")
        if gate in _APART.get(self.kind, ""):
            worst = float(np.max(np.abs(parts[other])))
            cause = f"{self.title} has no second bias for the gate {gate}: numbers up to {worst:.3g} would be lost"
            raise CheckpointError(f"{cause}\nuse a cell that has it, such as flax.linen.GRUCell")
        parts[held] = (parts[held].astype(wide) + parts[other].astype(wide) - amount).astype(parts[held].dtype)

    def _holders(self, gate: str) -> list[str]:
        """Which of "i" and "h" have a bias for this gate."""
        return [source for source in "ih" for e in self.entries if e.bias and source in e.sources and gate in e.gates]


def _joined(entry: Entry, parts: Mapping[tuple[str, str, bool], Any], library: Any) -> Any:
    each = [library.concatenate([parts[source, gate, entry.bias] for gate in entry.gates]) for source in entry.sources]
    if entry.bias:
        return library.concatenate(each) if entry.flat or len(each) == 1 else library.stack(each)
    return library.concatenate([a.T for a in each]) if entry.transposed else library.concatenate(each, axis=1)


def _parted(entry: Entry, array: Any, hidden: int) -> dict[tuple[str, str, bool], Any]:
    """The inverse of `_joined`."""
    one = entry.flat or len(entry.sources) == 1
    if array.ndim != (1 if entry.bias and one else 2):
        raise ValueError
    if entry.bias:
        each = _split(array, len(entry.sources)) if one else list(array)
    else:
        array = array.T if entry.transposed else array
        each = [array] if one else _split(array, [array.shape[1] - hidden], axis=1)
    found: dict[tuple[str, str, bool], Any] = {}
    for source, whole in zip(entry.sources, each, strict=True):
        fits = entry.bias or source == "i" or whole.shape[1] == hidden
        if not fits or len(whole) != len(entry.gates) * hidden:
            raise ValueError
        found |= {
            (source, g, entry.bias): part for g, part in zip(entry.gates, _split(whole, len(entry.gates)), strict=True)
        }
    return found


def _split(array: Any, parts: int | list[int], axis: int = 0) -> list[Any]:
    """By the array's own library, so that the parts of a known array are known."""
    return array.__array_namespace__().split(array, parts, axis=axis)


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
    if not spec.bias and array.size == total and is_traced(array):
        cause = "flat has biases, which bias=False would lose, and jit or vmap hides whether they are 0"
        raise CheckpointError(f"{cause}\nif they are 0, give flat[:{weights}]; else a spec with bias=True")
    if not spec.bias and array.size == total and np.any(biases := np.asarray(array[weights:])):
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
