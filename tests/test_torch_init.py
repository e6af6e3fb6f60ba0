"""The initial weights of whole models from a seed alone: the same bits as torch's, in NNX and in Linen."""

import types
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import bits, torchs
from flax import linen, nnx

import jaxrnn
from jaxrnn import CheckpointError, TorchGenerator, torch_init
from jaxrnn.checkpoint.flax_layers import _KINDS

X = np.zeros((2, 7), int)


def plain(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """An initializer that compiles nothing."""
    return jnp.asarray(np.zeros(shape, dtype))


PLAIN: dict[str, Any] = {"kernel_init": plain, "bias_init": plain}


class Model(nnx.Module):
    """Not in the order of the alphabet, and with a layer in a list."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        self.embed = nnx.Embed(50, 8, param_dtype=dtype, embedding_init=plain, rngs=rngs)
        self.conv = nnx.Conv(8, 6, (3,), param_dtype=dtype, **PLAIN, rngs=rngs)
        self.lstm = jaxrnn.LSTM(6, 5, 2, bidirectional=True, param_dtype=dtype, rngs=TorchGenerator(0))
        self.norm = nnx.LayerNorm(10, epsilon=1e-5, param_dtype=dtype, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(10, 3, param_dtype=dtype, **PLAIN, rngs=rngs)])


class LinenModel(linen.Module):
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.embed = linen.Embed(50, 8, param_dtype=self.dtype)
        self.conv = linen.Conv(6, (3,), param_dtype=self.dtype)
        self.lstm = jaxrnn.linen.LSTM(6, 5, 2, bidirectional=True, param_dtype=self.dtype)
        self.norm = linen.LayerNorm(epsilon=1e-5, param_dtype=self.dtype)
        self.heads = [linen.Dense(3, param_dtype=self.dtype)]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.heads[0](self.norm(self.lstm(self.conv(self.embed(x)))[0]))


class Swapped(LinenModel):
    """Of which setup makes two layers in another order."""

    def setup(self) -> None:
        self.dropout = linen.Dropout(0.1, deterministic=True)
        self.conv = linen.Conv(6, (3,))
        self.embed = linen.Embed(50, 8)
        self.lstm = jaxrnn.linen.LSTM(6, 5, 2, bidirectional=True)
        self.norm = linen.LayerNorm(epsilon=1e-5)
        self.heads = [linen.Dense(3)]

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(self.dropout(x))


def _torch_model(torch: types.ModuleType, dtype: str = "float32") -> Any:
    settings = {"dtype": getattr(torch, dtype)}
    return torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(50, 8, **settings),
            "conv": torch.nn.Conv1d(8, 6, 3, **settings),
            "lstm": torch.nn.LSTM(6, 5, 2, bidirectional=True, **settings),
            "norm": torch.nn.LayerNorm(10, **settings),
            "heads": torch.nn.ModuleList([torch.nn.Linear(10, 3, **settings)]),
        }
    )


def _zeros(module: linen.Module, *args: Any) -> Any:
    """Variables without a compilation."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes)


def _linens(module: linen.Module, seed: Any, *args: Any, **settings: Any) -> dict[str, np.ndarray]:
    with jax.numpy_dtype_promotion("standard"):  # of Flax's norms
        variables = jaxrnn.checkpoint.linen.torch_init(module, _zeros(module, *args), seed, *args, **settings)
        return jaxrnn.checkpoint.linen.state_dict(module, variables, *args)


# The checksum of what torch 2.13 draws for all of the model, so that it is checked without torch.
GOLDEN = {"float32": 0x32AA24A3, "float64": 0xDF1C31E1}


def _checksum(tensors: dict[str, np.ndarray]) -> int:
    return zlib.crc32(b"".join(tensors[name].tobytes() for name in sorted(tensors)))


@pytest.mark.parametrize("dtype", GOLDEN)
def test_a_whole_model(dtype: str) -> None:
    model = Model(nnx.Rngs(0), dtype)
    torch_init(model, 4)
    found = jaxrnn.state_dict(model)
    assert _checksum(found) == GOLDEN[dtype]
    in_linen = _linens(LinenModel(dtype), 4, X)
    assert {name: bits(value) for name, value in in_linen.items()} == {name: bits(a) for name, a in found.items()}


@pytest.mark.torch
@pytest.mark.parametrize("dtype", GOLDEN)
def test_the_whole_model_is_torchs(torch: types.ModuleType, dtype: str) -> None:
    model = Model(nnx.Rngs(0), dtype)
    for seed in (4, -7, 2**40):
        torch.manual_seed(seed)
        theirs = {name: torchs(tensor) for name, tensor in _torch_model(torch, dtype).state_dict().items()}
        torch_init(model, seed)
        assert {name: bits(a) for name, a in jaxrnn.state_dict(model).items()} == {
            n: bits(a) for n, a in theirs.items()
        }
        assert seed != 4 or _checksum(theirs) == GOLDEN[dtype]


def _random_layers(torch: types.ModuleType, random: np.random.RandomState, dtype: str) -> tuple[Any, Any]:
    """One of torch's layers, drawn from its own generator, and ours, with zeros."""
    kind = str(random.choice(["Linear", "Embedding", "Conv", "ConvTranspose"]))
    inputs, outputs = (2 * int(each) for each in random.randint(1, 4, 2))
    kernel, bias = tuple(map(int, random.randint(1, 4, random.randint(1, 4)))), bool(random.randint(2))
    theirs: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    ours: dict[str, Any] = {"param_dtype": dtype, "rngs": nnx.Rngs(0)}
    if kind == "Embedding":  # of which normal numbers have no 16 bits here
        theirs, ours = theirs | {"dtype": torch.float32}, ours | {"param_dtype": "float32"}
        embed = nnx.Embed(inputs, outputs, embedding_init=plain, **ours)
        return torch.nn.Embedding(inputs, outputs, **theirs), embed
    ours |= {"use_bias": bias, **PLAIN}
    if kind == "Linear":
        return torch.nn.Linear(inputs, outputs, bias, **theirs), nnx.Linear(inputs, outputs, **ours)
    groups = 1 if kind == "ConvTranspose" else 2
    ours |= {"transpose_kernel": bool(random.randint(2))} if groups == 1 else {"feature_group_count": groups}
    make = getattr(torch.nn, f"{kind}{len(kernel)}d")
    layer = getattr(nnx, kind)(inputs, outputs, kernel, padding="VALID", **ours)
    return make(inputs, outputs, kernel, groups=groups, bias=bias, **theirs), layer


@pytest.mark.torch
def test_random_layers_have_torchs_weights(torch: types.ModuleType) -> None:
    random = np.random.RandomState(0)
    for k in range(100):
        torch.manual_seed(k)
        theirs, ours = _random_layers(
            torch, random, ("float32", "float64", "float16", "bfloat16")[k % 2 if k < 80 else k % 4]
        )
        torch_init(ours, k)
        expected = {name: bits(torchs(value)) for name, value in theirs.named_parameters()}
        assert {name: bits(value) for name, value in jaxrnn.state_dict(ours).items()} == expected, theirs


@pytest.mark.torch
def test_norms_are_torchs(torch: types.ModuleType) -> None:
    theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.GroupNorm(1, 3), torch.nn.RMSNorm(3))
    norms = [nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0)), nnx.GroupNorm(3, 1, epsilon=1e-5, rngs=nnx.Rngs(0))]
    ours = nnx.Sequential(*norms, nnx.RMSNorm(3, epsilon=1.19e-7, rngs=nnx.Rngs(0)))
    generator = TorchGenerator(0)
    torch_init(ours, generator, order=list(theirs.state_dict()))  # which has num_batches_tracked
    expected = {name: bits(torchs(a)) for name, a in theirs.state_dict().items() if "tracked" not in name}
    assert {name: bits(value) for name, value in jaxrnn.state_dict(ours).items()} == expected
    assert bits(generator.uniform(2)) == bits(TorchGenerator(0).uniform(2))  # nothing was drawn


