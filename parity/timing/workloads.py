"""The workloads: networks as people have them, each implemented with jaxrnn, Flax, Keras, cuDNN and torch.nn."""

import functools
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.nnx.nn.recurrent import flip_sequences
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxrnn
from jaxrnn.checkpoint.dialects import DIALECTS

from ..cases import NamedArrays

Kwargs = dict[str, Any]  # the keyword arguments of a call, by jaxrnn's names: lengths, or reset
# Let XLA make one CUDA graph of a loop that has nothing in it but kernels.
GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE",
    "xla_gpu_graph_min_graph_size": "1",
}


class Workload(NamedTuple):
    """A network and the size of its input, which is (time, batch, input_size)."""

    name: str
    kind: str
    batch: int
    time: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    ragged: bool = False
    nonlinearity: str = "tanh"
    reset: bool = False

    @property
    def spec(self) -> jaxrnn.Spec:
        rnn = jaxrnn.RNN_RELU if self.nonlinearity == "relu" else jaxrnn.RNN_TANH
        cells = {"LSTM": jaxrnn.LSTM_CELL, "GRU": jaxrnn.GRU_CELL, "RNN": rnn, "minGRU": jaxrnn.MIN_GRU_CELL}
        sizes = self.input_size, self.hidden_size, self.num_layers
        return jaxrnn.Spec(cells[self.kind], *sizes, bidirectional=self.bidirectional, proj_size=self.proj_size)

    @property
    def sizes(self) -> list[int]:
        """How many features each layer takes."""
        return [self.input_size] + [self.hidden_size * (1 + self.bidirectional)] * (self.num_layers - 1)

    def build(self, library: Any, **settings: Any) -> Any:
        """The module in jaxrnn or torch.nn, which take the same arguments."""
        settings |= {"bidirectional": self.bidirectional}
        settings |= {"proj_size": self.proj_size} if self.proj_size else {}
        settings |= {"nonlinearity": self.nonlinearity} if self.kind == "RNN" else {}
        if self.kind not in TORCH:
            return jaxrnn.Recurrent(self.spec.cell, self.input_size, self.hidden_size, self.num_layers, **settings)
        return getattr(library, self.kind)(self.input_size, self.hidden_size, self.num_layers, **settings)

    def kwargs(self) -> Kwargs:
        """The lengths of the rows, from half of the time to all of it, if they differ, and the resets, if any."""
        low = (self.time + 1) // 2
        lengths = {"lengths": np.random.RandomState(1).randint(low, self.time + 1, self.batch)} if self.ragged else {}
        reset = {"reset": np.random.RandomState(3).rand(self.time, self.batch) < 0.02} if self.reset else {}
        return lengths | reset

    def inputs(self) -> tuple[np.ndarray, Kwargs]:
        """The arguments of a call: x in float32, and the keyword arguments."""
        x = np.random.RandomState(0).randn(self.time, self.batch, self.input_size)
        return x.astype(np.float32), self.kwargs()

    def parameters(self) -> NamedArrays:
        """By torch's names. The second bias, which some Flax cells lack, is zero, so all sides compute the same."""
        random, bound = np.random.RandomState(2), 1 / np.sqrt(self.hidden_size)
        bounds = {name: 0.0 if "bias_hh" in name else bound for name in self.spec.shapes()}
        shapes = self.spec.shapes().items()
        return {name: random.uniform(-bounds[name], bounds[name], shape).astype(np.float32) for name, shape in shapes}

    def operations(self) -> int:
        """Of a forward pass: a multiplication and an addition for each weight and step, without the padding."""
        lengths = self.kwargs().get("lengths")
        steps = self.batch * self.time if lengths is None else int(lengths.sum())
        weights = (shape for name, shape in self.spec.shapes().items() if name.startswith("weight"))
        return 2 * steps * sum(rows * columns for rows, columns in weights)


