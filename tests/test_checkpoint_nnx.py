"""Between tensors by name and modules: round trips bit for bit, every misfit in one error, and torch's live modules."""

import re
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from flax import nnx
from making import filled

import jaxrnn
from jaxrnn.checkpoint import CheckpointError
from jaxrnn.checkpoint.named import Described

pytest_plugins = "shared_fixtures"
pytestmark = pytest.mark.usefixtures("compiled_once")
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("RNN", {"num_layers": 2, "nonlinearity": "relu", "batch_first": True}),
    ("LSTM", {"num_layers": 11, "bidirectional": True}),
    ("LSTM", {"proj_size": 2, "bias": False, "bidirectional": True}),
    ("GRU", {"num_layers": 2, "dropout": 0.25}),
    ("RNNCell", {"nonlinearity": "relu"}),
    ("LSTMCell", {}),
    ("GRUCell", {"bias": False}),
]


def _make(name: str, settings: dict[str, Any], seed: int = 0, dtype: Any = jnp.float32) -> Any:
    return filled(lambda: getattr(jaxrnn, name)(3, 4, **settings, param_dtype=dtype, rngs=nnx.Rngs(0)), seed)


def _bytes(tensors: dict[str, np.ndarray]) -> dict[str, tuple[str, bytes]]:
    return {name: (str(value.dtype), value.tobytes()) for name, value in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "settings"), KINDS)
def test_round_trip_is_bit_for_bit(name: str, settings: dict, dtype: str) -> None:
    one, other = (_make(name, settings, seed, jnp.dtype(dtype)) for seed in (0, 1))
    tensors = jaxrnn.state_dict(one)
    assert list(tensors) == list(one.spec.shapes())
    assert all(isinstance(value, np.ndarray) for value in tensors.values())
    assert _bytes(tensors) != _bytes(jaxrnn.state_dict(other))
    assert jaxrnn.load_state_dict(other, tensors) == ([], [])
    assert _bytes(tensors) == _bytes(jaxrnn.state_dict(other))


def _each_dtype(*dtypes: str) -> list:
    """Each kind in each dtype. The quick ones have all kinds and all dtypes, but not all pairs of them."""
    return [
        pytest.param(name, settings, dtype, marks=[] if k % len(dtypes) == d else pytest.mark.slow)
        for k, (name, settings) in enumerate(KINDS)
        for d, dtype in enumerate(dtypes)
    ]


@pytest.mark.torch
@pytest.mark.parametrize(("name", "settings", "dtype"), _each_dtype("float32", "float64", "bfloat16"))
def test_torch_and_back(torch: types.ModuleType, name: str, settings: dict, dtype: str) -> None:
    theirs = getattr(torch.nn, name)(3, 4, **settings, dtype=getattr(torch, dtype))
    ours = jaxrnn.from_torch(theirs)
    assert type(ours).__name__ == name
    for setting, value in settings.items():
        assert getattr(ours, setting) == value
    tensors = jaxrnn.state_dict(ours)
    assert list(tensors) == list(theirs.state_dict())
    assert {str(value.dtype) for value in tensors.values()} == {dtype}
    back = {key: torch.tensor(value.astype(np.float64)).to(getattr(torch, dtype)) for key, value in tensors.items()}
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, back[key])
    # Live parameters, which require a gradient, load as well as a state dict does.
    other = _make(name, settings, 1, jnp.dtype(dtype))
    jaxrnn.load_state_dict(other, dict(theirs.named_parameters()))
    assert _bytes(jaxrnn.state_dict(other)) == _bytes(tensors)