def test_a_layer_without_inputs() -> None:
    layer = nnx.Linear(0, 3, kernel_init=plain, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    torch_init(layer, 0)
    assert bits(layer.bias[...]) == bits(np.zeros(3, np.float32))


def test_every_known_layer_has_its_draws() -> None:
    assert all(kind.draw is not None for kind in _KINDS.values())


def test_a_generator_goes_on_from_module_to_module() -> None:
    model, generator = Model(nnx.Rngs(0)), TorchGenerator(4)
    for part in (model.embed, model.conv, model.lstm, model.norm, model.heads):
        torch_init(part, generator)
    assert _checksum(jaxrnn.state_dict(model)) == GOLDEN["float32"]


def test_an_order_in_place_of_one_that_is_lost() -> None:
    model = nnx.clone(Model(nnx.Rngs(0)))
    cause = "Model: the order of conv, embed, heads, lstm, norm may not be torch's, because Flax sorts attributes"
    with pytest.raises(CheckpointError, match=cause):
        torch_init(model, 4)
    torch_init(model, 4, order=["embed", "conv.weight", "lstm", "norm.weight", "heads.0.weight"])
    assert _checksum(jaxrnn.state_dict(model)) == GOLDEN["float32"]
    for changed in (nnx.jit(lambda: Model(nnx.Rngs(0)))(), jax.tree.map(lambda leaf: leaf, model)):
        with pytest.raises(CheckpointError, match="may not be torch's"):
            torch_init(changed, 4)
    around = nnx.clone(nnx.Dict(tail=nnx.Linear(2, 2, **PLAIN, rngs=nnx.Rngs(0)), model=model))
    with pytest.raises(CheckpointError, match=r"order of model\.conv, model\.embed, .* may not be torch's"):
        torch_init(around, 4, order=["model", "tail"])
    torch_init(around, 4, order=["model.embed", "model.conv", "model.lstm", "model.norm", "model", "tail"])
    assert _checksum(jaxrnn.state_dict(around["model"])) == GOLDEN["float32"]
    torch_init(nnx.clone(model.lstm), 4)  # of a layer the order is known
    torch_init(nnx.clone(nnx.Sequential(model.heads[0], model.heads[0])), 4)  # and of numbered ones
    torch_init(nnx.clone(nnx.Dict(head=model.heads[0])), 4)  # and of one
    with pytest.raises(CheckpointError, match=r"the order of both\.a, both\.b may not be torch's"):
        torch_init(nnx.clone(nnx.Dict(both=nnx.data({"b": model.conv, "a": model.heads[0]}))), 4)


def test_linens_order_is_that_of_the_calls_and_of_setup() -> None:
    cause = (
        "Swapped: the order of conv, embed, lstm, norm, heads_0 may not be torch's, because they are called in another"
    )
    with pytest.raises(CheckpointError, match=cause):
        _linens(Swapped(), 4, X)
    around = linen.Sequential([Swapped()])
    with pytest.raises(
        CheckpointError, match=r"order of layers_0\.conv, layers_0\.embed, .* another order than setup's"
    ):
        _linens(around, 4, X, order=["layers_0"])
    order = ["embed", "conv", "lstm", "norm", "heads"]
    assert _checksum(_linens(Swapped(), 4, X, order=order)) == GOLDEN["float32"]


class Branches(linen.Module):
    def setup(self) -> None:
        self.first = linen.Dense(2, param_dtype=jnp.float32)
        self.second = linen.Dense(2, param_dtype=jnp.float32)

    def __call__(self, x: jax.Array, both: bool = True) -> jax.Array:
        return self.second(self.first(x)) if both else self.first(x)


def test_a_module_that_linens_call_does_not_reach() -> None:
    x, init = jnp.ones((1, 2), jnp.float32), jaxrnn.checkpoint.linen.torch_init
    variables = _zeros(Branches(), x)
    cause = "draws for second.bias of a module that the call does not reach, .*\npass arguments with which"
    with pytest.raises(CheckpointError, match=cause):
        init(Branches(), variables, 0, x, False)
    assert init(Branches(), variables, 0, x, True)["params"]["second"]["kernel"].any()


class Learned(nnx.Module):
    """With a parameter of its own, a cell that torch has not, and a tied weight."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 4, **PLAIN, rngs=rngs)
        self.second = nnx.Linear(4, 4, **PLAIN, rngs=rngs)
        self.h0 = nnx.Param(jnp.ones(4, jnp.float32))


def test_what_torch_does_not_draw_is_given() -> None:
    model = Learned(nnx.Rngs(0))
    with pytest.raises(CheckpointError) as caught:
        torch_init(model, 0)
    cause, remedy = str(caught.value).split("\n")
    assert cause == "Learned: jaxrnn does not know what torch draws for h0 of Learned"
    assert remedy == "give what torch has there, in torch's layout: values={'h0': array}"
    array = np.arange(4, dtype=np.float32)
    torch_init(model, 0, values={"h0": array, "first.bias": array})
    assert bits(model.h0[...]) == bits(model.first.bias[...]) == bits(array)
    generator = TorchGenerator(0)
    bound = [generator.uniform(16, -0.5, 0.5), generator.uniform(4), generator.uniform((4, 4), -0.5, 0.5)]
    assert bits(jaxrnn.state_dict(model)["second.weight"]) == bits(bound[2])  # after first's bias was drawn
    model.rnn = jaxrnn.Recurrent(jaxrnn.LAYER_NORM_LSTM_CELL, 2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(
        CheckpointError, match=r"for rnn\.weight_ih_l0 of Recurrent, rnn.weight_hh_l0 of Recurrent.*\n.*array, \.\.\.}$"
    ):
        torch_init(model, 0, values={"h0": array})


class Remade(linen.Module):
    """A transformation of a layer, a cell of ours in Flax's wrapper, and one of Flax's."""

    flaxs: bool = False

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.remat(linen.Dense)(3, name="dense")(x)
        x = linen.RNN(jaxrnn.linen.FlaxCell(jaxrnn.linen.GRUCell(3, 3, name="cell")), name="rnn")(x)
        return linen.RNN(linen.GRUCell(3, name="gru"), name="last")(x) if self.flaxs else x


def test_layers_within_modules_of_flax() -> None:
    """A cell of Flax's is made of Linear layers, but torch draws its own at once."""
    cell = nnx.SimpleCell(2, 3, kernel_init=plain, recurrent_kernel_init=plain, rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError) as caught:
        torch_init(nnx.RNN(cell), 0)
    cause, remedy = str(caught.value).split("\n")
    assert "draws for cell.dense_h.weight of SimpleCell, cell.dense_i.weight of SimpleCell" in cause
    assert remedy.startswith("convert Flax's cells by jaxrnn.from_flax first, or give what torch has there, in torch's")
    model = nnx.Dict(rnn=jaxrnn.from_flax(nnx.RNN(cell)))
    torch_init(model, 0)
    wanted = jaxrnn.RNN(2, 3, rngs=TorchGenerator(0))
    assert bits(model.rnn.weight_hh_l0[...]) == bits(wanted.weight_hh_l0[...])
    attention = nnx.MultiHeadAttention(1, 4, **PLAIN, rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match=r"query\.kernel of MultiHeadAttention.*\ngive what"):
        torch_init(attention, 0)
    x, generator = jnp.ones((1, 2, 3), jnp.float32), TorchGenerator(0)
    found = _linens(Remade(), 0, x)
    generator.uniform(12)
    wanted = jaxrnn.GRUCell(3, 3, rngs=generator)
    assert bits(found["cell.weight_ih"]) == bits(wanted.weight_ih[...])
    with pytest.raises(CheckpointError, match=r"for gru\.ir.weight of GRUCell"):
        _linens(Remade(flaxs=True), 0, x)


def test_a_cell_of_ours_in_linens_rnn() -> None:
    module = linen.RNN(jaxrnn.linen.FlaxCell(jaxrnn.linen.GRUCell(3, 3)))
    found = _linens(module, 0, jnp.ones((1, 2, 3), jnp.float32))
    wanted = jaxrnn.GRUCell(3, 3, rngs=TorchGenerator(0))
    assert bits(found["cell.cell.weight_ih"]) == bits(wanted.weight_ih[...])


@pytest.mark.parametrize("base", [nnx.Linear, jaxrnn.RNN])
def test_a_parameter_that_a_subclass_adds(base: type) -> None:
    layer = type("Own", (base,), {})(2, 3, rngs=nnx.Rngs(0))
    layer.extra = nnx.Param(jnp.ones(3, jnp.float32))
    with pytest.raises(CheckpointError, match="what torch draws for extra of Own\n"):
        torch_init(layer, 0)
    torch_init(layer, 0, values={"extra": np.zeros(3, np.float32)})
    assert not layer.extra[...].any()


def test_a_shared_parameter() -> None:
    model = Learned(nnx.Rngs(0))
    model.second.kernel = model.first.kernel
    array = np.arange(4, dtype=np.float32)
    with pytest.raises(CheckpointError) as caught:
        torch_init(model, 0, values={"h0": array})
    cause, remedy = str(caught.value).split("\n")
    assert cause.startswith("Learned: first.weight and second.weight are one parameter, of which each of torch's")
    assert remedy == "give the one that stays in torch: values={'first.weight': array}"
    weight = TorchGenerator(9).uniform((4, 4))
    torch_init(model, 0, values={"h0": array, "second.weight": weight})
    assert bits(jaxrnn.state_dict(model)["first.weight"]) == bits(weight)
    with pytest.raises(CheckpointError, match="one shared parameter in the module, but two different tensors"):
        torch_init(model, 0, values={"h0": array, "first.weight": -weight, "second.weight": weight})
    generator = TorchGenerator(0)
    generator.uniform(16)
    assert bits(model.first.bias[...]) == bits(generator.uniform(4, -0.5, 0.5))
    model.second = model.first  # one module under two names is drawn once
    torch_init(model, 0, values={"h0": array})
    assert bits(jaxrnn.state_dict(model)["second.weight"]) == bits(TorchGenerator(0).uniform((4, 4), -0.5, 0.5))


def test_wrong_calls() -> None:
    model = Model(nnx.Rngs(0))
    before = {name: bits(value) for name, value in jaxrnn.state_dict(model).items()}
    for settings, cause in (
        ({"order": ["embed", "conv"]}, "order lacks lstm.weight_ih_l0, .*, heads.0.bias\ngive order, the"),
        (
            {"order": [*list(before), "tail.weight"]},
            "order has tail.weight, which are no modules or parameters\ngive order.*; here there are embed, conv",
        ),
        ({"values": {"tail.weight": X}}, "values has tail.weight, which are no parameters\nit has embed.weight"),
        ({"values": {"heads.0.bias": np.ones(4)}}, r"values has heads.0.bias of shape \(4,\), should be \(3,\)\ngive"),
    ):
        with pytest.raises(CheckpointError, match=f"^Model: .*{cause}" if "\n" in cause else cause):
            torch_init(model, 0, **settings)
    with pytest.raises(TypeError, match="seed should be an integer"):
        torch_init(model, "0")
    with pytest.raises(
        TypeError, match=r"should be an nnx\.Module, got Linen's LinenModel: use jaxrnn.checkpoint.linen"
    ):
        torch_init(LinenModel(), 0)
    assert {name: bits(value) for name, value in jaxrnn.state_dict(model).items()} == before
    half = nnx.Dict(embed=nnx.Embed(3, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    cause = "Dict: embed.dtype should be one of float32, float64, got bfloat16\nmake that layer with such a param_dtype"
    with pytest.raises(CheckpointError, match=cause):
        torch_init(half, 0)
    with pytest.warns(UserWarning, match="epsilon=1e-06, where torch's default is eps=1e-05") as caught:
        torch_init(nnx.LayerNorm(3, rngs=nnx.Rngs(0)), 0)
    assert caught[0].filename == __file__