WORKLOADS = [
    Workload("speech BiLSTM", "LSTM", 16, 400, 160, 320, num_layers=5, bidirectional=True),
    Workload("PTB LSTM", "LSTM", 20, 35, 650, 650, num_layers=2),
    *(Workload(f"char-LM {kind}", kind, 64, 256, 512, 1024) for kind in ("LSTM", "GRU")),
    Workload("RL GRU", "GRU", 16, 64, 256, 256),
    Workload("RL GRU, large batch", "GRU", 128, 128, 64, 256),
    Workload("RL GRU, 1,024 rows", "GRU", 1024, 128, 64, 128, reset=True),
    Workload("RL GRU, 4,096 rows", "GRU", 4096, 32, 64, 128, reset=True),
    *(Workload(f"series {kind}", kind, 32, 100, 8, 32) for kind in ("LSTM", "GRU")),
    *(Workload(f"series {kind}, 2 layers", kind, 256, 100, 32, 128, num_layers=2) for kind in ("LSTM", "GRU")),
    Workload("batch-1 GRU", "GRU", 1, 1000, 64, 128),
    Workload("streaming GRU", "GRU", 1, 1, 64, 256),
    Workload("long GRU", "GRU", 16, 4096, 256, 256),
    Workload("ragged BiLSTM", "LSTM", 32, 400, 160, 320, num_layers=2, bidirectional=True, ragged=True),
    Workload("relu RNN", "RNN", 32, 100, 128, 256, nonlinearity="relu"),
    Workload("projected LSTM", "LSTM", 32, 200, 160, 512, proj_size=256),
    # What the README had from the start; its other GRU is the RL GRU above.
    *(Workload(f"small {kind}", kind, 32, 100, 32, 128) for kind in ("LSTM", "GRU")),
    Workload("medium LSTM", "LSTM", 16, 64, 256, 256),
    Workload("minGRU, 128 steps", "minGRU", 32, 128, 256, 256),
    Workload("minGRU, 4,096 steps", "minGRU", 8, 4096, 256, 256),
    Workload("minGRU, 65,536 steps", "minGRU", 1, 65536, 256, 256),
]
CELLS = {"LSTM": ("LSTMCell", "OptimizedLSTMCell"), "GRU": ("GRUCell",), "RNN": ("SimpleCell",)}  # Flax's
TORCH = tuple(CELLS)  # the kinds that Flax, Keras and torch have


class Implementation(NamedTuple):
    """A workload implemented with a JAX library: `run(parameters, x, kwargs)` returns the outputs."""

    side: str
    name: str
    run: Callable[[Any, jax.Array, Kwargs], jax.Array]
    parameters: Any

    @property
    def compiler_options(self) -> dict[str, str] | None:
        return GRAPHS if self.side == "graphs" else None