@pytest.mark.torch
@pytest.mark.parametrize(("name", "settings", "dtype"), _each_dtype("float32", "float64", "bfloat16", "float16"))
def test_from_file_to_file_without_torch(
    torch: types.ModuleType, name: str, settings: dict, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch saves; what it saved goes through our module and back into each format where torch cannot be imported."""
    theirs = getattr(torch.nn, name)(3, 4, **settings, dtype=getattr(torch, dtype))
    tensors = theirs.state_dict()
    views = torch.cat([value.flatten() for value in tensors.values()]).split([v.numel() for v in tensors.values()])
    layouts = {
        "plain": tensors,
        "one storage": {key: v.view(tensors[key].shape) for key, v in zip(tensors, views, strict=True)},
        "transposed": {key: v.T.contiguous().T if v.ndim == 2 else v for key, v in tensors.items()},
    }
    for layout, saved in layouts.items():
        torch.save({"state_dict": saved, "epoch": 3}, tmp_path / f"{layout}.pt")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        for layout in layouts:
            ours = _make(name, settings, 1, jnp.dtype(dtype))
            assert jaxrnn.load_state_dict(ours, jaxrnn.checkpoint.load(tmp_path / f"{layout}.pt")) == ([], [])
            tensors = jaxrnn.state_dict(ours)
            for suffix in ("pt", "safetensors", "orbax") if layout == "plain" else ():  # by now all are alike
                jaxrnn.checkpoint.save(tmp_path / f"out.{suffix}", tensors)
                tensors = jaxrnn.checkpoint.load(tmp_path / f"out.{suffix}")
            jaxrnn.checkpoint.save(tmp_path / f"{layout} back.pt", tensors)
    for layout in layouts:
        back = getattr(torch.nn, name)(3, 4, **settings, dtype=getattr(torch, dtype))
        back.load_state_dict(torch.load(tmp_path / f"{layout} back.pt", weights_only=True), strict=True)
        for key, value in theirs.state_dict().items():
            assert torch.equal(back.state_dict()[key], value)


@pytest.mark.torch
def test_from_torch_computes_the_same(torch: types.ModuleType) -> None:
    theirs = torch.nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True, dropout=0.5, dtype=torch.float64).eval()
    ours: Any = jaxrnn.from_torch(theirs)
    assert ours.deterministic
    training: Any = jaxrnn.from_torch(theirs.train())
    assert not training.deterministic
    x = np.random.RandomState(0).randn(2, 5, 3)
    expected, (h_n, c_n) = theirs.eval()(torch.tensor(x))
    output, states = ours(x)
    named = {"output": expected, "h_n": h_n, "c_n": c_n}
    assert_close(dict(zip(named, (output, *states), strict=True)), {k: v.detach().numpy() for k, v in named.items()})


@pytest.mark.torch
def test_from_torch_without_x64_and_of_something_else(torch: types.ModuleType) -> None:
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("error")
        ours: Any = jaxrnn.from_torch(torch.nn.GRUCell(3, 4, dtype=torch.float64))
    assert ours.weight_ih.dtype == jnp.float32
    with pytest.raises(TypeError, match=r"torch_module should be one of .*LSTM.*, got Linear"):
        jaxrnn.from_torch(torch.nn.Linear(3, 4))
    with pytest.raises(TypeError, match="got dict"):
        jaxrnn.from_torch({})


def test_values_take_the_parameters_dtype_and_the_parameter_stays() -> None:
    gru = _make("GRU", {}, dtype=jnp.float32)
    param, shapes = gru.weight_ih_l0, gru.spec.shapes()
    doubles = {name: np.random.RandomState(0).randn(*shape) for name, shape in shapes.items()}
    jaxrnn.load_state_dict(gru, doubles)
    assert gru.weight_ih_l0 is param
    assert param.dtype == jnp.float32
    assert_close(param[...], doubles["weight_ih_l0"].astype(np.float32), atol=0)


class _Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.cells = nnx.List([jaxrnn.GRUCell(3, 4, rngs=rngs), jaxrnn.GRUCell(4, 4, rngs=rngs)])
        self.block = nnx.Dict(lstm=jaxrnn.LSTM(4, 4, bias=False, rngs=rngs))
        self.aaa = nnx.Linear(4, 1, rngs=rngs)


def test_nested_modules_have_dotted_names_in_order_of_definition() -> None:
    model = _Model(nnx.Rngs(0))
    cell = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    names = [f"cells.{k}.{name}" for k in (0, 1) for name in cell]
    names += ["block.lstm.weight_ih_l0", "block.lstm.weight_hh_l0", "aaa.weight", "aaa.bias"]
    tensors = jaxrnn.state_dict(model)
    assert list(tensors) == names
    other = _Model(nnx.Rngs(1))
    assert jaxrnn.load_state_dict(other, {f"net.{name}": value for name, value in tensors.items()}, "net.") == ([], [])
    assert _bytes(jaxrnn.state_dict(other)) == _bytes(tensors)


def test_every_misfit_is_in_one_error_and_nothing_changes() -> None:
    gru = _make("GRU", {})
    before = _bytes(jaxrnn.state_dict(gru))
    tensors: dict[str, Any] = {
        "weight_ih_l0": np.ones((12, 3)),
        "weight_hh_l0": np.ones((4, 12)),
        "bias_ih_l0": np.ones(12, np.int64),
        "weight_ih_l1": np.ones((12, 4)),
    }
    with pytest.raises(jaxrnn.CheckpointError) as caught:
        jaxrnn.load_state_dict(gru, tensors)
    message = str(caught.value)
    assert message.startswith("GRU")
    for part in ("bias_hh_l0", "weight_ih_l1", "(4, 12)", "(12, 4)", "bias_ih_l0", "int64"):
        assert part in message
    assert _bytes(jaxrnn.state_dict(gru)) == before
    # Not being strict forgives names, not shapes.
    with pytest.raises(jaxrnn.CheckpointError, match="weight_hh_l0"):
        jaxrnn.load_state_dict(gru, tensors, strict=False)
    assert _bytes(jaxrnn.state_dict(gru)) == before
    good = {"weight_ih_l0": tensors["weight_ih_l0"], "weight_ih_l1": tensors["weight_ih_l1"]}
    missing, unexpected = jaxrnn.load_state_dict(gru, good, strict=False)
    assert missing == ["weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert unexpected == ["weight_ih_l1"]
    assert np.all(gru.weight_ih_l0[...] == 1)


def test_what_is_no_tensor_of_numbers() -> None:
    cell = _make("GRUCell", {"bias": False})
    tensors = jaxrnn.state_dict(cell)
    for bad in (np.ones((12, 3), bool), np.ones((12, 3), complex), np.full((12, 3), "a"), None, [1.0]):
        with pytest.raises(jaxrnn.CheckpointError, match="weight_ih"):
            jaxrnn.load_state_dict(cell, {**tensors, "weight_ih": bad})


def test_an_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="GRUCell"):
        jaxrnn.load_state_dict(_make("GRUCell", {}), {})


def test_numbers_that_are_not_finite_are_loaded_with_a_warning() -> None:
    cell = _make("GRUCell", {})
    tensors = jaxrnn.state_dict(cell)
    tensors["bias_ih"] = tensors["bias_ih"].copy()
    tensors["bias_ih"][2] = np.inf
    with pytest.warns(UserWarning, match="^GRUCell: NaN or infinite numbers in bias_ih$"):
        assert jaxrnn.load_state_dict(cell, tensors) == ([], [])
    assert cell.bias_ih[2] == np.inf


def test_tied_weights() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.one = _make("GRUCell", {"bias": False})
            self.other = _make("GRUCell", {"bias": False}, seed=1)
            self.other.weight_ih = self.one.weight_ih

    model = Tied()
    tensors = {name: value + 1 for name, value in jaxrnn.state_dict(model).items()}
    assert len(tensors) == 4
    for kept in (tensors, {name: value for name, value in tensors.items() if name != "one.weight_ih"}):
        assert jaxrnn.load_state_dict(model, kept) == ([], [])
        assert model.one.weight_ih is model.other.weight_ih
        assert_close(model.one.weight_ih[...], tensors["one.weight_ih"], atol=0)
    different = {**tensors, "one.weight_ih": tensors["one.weight_ih"] + 1}
    with pytest.raises(jaxrnn.CheckpointError, match=r"one\.weight_ih and other\.weight_ih are one shared parameter"):
        jaxrnn.load_state_dict(model, different)
    del tensors["one.weight_ih"], tensors["other.weight_ih"]
    with pytest.raises(jaxrnn.CheckpointError, match=r"  one\.weight_ih is missing\n  other\.weight_ih is missing\n"):
        jaxrnn.load_state_dict(model, tensors)
    cell = _make("GRUCell", {"bias": False})
    tensors = jaxrnn.state_dict(cell)
    with pytest.raises(jaxrnn.CheckpointError, match=r"  copy is unexpected: it equals weight_hh\n"):
        jaxrnn.load_state_dict(cell, {**tensors, "copy": tensors["weight_hh"]})


def test_gradients_have_torchs_names_in_a_module() -> None:
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    state = nnx.grad(lambda model: model(np.ones((5, 3), np.float32)).sum())(model)
    with pytest.raises(TypeError, match=r"got an nnx\.State") as refused:
        jaxrnn.state_dict(state)
    split, merge = str(refused.value).partition("of it: ")[2].split("; ")
    names = {"model": model, "state": state, "nnx": nnx}
    exec(split, names)
    merged = jaxrnn.state_dict(eval(merge, names))
    assert merged.keys() == {"0.weight", "0.bias"}
    assert_close(merged["0.weight"], np.asarray(state["layers"][0]["kernel"][...]).T)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("dtype", "number"), [("float32", 1e300), ("float32", -1e39), ("float16", 7e4), ("bfloat16", 1e39)]
)
def test_numbers_that_become_infinite_are_named(torch: types.ModuleType, dtype: str, number: float) -> None:
    cell = _make("GRUCell", {}, dtype=jnp.dtype(dtype))
    tensors = {name: value.astype(np.float64) for name, value in jaxrnn.state_dict(cell).items()}
    tensors["bias_ih"][2] = number
    tensors["weight_hh"][0, 0] = number / 10
    assert torch.tensor(tensors["bias_ih"]).to(getattr(torch, dtype)).isinf().any()  # silently, in torch
    words = rf"GRUCell: numbers in (weight_hh, )?bias_ih become infinite in {dtype}: the largest is \d\S* of bias_ih\n"
    with pytest.warns(UserWarning, match=words) as caught:
        jaxrnn.load_state_dict(cell, tensors)
    setting = str(caught[0].message).partition("with ")[2]
    again = eval(f"jaxrnn.GRUCell(3, 4, rngs=nnx.Rngs(0), {setting})", {"jaxrnn": jaxrnn, "nnx": nnx})
    jaxrnn.load_state_dict(again, tensors)
    assert_close(jaxrnn.state_dict(again), tensors, atol=0)


def test_numbers_that_become_infinite_without_x64() -> None:
    tensors = {name: np.full(value.shape, 1e300) for name, value in jaxrnn.state_dict(_make("GRUCell", {})).items()}
    with jax.enable_x64(False), pytest.warns(UserWarning, match=r'\nturn on 64 bits first, by jax.config.update\("'):
        jaxrnn.load_state_dict(_make("GRUCell", {}), tensors)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        ("RNN", {"nonlinearity": "relu"}),
        ("RNN", {"batch_first": True, "dropout": 0.5, "nonlinearity": "tanh"}),
        ("RNNCell", {"nonlinearity": "relu", "batch_first": True}),  # a cell has no batch_first
    ],
)
@pytest.mark.parametrize("place", ["enc.", "module.enc.", "enc.module."])
def test_what_the_file_says_and_the_module_has_otherwise(make: str, said: dict, place: str) -> None:
    def model(**settings: Any) -> nnx.Module:
        layers = {} if make == "RNNCell" else {"num_layers": 2}
        return nnx.Dict(enc=_make(make, layers | settings))

    plain = jaxrnn.state_dict(model())
    tensors = Described({f"net.{place}{name.removeprefix('enc.')}": value for name, value in plain.items()})
    tensors.said = {f"net.{place}": said, "other.": {"nonlinearity": "relu"}}
    with pytest.warns(UserWarning, match="where the file says") as caught:
        assert jaxrnn.load_state_dict(model(), tensors, "net.") == ([], [])
    texts = [str(warning.message) for warning in caught]
    different = {
        name: value for name, value in said.items() if value != "tanh" and not ("Cell" in make and value is True)
    }
    assert [text.partition(",")[0] for text in texts] == [
        f"Dict: enc.{name}={ {'relu': 'tanh', True: False, 0.5: 0.0}[value]!r}" for name, value in different.items()
    ]
    settings = [text.partition("make that module with ")[2] for text in texts]
    jaxrnn.load_state_dict(model(**eval(f"dict({', '.join(settings)})")), tensors, "net.")


class _Weighted(nnx.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2, rngs=nnx.Rngs(0))
        self.weight = nnx.Param(jnp.zeros(3))


def _numbered() -> nnx.Module:
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    setattr(model, "0", nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nnx.List([_Weighted()]), "0/kernel and 0/weight are both read as 0.weight"),
        (
            lambda: nnx.Dict({"a.b": nnx.Param(jnp.zeros(1)), "a": nnx.Dict({"b": nnx.Param(jnp.zeros(2))})}),
            "a.b and a are both read as a.b",
        ),
        (_numbered, "layers[0] and the attribute 0 are both read as 0"),
    ],
    ids=["a layer's own", "dots", "numbers"],
)
def test_two_parameters_under_one_name_of_torchs(make: Callable[[], nnx.Module], words: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(words)):
        jaxrnn.state_dict(make())
