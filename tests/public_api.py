"""All of jaxrnn's public API, as users write it. Type checkers accept it in strict mode, and it runs: see `test_types`.

It has no cast, no ignored error and no Any, so what each function returns is known precisely enough to go on with. Of
JAX and Flax it uses only what they annotate in full, which `jnp.ones`, `jax.jit` and optax are not.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx
from numpy.typing import NDArray

import jaxrnn

Pair = tuple[jax.Array, jax.Array]
SGD: Mapping[str, object] = {  # torch's state dict of it
    "state": {},
    "param_groups": [
        {"lr": 0.1, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "params": [0, 1, 2, 3]}
    ],
}
x = jnp.exp(np.zeros((5, 3, 10), np.float32))


def layers(rngs: nnx.Rngs) -> None:
    rnn = jaxrnn.RNN(10, 20, 2, "relu", bias=False, remat="gates", unroll=2, engine=("pallas", "scan"), rngs=rngs)
    lstm = jaxrnn.LSTM(10, 20, bidirectional=True, proj_size=5, dtype=jnp.float32, precision="highest", rngs=rngs)
    gru = jaxrnn.GRU(10, 20, num_layers=2, dropout=0.5, param_dtype="float32", remat=8, hidden_axis=None, rngs=rngs)
    for module in (rnn, gru):
        output, h_n = module(x)
        assert_type(output, jax.Array)
        assert_type(h_n, jax.Array)
    output, state = lstm(x, lengths=[5, 2, 0])
    assert_type(output, jax.Array)
    assert_type(state, Pair)
    output, (h_n, c_n) = lstm(x, state, lengths=np.array([5, 2, 1]), deterministic=True)
    output, (h_n, c_n) = lstm(x, (h_n, c_n), lengths=x[0, :, 0].astype(jnp.int32))
    output, h_n = gru(np.ones((5, 3, 10), np.float32), hx=np.zeros((2, 3, 20), np.float32), rngs=nnx.Rngs(1))
    output, h_n = rnn(x, mask=x[..., 1] > 0, reset=x[..., 0] > 0, reset_state=h_n)
    assert_type(rnn.step(x[0], h_n, reset=x[0, :, 0] > 0), tuple[jax.Array, jax.Array])
    dropping = jaxrnn.LSTM(10, 20, 2, dropout=0.5, variational_dropout=True, recurrent_dropout=0.2, rngs=rngs)
    output, state = dropping(x, dropout_masks=[np.ones((1, 3, 20), bool)])
    print(dropping.recurrent_dropout + 0.5, dropping.variational_dropout and output.sum())
    assert_type(lstm.initial_state(3), Pair)
    assert_type(gru.initial_state(dtype=jnp.float32), jax.Array)

    settings = lstm.input_size, lstm.hidden_size, lstm.num_layers, lstm.proj_size
    assert_type(settings, tuple[int, int, int, int])
    flags = lstm.bias, lstm.batch_first, lstm.bidirectional, lstm.deterministic
    assert_type(flags, tuple[bool, bool, bool, bool])
    print(lstm.dropout + 0.5, lstm.dtype, lstm.precision, lstm.remat, lstm.hidden_axis, lstm.unroll, lstm.engine)
    assert_type(lstm.spec, jaxrnn.Spec[Pair])
    print(rnn.nonlinearity.upper(), gru.param_dtype)
    lstm.dtype = jnp.bfloat16
    lstm.remat = "none"
    print(jaxrnn.LSTM(10, 20, **jaxrnn.initializers.FLAX, param_dtype=jnp.bfloat16, rngs=rngs).param_dtype)
    keeping = jaxrnn.initializers.forget_bias(1.0)
    print(jaxrnn.LSTM(10, 20, kernel_init=jax.nn.initializers.lecun_normal(), bias_init=keeping, rngs=rngs))

    lstm.weight_hh_l0[...] = 0 * lstm.weight_hh_l0[...]
    lstm.weight_hr_l0_reverse[0, 1] = 2.0
    assert_type(gru.bias_ih_l1[...], jax.Array)
    lstm.eval()
    gru.train()
    output, h_n = gru(x, deterministic=True)
    print(output.mean(), h_n[-1], c_n.shape)

    alone = jaxrnn.OutputOnly(lstm)
    assert_type(alone(x, lengths=[5, 2, 0]), jax.Array)
    assert_type(alone(jaxrnn.pack_sequence([x[:, 0], x[:2, 1]]), deterministic=True), jaxrnn.PackedSequence)
    print(nnx.Sequential(jaxrnn.OutputOnly(gru), jaxrnn.OutputOnly(rnn)), alone.layer.hidden_size)


def cells(rngs: nnx.Rngs) -> None:
    rnn = jaxrnn.RNNCell(10, 20, nonlinearity="relu", rngs=rngs)
    lstm = jaxrnn.LSTMCell(10, 20, bias=False, dtype=jnp.float32, rngs=rngs)
    gru = jaxrnn.GRUCell(10, 20, precision=None, rngs=rngs)
    for cell in (rnn, gru):
        assert_type(cell(x[0]), jax.Array)
        assert_type(cell(x[0], cell(x[0]), reset=x[0, :, 0] > 0, reset_state=cell(x[0])), jax.Array)
    h, c = lstm(x[0])
    state = lstm(x[0], (h, c))
    assert_type(state, Pair)
    print(jaxrnn.GRUCell(10, 20, **jaxrnn.initializers.FLAX, rngs=rngs).bias)
    inits = jaxrnn.initializers.FLAX | {"bias_init": jaxrnn.initializers.forget_bias()}
    print(jaxrnn.LSTMCell(10, 20, **inits, rngs=rngs).bias)
    print(rnn.nonlinearity, gru.weight_ih[...].sum(), gru.weight_hh.shape, gru.hidden_size + 1)
    assert lstm.bias_ih is None
    assert gru.bias_hh is not None
    gru.bias_hh[...] = gru.bias_hh[...] + 1
    carry, output = jaxrnn.FlaxCell(lstm)((c, h), x[0])
    print(carry, output.shape)
    print(nnx.RNN(jaxrnn.FlaxCell(gru), return_carry=True))


def other_cells(rngs: nnx.Rngs) -> None:
    peephole = jaxrnn.Recurrent(jaxrnn.PEEPHOLE_LSTM_CELL, 10, 20, rngs=rngs)
    assert_type(peephole, jaxrnn.Recurrent[Pair])
    output, (h_n, c_n) = peephole(x, lengths=[5, 2, 1])
    print(output.shape, h_n.shape, c_n.shape, peephole.weight_ci_l0.shape, peephole.cell.name)
    for cell in (jaxrnn.IND_RNN_CELL, jaxrnn.MIN_GRU_CELL, jaxrnn.GRU_CELL, jaxrnn.RNN_TANH, jaxrnn.RNN_RELU):
        assert_type(jaxrnn.Recurrent(cell, 10, 20, rngs=rngs)(x)[1], jax.Array)
    assert_type(jaxrnn.Recurrent(jaxrnn.LAYER_NORM_LSTM_CELL, 10, 20, rngs=rngs)(x)[1], Pair)

    zoned = jaxrnn.Recurrent(jaxrnn.zoneout(jaxrnn.LSTM_CELL, h=0.1, c=0.5), 10, 20, rngs=rngs)
    assert_type(zoned.step(x[0])[1], Pair)
    hard = jaxrnn.lstm_cell(recurrent_activation=jaxrnn.activations.HardSigmoid(0.2, 0.5), output_activation="softsign")
    assert_type(jaxrnn.Recurrent(hard, 10, 20, rngs=rngs)(x)[1], Pair)
    for cell in (jaxrnn.gru_cell("relu", jax.nn.sigmoid), jaxrnn.rnn_cell(activation="elu")):
        assert_type(jaxrnn.Recurrent(cell, 10, 20, rngs=rngs)(x)[1], jax.Array)

    def step(
        gates: tuple[jax.Array, ...],
        hidden: tuple[jax.Array, ...],
        state: tuple[jax.Array, ...],
        params: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, ...]:
        i, f, g, o = gates
        return jaxrnn.LSTM_CELL.step((i, f + params["keep"], g, o), hidden, state)

    keep = jaxrnn.Parameter(("hidden",), jax.nn.initializers.ones)
    keeping: jaxrnn.Cell[Pair] = jaxrnn.Cell("keeping", ("i", "f", "g", "o"), ("h", "c"), step, params={"keep": keep})
    output, (h_n, c_n) = jaxrnn.Recurrent(keeping, 10, 20, rngs=rngs)(x)
    # A cell that does not say what its state is: whoever uses it knows.
    unsaid = jaxrnn.Cell("unsaid", ("i", "f", "g", "o"), ("h", "c"), step, params={"keep": ("hidden",)})
    output, (h_n, c_n) = jaxrnn.Recurrent(unsaid, 10, 20, rngs=rngs)(x)
    print(output.shape, h_n.shape, c_n.shape)


def functions(cell: jaxrnn.Cell, key: jax.Array) -> None:
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, 10, 20, num_layers=2, dropout=0.5)
    params = spec.init(key)
    assert_type(params, dict[str, jax.Array])
    assert_type(spec.init(key, **jaxrnn.initializers.FLAX), dict[str, jax.Array])

    def lstm_output(params: dict[str, jax.Array]) -> jax.Array:
        return jaxrnn.apply(spec, params, x)[0]

    output, state = jaxrnn.apply(spec, params, x, lengths=[5, 2, 1], dropout_key=key, remat="gates", unroll=2)
    assert_type(output, jax.Array)
    assert_type(state, Pair)
    output, (h_n, c_n) = jaxrnn.apply(spec, params, x, spec.initial_state(3), dropout_masks=[output > 0])
    output, (h_n, c_n) = jaxrnn.apply_step(spec, params, x[0], (h_n, c_n), dropout_key=key)
    with jaxrnn.plain_jaxprs():
        assert_type(lstm_output(params), jax.Array)
    assert_type(jaxrnn.plain_jaxprs()(lstm_output)(params), jax.Array)
    inside = jaxrnn.trajectory(spec, params, x, mask=x[..., 0] > 0, engine="scan")
    assert_type(inside, jaxrnn.Trajectory)
    print(inside.states["c"][0, -1], inside.gates["f"].mean(), h_n.shape, c_n.shape)
    generator = jaxrnn.TorchGenerator(0)
    output, (h_n, c_n) = jaxrnn.apply(
        spec, spec.init(generator), x, dropout_masks=spec.dropout_masks(jaxrnn.TorchGenerator(seed=1), 5, 3)
    )
    print(generator.uniform((3, 4), -1.0, 1.0).sum(), generator.normal(3, "float64"), generator.dropout_mask([3], 0.5))
    print(jaxrnn.LSTM(10, 20, rngs=generator), jaxrnn.GRUCell(10, 20, rngs=generator), output.shape)
    print(spec.shapes()["weight_ih_l0"][0] + 1, spec.state_shapes(3), spec.names(0, 0), spec.hidden_axes())

    def ones(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        return jnp.exp(0.0 * jax.random.normal(key, shape))

    one = jaxrnn.CellSpec(jaxrnn.GRU_CELL, 10, 20)
    print(one.init(key, recurrent_kernel_init=ones, bias_init={"n": ones})["bias_hh"], one.initializers(bias_init=ones))
    assert_type(jaxrnn.apply_cell(one, one.init(key), x[0], reset=x[0, :, 0] > 0, precision="highest"), jax.Array)
    any_spec: jaxrnn.Spec = jaxrnn.Spec(cell, 10, 20)
    output, h_n = jaxrnn.apply(any_spec, any_spec.init(key), x)
    print(output.sum(), h_n.sum())

    def loss(params: Mapping[str, jax.Array]) -> jax.Array:
        return jaxrnn.apply(spec, params, x)[0].sum()

    print(loss(params))


def packed_sequences(lstm: jaxrnn.LSTM) -> None:
    rows = [x[:2, 0], x[:, 0]]
    padded = jaxrnn.pad_sequence(rows, batch_first=True, padding_side="left")
    packed = jaxrnn.pack_padded_sequence(x, [2, 5, 1], enforce_sorted=False)
    output, state = lstm(packed)
    assert_type(output, jaxrnn.PackedSequence)
    assert_type(state, Pair)
    padded, lengths = jaxrnn.pad_packed_sequence(output)
    assert_type(padded, jax.Array)
    assert_type(lengths, NDArray[np.int64])
    assert_type(packed.batch_sizes, NDArray[np.int64])
    assert_type(jaxrnn.unpad_sequence(padded, lengths), list[jax.Array])
    assert_type(jaxrnn.unpack_sequence(jaxrnn.pack_sequence(rows, enforce_sorted=False)), list[jax.Array])
    again = jaxrnn.PackedSequence(packed.data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
    assert_type(jaxrnn.flip_sequences(x, [5, 2, 0]), jax.Array)
    assert_type(jaxrnn.flip_sequences(lengths, 3, batch_first=True), jax.Array)
    data, sizes, *_ = again
    print(data.shape, sizes.tolist(), again.batch_sizes.sum())
    assert_type(jaxrnn.apply(lstm.spec, jaxrnn.state_dict(lstm), packed)[0], jaxrnn.PackedSequence)
    either: jax.Array | jaxrnn.PackedSequence = packed if lengths.min() == 1 else x
    print(lstm(either))


def linen_modules(key: jax.Array) -> None:
    rnn = jaxrnn.linen.RNN(10, 20, 2, "relu", remat="gates", dropout=0.1)
    lstm = jaxrnn.linen.LSTM(10, 20, batch_first=True, dtype=jnp.float32, engine="scan", name="lstm")
    gru = jaxrnn.linen.GRU(10, 20, deterministic=True, rng_collection="dropout", **jaxrnn.initializers.FLAX)
    for module in (rnn, gru):
        output, h_n = module.apply(module.init(key, x, deterministic=True), x, deterministic=True)
        print(output.shape, h_n.shape)
    variables = lstm.init(key, x)
    output, (h_n, c_n) = lstm.apply(variables, x, lengths=[3, 2, 1, 3, 3])
    print(variables["params"]["weight_ih_l0"].shape, output.shape, h_n.shape, c_n.shape)
    print(lstm.hidden_size + lstm.input_size, lstm.batch_first, lstm.remat, lstm.initial_state(3))
    print(lstm.apply(variables, x[:, 0], (h_n, c_n), method="step"))
    peephole = jaxrnn.linen.Recurrent(jaxrnn.PEEPHOLE_LSTM_CELL, 10, 20)
    (output, (h_n, c_n)), _ = peephole.init_with_output(key, x)
    for cell in (jaxrnn.linen.RNNCell(10, 20, nonlinearity="relu"), jaxrnn.linen.GRUCell(10, 20)):
        print(cell.apply(cell.init(key, x[0]), x[0]).shape)
    one = jaxrnn.linen.LSTMCell(10, 20)
    h, c = one.apply(one.init(key, x[0]), x[0])
    wrapped = linen.RNN(jaxrnn.linen.FlaxCell(one)), linen.Sequential([jaxrnn.linen.OutputOnly(gru)])
    print(h.shape, c.shape, wrapped)

    class Tagger(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            output, (h_n, c_n) = jaxrnn.linen.LSTM(10, 20, name="lstm")(x, lengths=[5, 2, 1])
            assert_type(h_n, jax.Array)
            assert_type(c_n, jax.Array)
            assert_type(jaxrnn.linen.GRU(10, 20).step(x[0], reset=x[0, :, 0] > 0)[0], jax.Array)
            alone = jaxrnn.linen.OutputOnly(jaxrnn.linen.GRU(20, 20))(output, lengths=[5, 2, 1])
            assert_type(alone, jax.Array)
            return alone

    tensors = jaxrnn.checkpoint.linen.state_dict(lstm, variables, x)
    print(Tagger(), tensors["weight_ih_l0"].sum(axis=0))
    loaded = jaxrnn.checkpoint.linen.load_state_dict(lstm, variables, tensors, x, strict=False)
    assert_type(loaded, jaxrnn.checkpoint.linen.Loaded)
    assert_type(loaded.missing, list[str])
    output, (h_n, c_n) = lstm.apply(loaded.variables, x)
    first = jaxrnn.checkpoint.linen.torch_init(lstm, variables, 0, x, order=["weight_ih_l0"])
    print(
        first["params"],
        jaxrnn.checkpoint.linen.torch_init(lstm, variables, jaxrnn.TorchGenerator(1), x, values=tensors),
    )
    params = loaded.variables["params"]
    optimizer, opt_state = jaxrnn.checkpoint.linen.optax_from_torch(SGD, lstm, variables, x)
    print(loaded.unexpected, optimizer.update(params, opt_state, params)[0])
    print(jaxrnn.checkpoint.linen.optax_to_torch(opt_state, SGD, lstm, variables, x, steps_made=3)["state"])


def checkpoints(folder: Path, lstm: jaxrnn.LSTM) -> None:
    tensors = jaxrnn.state_dict(lstm)
    print(tensors["weight_ih_l0"].astype(np.float16).shape)
    path = folder / "lstm.safetensors"

    def progress(count: int) -> None:
        print(count)

    jaxrnn.checkpoint.save(path, {f"encoder.{name}": value for name, value in tensors.items()}, progress)
    read = jaxrnn.checkpoint.load(str(path), only_tensors=True)
    print(read["encoder.weight_ih_l0"] + 1)
    [found] = jaxrnn.checkpoint.find_rnns(read, cells=[jaxrnn.PEEPHOLE_LSTM_CELL])
    assert_type(found, jaxrnn.checkpoint.FoundRNN)
    print(jaxrnn.checkpoint.scaffold(read, "encoder.", linen=True, source="tensors").upper())
    print(found.prefix.rstrip("."), found.kind, found.hidden_size + 1, found.assumed, found.spec, found.dtype.itemsize)
    missing, unexpected = jaxrnn.load_state_dict(lstm, read, prefix=found.prefix, strict=False)
    assert_type(missing, list[str])
    assert_type(unexpected, list[str])
    assert jaxrnn.checkpoint.state_dict is jaxrnn.state_dict
    assert jaxrnn.checkpoint.load_state_dict is jaxrnn.load_state_dict
    assert jaxrnn.checkpoint.from_flax is jaxrnn.from_flax
    assert jaxrnn.checkpoint.CheckpointError is jaxrnn.CheckpointError
    assert jaxrnn.checkpoint.from_torch is jaxrnn.from_torch
    assert jaxrnn.checkpoint.torch_init is jaxrnn.torch_init
    jaxrnn.torch_init(lstm, jaxrnn.TorchGenerator(0), order=list(tensors), values=tensors)
    jaxrnn.torch_init(lstm, seed=0)
    try:
        jaxrnn.checkpoint.load(folder / "none.pt")
    except jaxrnn.CheckpointError as error:
        print(error)
    jaxrnn.checkpoint.save(folder / "lstm.pt", tensors)
    jaxrnn.checkpoint.save_tree(folder / "run.pt", {"model": tensors, "epoch": 3, "rates": [0.1]})
    print(jaxrnn.checkpoint.load_tree(folder / "lstm.pt")["weight_ih_l0"].shape)
    print(jaxrnn.checkpoint.fold(read)["encoder.weight_ih_l0"])
    jaxrnn.checkpoint.to_onnx(lstm, folder / "lstm.onnx", lengths=True)


def from_others(rngs: nnx.Rngs) -> None:
    ours = jaxrnn.from_torch(torch.nn.LSTM(10, 20), rngs)
    assert_type(ours, jaxrnn.LSTM)
    assert_type(jaxrnn.from_torch(torch.nn.GRUCell(10, 20)), jaxrnn.GRUCell)
    output, (h_n, c_n) = ours(x)
    print(output.shape, h_n.shape, c_n.shape)
    assert_type(jaxrnn.from_flax(nnx.LSTMCell(10, 20, rngs=rngs)), jaxrnn.LSTMCell)
    gru: jaxrnn.GRU = jaxrnn.from_flax(nnx.RNN(nnx.GRUCell(10, 20, rngs=rngs)))
    theirs = linen.GRUCell(20)
    shapes = {"ir": (10, 20), "iz": (10, 20), "in": (10, 20), "hr": (20, 20), "hz": (20, 20), "hn": (20, 20)}
    layers = {
        name: {"kernel": np.ones(shape, np.float32), "bias": np.ones(20, np.float32)} for name, shape in shapes.items()
    }
    cell, variables = jaxrnn.from_flax(theirs, {"params": layers})
    assert_type(cell, jaxrnn.linen.GRUCell)
    print(cell.apply(variables, x[0]).shape, gru.hidden_size)
    for name in ("hr", "hz"):
        del layers[name]["bias"]
    layer, variables = jaxrnn.from_flax(layers, batch_first=False)
    print(layer.apply(variables, x)[0].shape)

    dialect: jaxrnn.checkpoint.dialects.Dialect = jaxrnn.checkpoint.dialects.DIALECTS["keras", "LSTM"]
    first: jaxrnn.checkpoint.dialects.Entry = dialect.entries[0]
    weights = {role: ours.spec.init(jax.random.key(0))[name] for role, name in ours.spec.names(0, 0).items()}
    arrays = dialect.write(weights)
    print(dialect.read(arrays)["weight_hh"].shape, dialect.title, first.gates)
    flat = jaxrnn.checkpoint.dialects.to_flat(ours.spec, ours.spec.init(jax.random.key(0)))
    print(jaxrnn.checkpoint.dialects.from_flat(ours.spec, flat)["weight_ih_l0"].shape)


def optimizers(gru: jaxrnn.GRU) -> None:
    optimizer = jaxrnn.checkpoint.optimizer_from_torch(SGD, gru, learning_rate=0.1, steps_made=3)
    assert_type(optimizer, nnx.Optimizer[jaxrnn.GRU])
    params = gru.spec.init(jax.random.key(0))
    transformation, state = jaxrnn.checkpoint.optax_from_torch(
        SGD, params, list(params), lambda step: 0.1 / (1 + step), 3
    )
    updates, state = transformation.update(params, state, params)
    written = jaxrnn.checkpoint.optax_to_torch(state, SGD, params, list(params), 0.1)
    assert_type(written, dict[str, Any])
    whole = jaxrnn.checkpoint.optimizer_to_torch(optimizer, SGD, gru, learning_rate=lambda step: 0.1 / (1 + step))
    print(len(whole["param_groups"]))
    clip = jaxrnn.checkpoint.clip_grad_norm(1.0)
    print(clip.update(updates, clip.init(params))[0], optimizer.step[...] + 1)


def main() -> None:
    print(jaxrnn.__version__.split("."))
    rngs = nnx.Rngs(0)
    layers(rngs)
    cells(rngs)
    other_cells(rngs)
    functions(jaxrnn.GRU_CELL, jax.random.key(0))
    packed_sequences(jaxrnn.LSTM(10, 20, rngs=rngs))
    linen_modules(jax.random.key(0))
    with TemporaryDirectory() as folder:
        checkpoints(Path(folder), jaxrnn.LSTM(10, 20, rngs=rngs))
    from_others(rngs)
    optimizers(jaxrnn.GRU(10, 20, rngs=rngs))


if __name__ == "__main__":
    main()