def training(run: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The function of a training step, given that of a forward pass.

    It returns the sum of squares of the outputs, and its gradients by the parameters and x.
    """
    return jax.value_and_grad(lambda *arguments: jnp.sum(run(*arguments) ** 2), (0, 1))


def implementations(workload: Workload, sides: Collection[str]) -> Iterator[Implementation]:
    """The implementations on the JAX sides. Flax has two for an LSTM, of which the faster counts.

    Flax and Keras have no projections, and Keras has no resets. Without them, a minGRU is run by each of our engines.
    """
    parameters = workload.parameters()
    x = jax.ShapeDtypeStruct((workload.time, workload.batch, workload.input_size), jnp.float32)
    title = f"jaxrnn.{workload.kind}" if workload.kind in TORCH else workload.kind
    ours = dict.fromkeys(("jaxrnn", "sharded", "graphs"), (title, "auto"))
    if workload.kind == "LSTM" and not workload.proj_size:
        ours["cudnn"] = "jaxrnn.LSTM with engine='cudnn'", "cudnn"
    if workload.kind not in TORCH:
        ours |= {engine: (f"{title} with engine={engine!r}", engine) for engine in ("scan", "associative_scan")}
    ours["pallas"] = f"{title} with engine='pallas'", "pallas"
    for side, (name, engine) in ours.items():
        if side in sides:
            build = functools.partial(workload.build, jaxrnn, engine=engine)
            graph, state = nnx.split(nnx.eval_shape(lambda build=build: build(rngs=nnx.Rngs(0))))
            run = _run_nnx(graph, lambda module, x, kwargs: module(x, **kwargs)[0])
            yield Implementation(side, name, run, {name: parameters[name] for name in state})
    for cell in () if workload.proj_size else CELLS.get(workload.kind, ()):
        if "flax.nnx" in sides:
            graph, state = nnx.split(nnx.eval_shape(functools.partial(NNXStack, workload, cell)))
            converted = to_flax("flax.nnx", cell, parameters, nnx.to_pure_dict(state))
            yield Implementation("flax.nnx", f"nnx.{cell}", _run_nnx(graph, NNXStack.__call__), converted)
        if "flax.linen" in sides:
            stack = linen_stack(workload, cell)
            template = jax.eval_shape(stack.init, jax.random.key(0), x, workload.kwargs())["params"]
            converted = to_flax("flax.linen", cell, parameters, template)
            yield Implementation("flax.linen", f"linen.{cell}", functools.partial(_run_linen, stack), converted)
    if "keras" in sides and not workload.proj_size and not workload.reset and workload.kind in TORCH:
        model = keras_model(workload)
        run = functools.partial(_run_keras, model)
        yield Implementation("keras", f"keras.{workload.kind}", run, to_keras(workload.kind, parameters))


def _run_nnx(graph: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda parameters, x, kwargs: call(nnx.merge(graph, nnx.State(parameters)), x, kwargs)


def _run_linen(module: linen.Module, parameters: Any, x: jax.Array, kwargs: Kwargs) -> Any:
    return module.apply({"params": parameters}, x, kwargs)


def _run_keras(model: Any, parameters: list[jax.Array], x: jax.Array, kwargs: Kwargs) -> jax.Array:
    """Keras takes the batch first: its time has two transpositions, which are small beside the rest."""
    mask = _steps(len(x), kwargs["lengths"]).T if "lengths" in kwargs else None
    outputs = model.stateless_call(parameters, model.non_trainable_variables, x.swapaxes(0, 1), mask=mask)[0]
    return _without_padding(outputs.swapaxes(0, 1), kwargs)


def _steps(time: int, lengths: jax.Array) -> jax.Array:
    """The mask of the steps that are not padding, (time, batch)."""
    return jnp.arange(time, dtype=lengths.dtype)[:, None] < lengths


def _without_padding(outputs: jax.Array, kwargs: Kwargs) -> jax.Array:
    """Zero the outputs in the padding, which Flax and Keras leave nonzero: they would count in the loss."""
    if "lengths" not in kwargs:
        return outputs
    return jnp.where(_steps(len(outputs), kwargs["lengths"])[..., None], outputs, 0)


def _step(cell: Any, carry: Any, inputs: tuple[jax.Array, jax.Array | None]) -> tuple[Any, jax.Array]:
    """A step of a Flax cell, with resets as in RL code for JAX."""
    x, reset = inputs
    if reset is not None:
        carry = jax.tree.map(lambda a: jnp.where(reset[:, None], 0, a), carry)
    return cell(carry, x)


class NNXStack(nnx.Module):
    """Flax's cells in a scan. Compiled it is what nnx.RNN is, and less than nnx.Bidirectional, which flips time."""

    def __init__(self, workload: Workload, cell: str) -> None:
        settings = {"activation_fn": jax.nn.relu} if workload.nonlinearity == "relu" else {}
        build = functools.partial(getattr(nnx, cell), hidden_features=workload.hidden_size, **settings)
        self.workload = workload
        self.forward = nnx.List(build(size, rngs=nnx.Rngs(0)) for size in workload.sizes)
        self.backward = nnx.List(build(size, rngs=nnx.Rngs(0)) for size in workload.sizes * workload.bidirectional)

    def __call__(self, x: jax.Array, kwargs: Kwargs) -> jax.Array:
        lengths = kwargs.get("lengths")

        def flip(x: jax.Array) -> jax.Array:
            return x if lengths is None else flip_sequences(x, lengths, num_batch_dims=1, time_major=True)

        zeros = jnp.zeros((x.shape[1], self.workload.hidden_size), x.dtype)
        carry = (zeros, zeros) if self.workload.kind == "LSTM" else zeros
        for layer, cell in enumerate(self.forward):
            outputs = [jax.lax.scan(functools.partial(_step, cell), carry, (x, kwargs.get("reset")))[1]]
            if self.workload.bidirectional:
                outputs += [flip(jax.lax.scan(self.backward[layer], carry, flip(x), reverse=lengths is None)[1])]
            x = jnp.concatenate(outputs, axis=-1)
        return _without_padding(x, kwargs)


class LinenStack(linen.Module):
    """A stack of Linen layers."""

    layers: tuple[Any, ...]

    def __call__(self, x: jax.Array, kwargs: Kwargs) -> jax.Array:
        options = kwargs if "reset" in kwargs else {"seq_lengths": kwargs.get("lengths")}
        for layer in self.layers:
            x = layer(x, **options)
        return _without_padding(x, kwargs)


class LinenScan(linen.Module):
    """A cell with resets in Linen's scan: the ScannedRNN of RL code for JAX."""

    cell: Any

    def __call__(self, x: jax.Array, reset: jax.Array) -> jax.Array:
        scan = linen.scan(_step, variable_broadcast="params", split_rngs={"params": False})
        return scan(self.cell, self.cell.initialize_carry(jax.random.key(0), x[0].shape), (x, reset))[1]


def linen_stack(workload: Workload, cell: str) -> LinenStack:
    """Linen's cells in its RNN and Bidirectional, or in its scan."""
    settings = {"activation_fn": jax.nn.relu} if workload.nonlinearity == "relu" else {}

    def layer() -> Any:
        built = getattr(linen, cell)(workload.hidden_size, **settings)
        return LinenScan(built) if workload.reset else linen.RNN(built, time_major=True)

    layers = [layer() for _ in workload.sizes]
    if workload.bidirectional:
        layers = [linen.Bidirectional(forward, layer(), time_major=True) for forward in layers]
    return LinenStack(tuple(layers))


def _written(library: str, name: str, parameters: NamedArrays, suffix: str) -> NamedArrays:
    """The parameters of a layer in one direction, by a library's names."""
    roles = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return DIALECTS[library, name].write({role: parameters[f"{role}_{suffix}"] for role in roles})


def to_flax(library: str, cell: str, parameters: NamedArrays, template: Any) -> Any:
    """Flax's parameters of a stack, from torch's, in the structure of `template`."""
    written = functools.cache(lambda suffix: _written(library, cell, parameters, suffix))
    converted = {}
    for path in flatten_dict(template):
        *where, product, what = path
        place = " ".join(map(str, where))
        suffix = "l" + re.sub(r"\D", "", place) + "_reverse" * ("backward" in place)
        converted[path] = written(suffix)[f"{product}.{what}"]
    return unflatten_dict(converted)


def keras_model(workload: Workload) -> Any:
    """A stack of Keras layers, on its JAX backend. The parameters in the layers are not used."""
    os.environ["KERAS_BACKEND"] = "jax"  # read once, at the import
    import keras

    layer = getattr(keras.layers, "SimpleRNN" if workload.kind == "RNN" else workload.kind)
    settings = {"activation": workload.nonlinearity, "recurrent_initializer": "zeros", "return_sequences": True}
    layers = [layer(workload.hidden_size, **settings) for _ in workload.sizes]
    if workload.bidirectional:
        layers = [keras.layers.Bidirectional(forward) for forward in layers]
    model = keras.Sequential(layers)
    model.build((workload.batch, workload.time, workload.input_size))
    return model


def to_keras(kind: str, parameters: NamedArrays) -> list[np.ndarray]:
    """Keras's parameters of a stack, from torch's."""
    name = "SimpleRNN" if kind == "RNN" else kind
    suffixes = [each.removeprefix("weight_ih_") for each in parameters if each.startswith("weight_ih_")]
    return [array for suffix in suffixes for array in _written("keras", name, parameters, suffix).values()]


def torch_device() -> str:
    """The device on which torch runs: the GPU, if JAX runs on it."""
    import torch

    return "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"


class Torch:
    """A workload with torch.nn, on the device of JAX. The final states that it returns are dropped."""

    def __init__(self, workload: Workload) -> None:
        import torch

        warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
        self.torch, self.workload = torch, workload
        self.device = torch_device()
        x, kwargs = workload.inputs()
        self.x = torch.tensor(x, device=self.device, requires_grad=True)
        self.lengths = torch.tensor(kwargs["lengths"]) if "lengths" in kwargs else None
        self.module = workload.build(torch.nn, device=self.device)
        self.module.load_state_dict({name: torch.tensor(array) for name, array in workload.parameters().items()})

    def _outputs(self) -> Any:
        from torch.nn.utils import rnn

        if self.lengths is None:
            return self.module(self.x)[0]
        packed = rnn.pack_padded_sequence(self.x, self.lengths, enforce_sorted=False)
        return rnn.pad_packed_sequence(self.module(packed)[0], total_length=self.workload.time)[0]

    def inference(self) -> Any:
        with self.torch.inference_mode():
            outputs = self._outputs()
        self._wait()
        return outputs

    def training(self) -> Any:
        """A training step, which leaves the gradients in `module` and `x`."""
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None
        loss = self._outputs().square().sum()
        loss.backward()
        self._wait()
        return loss

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()
