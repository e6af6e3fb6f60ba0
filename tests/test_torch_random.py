"""Torch's random numbers from a seed alone: the same bits as torch's, for numbers, layers, cells and dropout."""

import copy
import types
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import bits, torchs
from flax import nnx

import jaxrnn
from jaxrnn import TorchGenerator, torch_random

SEEDS = (0, 1, -1, -(2**63), 2**32 + 5, 2**40, 2**64 - 1)
DTYPES = ("float32", "float64", "float16", "bfloat16")
X = np.ones((5, 2, 3), np.float32)


# Checksums of what torch 2.13 draws, so that its numbers are checked without it.
GOLDEN: dict[str, tuple[Callable[[TorchGenerator], np.ndarray], int]] = {
    "uniform float32": (lambda g: g.uniform(1000, -0.3, 0.7), 0xE7A834A0),
    "uniform float64": (lambda g: g.uniform((10, 100), -0.3, 0.7, "float64"), 0x406726CC),
    "uniform float16": (lambda g: g.uniform(10_000, dtype="float16"), 0xFB82113A),
    "uniform bfloat16": (lambda g: g.uniform(1000, -0.3, 0.7, "bfloat16"), 0x7D1AA34D),
    "normal float32": (lambda g: g.normal((33, 7)), 0x84F453B7),
    "normal float64": (lambda g: g.normal(48, "float64"), 0x00DDEBCD),
    "few normal": (lambda g: np.concatenate([g.normal(3), g.normal((1,)), g.normal(16), g.normal(2)]), 0xCE451AE5),
    "mask": (lambda g: g.dropout_mask((10, 100), 0.3), 0xF82580E9),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_recorded_numbers(name: str) -> None:
    draw, expected = GOLDEN[name]
    assert zlib.crc32(draw(TorchGenerator(7)).tobytes()) == expected


def _golden_of_torch(torch: types.ModuleType, name: str) -> np.ndarray:
    torch.manual_seed(7)
    kind, dtype = name.split() if name.startswith(("uniform", "normal")) else (name, "")
    shape = {"uniform float64": (10, 100), "uniform float16": (10_000,), "normal float32": (33, 7)}.get(name, (1000,))
    if kind == "uniform":
        low, high = (0, 1) if dtype == "float16" else (-0.3, 0.7)
        return torchs(torch.empty(shape, dtype=getattr(torch, dtype)).uniform_(low, high))
    if kind == "normal":
        return torchs(torch.randn(shape if dtype == "float32" else 48, dtype=getattr(torch, dtype)))
    if kind == "mask":
        return torchs(torch.nn.functional.dropout(torch.ones(10, 100), 0.3) != 0)
    return torchs(torch.cat([torch.randn(count) for count in (3, 1, 16, 2)]))


@pytest.mark.torch
@pytest.mark.parametrize("name", GOLDEN)
def test_recorded_numbers_are_torchs(torch: types.ModuleType, name: str) -> None:
    draw, _ = GOLDEN[name]
    assert bits(draw(TorchGenerator(7))) == bits(_golden_of_torch(torch, name))


@pytest.mark.torch
@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_is_torchs(torch: types.ModuleType, seed: int) -> None:
    torch.manual_seed(seed)
    assert bits(TorchGenerator(seed).uniform(5)) == bits(torch.rand(5))


def test_what_needs_no_numbers_draws_none() -> None:
    generator = TorchGenerator(0)
    assert generator.dropout_mask(3, 0).all()
    assert not generator.dropout_mask(3, 1).any()
    assert len(generator.uniform(0)) == len(generator.normal(0)) == 0
    assert bits(generator.uniform(2)) == bits(TorchGenerator(0).uniform(2))


def test_the_low_32_bits_of_a_seed_count() -> None:
    wanted = bits(TorchGenerator(2**32 - 1).uniform(5))
    assert bits(TorchGenerator(-1).uniform(5)) == bits(TorchGenerator(2**64 - 1).uniform(5)) == wanted


@pytest.mark.torch
def test_draws_of_all_sizes_go_on_from_each_other(torch: types.ModuleType) -> None:
    """Blocks of 16, what is left of them, and pairs of which one is kept."""
    generator, random = TorchGenerator(3), np.random.RandomState(0)
    torch.manual_seed(3)
    for _ in range(60):
        size, dtype = int(random.choice([0, 1, 3, 15, 16, 17, 40, 333])), DTYPES[random.randint(2)]
        ours, theirs = generator.normal(size, dtype), torch.randn(size, dtype=getattr(torch, dtype))
        assert bits(ours) == bits(theirs), (size, dtype)
        dtype, bound = DTYPES[random.randint(4)], random.uniform(0.01, 2)
        ours = generator.uniform(size, -bound, bound, dtype)
        theirs = torchs(torch.empty(size, dtype=getattr(torch, dtype)).uniform_(-bound, bound))
        assert bits(ours) == bits(theirs), (size, dtype)


def test_a_sum_of_a_product_is_rounded_once() -> None:
    random = np.random.RandomState(0)
    a, b, c = random.uniform(0, 1, 500), 2 / 3, -1 / 3 - 2.0**-30
    exact = [float(Fraction(x) * Fraction(b) + Fraction(c)) for x in a.tolist()]
    assert bits(torch_random._fma(a, b, c)) == bits(exact)
    assert (a * b + c != exact).any()
    # Halfway between two numbers of float32 but for what float64 cannot hold; to even would be down, then up.
    for k in (1, 3):
        a, b, exact = np.float32([1 + k * 2.0**-12]), np.float32(1 + 2.0**-12), 1 + (k + 1) * 2.0**-12 + k * 2.0**-24
        for tiny in (2.0**-60, -(2.0**-60)):
            wanted = exact + (2.0**-24 if tiny > 0 else -(2.0**-24))
            assert torch_random._fma32(a, b, np.float32(tiny)).tolist() == [wanted]


def _random_call(random: np.random.RandomState) -> tuple[str, tuple[int, ...], dict[str, Any]]:
    """A class of torch and of jaxrnn, and arguments of its constructor."""
    name = str(random.choice(["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]))
    sizes = tuple(map(int, random.randint(1, 9, 2)))
    arguments: dict[str, Any] = {"bias": bool(random.randint(2))}
    if not name.endswith("Cell"):
        arguments |= {"num_layers": int(random.randint(1, 4)), "bidirectional": bool(random.randint(2))}
        if name == "LSTM" and sizes[1] > 1:
            arguments["proj_size"] = int(random.randint(sizes[1]))
    return name, sizes, arguments


@pytest.mark.torch
def test_random_layers_and_cells_have_torchs_weights(torch: types.ModuleType) -> None:
    random = np.random.RandomState(0)
    for k in range(100):
        name, sizes, arguments = _random_call(random)
        dtype = DTYPES[k % 2 if k < 90 else k % 4]
        torch.manual_seed(seed := int(random.randint(-(2**40), 2**40)))
        generator = TorchGenerator(seed)
        for _ in range(2):  # the second goes on from the first
            theirs = getattr(torch.nn, name)(*sizes, **arguments, dtype=getattr(torch, dtype))
            ours = getattr(jaxrnn, name)(*sizes, **arguments, param_dtype=dtype, rngs=generator)
            expected = {key: bits(torchs(value)) for key, value in theirs.named_parameters()}
            found = {key: bits(value) for key, value in jaxrnn.state_dict(ours).items()}
            assert found == expected, (name, sizes, arguments, dtype)
    spec = jaxrnn.CellSpec(jaxrnn.LSTM_CELL, 3, 0)  # no hidden units: a bound of 0
    assert spec.init(TorchGenerator(0))["weight_ih"].shape == (0, 3)


def test_a_generator_in_place_of_a_key_or_rngs() -> None:
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, 3, 4, num_layers=2)
    params = spec.init(TorchGenerator(0), jnp.float64)
    layer = jaxrnn.Recurrent(jaxrnn.LSTM_CELL, 3, 4, 2, param_dtype=jnp.float64, rngs=TorchGenerator(0))
    for name, value in params.items():
        assert bits(value) == bits(getattr(layer, name)[...])
    peephole = jaxrnn.Recurrent(jaxrnn.PEEPHOLE_LSTM_CELL, 3, 4, rngs=TorchGenerator(0))
    assert 0 < np.abs(peephole.weight_ci_l0[...]).max() <= 0.5  # 1 / sqrt(4)
    generator = TorchGenerator(0)
    spec.init(generator)
    again = copy.deepcopy(generator)
    assert bits(again.uniform(3)) == bits(generator.uniform(3))
    assert repr(generator) == "TorchGenerator(0)"


def test_float64_without_x64_is_warned_of() -> None:
    with jax.enable_x64(False), pytest.warns(UserWarning, match="dtype float64 requested"):
        params = jaxrnn.CellSpec(jaxrnn.GRU_CELL, 1, 1).init(TorchGenerator(0), "float64")
    assert params["weight_ih"].dtype == jnp.float32


def test_a_layer_on_a_mesh() -> None:
    mesh = jax.make_mesh((2,), ("hidden",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        layer = jaxrnn.GRU(3, 4, hidden_axis="hidden", rngs=TorchGenerator(0))
    weight = layer.weight_hh_l0[...]
    assert weight.sharding.spec == jax.sharding.PartitionSpec(None, "hidden")
    assert bits(weight) == bits(jaxrnn.GRU(3, 4, rngs=TorchGenerator(0)).weight_hh_l0[...])


@pytest.mark.torch
@pytest.mark.parametrize("p", [0.0, 0.2, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_masks_are_torchs(torch: types.ModuleType, p: float, dtype: str) -> None:
    _skip_on_intel(torch)
    torch.manual_seed(5)
    generator = TorchGenerator(5)
    for shape in ((1,), (7, 3), (3, 50_001), (2, 2)):
        theirs = torch.nn.functional.dropout(torch.ones(shape, dtype=getattr(torch, dtype)), p) != 0
        assert bits(generator.dropout_mask(shape, p)) == bits(theirs)
    assert bits(generator.uniform(2)) == bits(torch.rand(2))


def _skip_on_intel(torch: types.ModuleType) -> None:
    torch.manual_seed(0)
    if bits(torch.ones(64).bernoulli_(0.5) != 0) != bits(TorchGenerator(0).dropout_mask(64, 0.5)):
        pytest.skip("torch draws dropout by MKL's generator, as on Intel's processors")


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["LSTM", "packed"])
def test_masks_of_layers_are_torchs(torch: types.ModuleType, kind: str) -> None:
    _skip_on_intel(torch)
    theirs = torch.nn.LSTM(3, 4, 3, dropout=0.4, bidirectional=True, batch_first=True, dtype=torch.float64)
    ours = jaxrnn.from_torch(theirs)
    x, lengths = np.random.RandomState(0).randn(5, 7, 3), [7, 2, 5, 1, 3]
    torch.manual_seed(11)
    if kind == "packed":
        settings = {"batch_first": True, "enforce_sorted": False}
        packed = torch.nn.utils.rnn.pack_padded_sequence(torch.tensor(x), lengths, **settings)
        masks = ours.spec.dropout_masks(TorchGenerator(11), sum(lengths))
        found = ours(jaxrnn.pack_padded_sequence(x, lengths, **settings), dropout_masks=masks)[0].data
        expected = theirs(packed)[0].data
    else:
        masks = ours.spec.dropout_masks(TorchGenerator(11), 7, 5)
        found, expected = ours(x, dropout_masks=masks)[0], theirs(torch.tensor(x))[0]
    assert np.abs(found - expected.detach().numpy()).max() < 1e-14


def test_dropout_of_a_module_that_a_generator_made() -> None:
    module = jaxrnn.GRU(3, 4, 2, dropout=0.5, rngs=TorchGenerator(0))
    with pytest.raises(
        ValueError, match=r"has no key for them: give rngs or dropout_masks in the call, or call module.eval\(\)"
    ):
        module(X)
    given = module(X, rngs=nnx.Rngs(0))[0]
    masks = module.spec.dropout_masks(TorchGenerator(0), 5, 2)
    assert given.shape == module(X, dropout_masks=masks)[0].shape
    module.eval()
    assert module(X)[0].shape == (5, 2, 4)
    module = jaxrnn.GRU(3, 4, 2, dropout=0.5, recurrent_dropout=0.1, rngs=TorchGenerator(0))
    with pytest.raises(ValueError, match="no key for them: give rngs in the call, or call"):
        module(X, dropout_masks=masks)


ones = jax.nn.initializers.ones
LAYER_NORM = jaxrnn.LAYER_NORM_LSTM_CELL
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "seed": (lambda: TorchGenerator(1.5), TypeError, "seed should be an integer, got 1.5"),
    "key": (lambda: TorchGenerator(jax.random.key(0)), TypeError, "seed should be an integer, got PRNGKeyArray"),
    "flax": (
        lambda: nnx.Linear(2, 3, rngs=TorchGenerator(0)),
        AttributeError,
        r"no params: give Flax's own layers nnx.Rngs, then draw .* jaxrnn.torch_init\(model, seed\)",
    ),
    "masks": (
        lambda: jaxrnn.Spec(jaxrnn.LSTM_CELL, 2, 3, 2).dropout_masks(0, 5),
        TypeError,
        "generator should be a jaxrnn.TorchGenerator, got int",
    ),
    "large seed": (
        lambda: TorchGenerator(2**64),
        ValueError,
        r"from -2\*\*63 to 2\*\*64 - 1, as for torch.manual_seed",
    ),
    "dtype": (lambda: TorchGenerator(0).uniform(3, dtype="int32"), TypeError, "one of float32, float64, float16, bfl"),
    "normal dtype": (lambda: TorchGenerator(0).normal(3, "float16"), TypeError, "one of float32, float64, got float16"),
    "bounds": (lambda: TorchGenerator(0).uniform(3, 1, 0.5), ValueError, "low should be at most high, .* got low=1"),
    "NaN": (lambda: TorchGenerator(0).uniform(3, float("nan")), ValueError, "low should be at most high"),
    "difference": (lambda: TorchGenerator(0).uniform(3, -3e38, 3e38), ValueError, "within float32's range"),
    "range": (lambda: TorchGenerator(0).uniform(3, 0, 1e6, "float16"), ValueError, "within float16's range"),
    "size": (lambda: TorchGenerator(0).normal((2, -1)), ValueError, r"sizes from 0 on, got \(2, -1\)"),
    "p": (lambda: TorchGenerator(0).dropout_mask(3, 1.5), ValueError, "p should be a number from 0 to 1"),
    "an initializer": (
        lambda: jaxrnn.GRU(3, 4, bias_init=ones, rngs=TorchGenerator(0)),
        ValueError,
        "bias_init should be None with a TorchGenerator, .* give a key or nnx.Rngs in place",
    ),
    "a cell's initializer": (
        lambda: jaxrnn.Recurrent(LAYER_NORM, 3, 4, rngs=TorchGenerator(0)),
        ValueError,
        "init of weight_ln_ih should be None",
    ),
    "a generator for dropout": (
        lambda: jaxrnn.GRU(3, 4, 2, dropout=0.5, rngs=nnx.Rngs(0))(X, rngs=TorchGenerator(0)),
        TypeError,
        "rngs should be nnx.Rngs, an nnx.RngStream or a jax key, got TorchGenerator",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    call, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        call()
