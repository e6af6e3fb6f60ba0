"""The names that weights have in checkpoints: what torch's own utilities made of them, put together again."""

import importlib
import re
import types
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from flax import nnx
from making import filled

import jaxrnn
from jaxrnn import checkpoint
from jaxrnn.checkpoint import CheckpointError


def _lstm(torch: types.ModuleType) -> Any:
    torch.manual_seed(0)
    return torch.nn.LSTM(3, 4, 2, bidirectional=True).double()


def _gru(seed: int = 0) -> jaxrnn.GRU:
    return filled(lambda: jaxrnn.GRU(3, 4, rngs=nnx.Rngs(0)), seed)


def _weight_norm(torch: types.ModuleType, dim: int | None = 0) -> Any:
    lstm = _lstm(torch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for name in ("weight_hh_l0", "weight_ih_l1_reverse"):
            torch.nn.utils.weight_norm(lstm, name, dim)
    with torch.no_grad():
        lstm.weight_hh_l0_g *= 1.5
    return lstm


def _parametrized(torch: types.ModuleType) -> Any:
    module = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 2), torch.nn.Linear(4, 2)).double()
    for layer in module:
        torch.nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        module[0].parametrizations.weight.original0.mul_(1.5)
    return module


def _spectral(torch: types.ModuleType, parametrized: bool) -> Any:
    layers = torch.nn.Conv2d(3, 4, 2), torch.nn.Linear(4, 2), torch.nn.ConvTranspose1d(3, 5, 2)
    module = torch.nn.Sequential(*layers).double()
    norm = torch.nn.utils.parametrizations.spectral_norm if parametrized else torch.nn.utils.spectral_norm
    for layer in module:
        norm(layer, n_power_iterations=3)
    return module


def _pruned(torch: types.ModuleType) -> Any:
    prune = importlib.import_module("torch.nn.utils.prune")
    lstm = _lstm(torch)
    for name in ("weight_hh_l0", "bias_ih_l1"):
        prune.random_unstructured(lstm, name, amount=0.5)
    return lstm


MADE: dict[str, Callable[[types.ModuleType], Any]] = {
    "weight norm": _weight_norm,
    "weight norm, one for all": lambda torch: _weight_norm(torch, None),
    "weight norm of columns": lambda torch: _weight_norm(torch, 1),
    "weight norm, parametrized": _parametrized,
    "spectral norm": lambda torch: _spectral(torch, False),
    "spectral norm, parametrized": lambda torch: _spectral(torch, True),
    "pruned": _pruned,
}


@pytest.mark.torch
@pytest.mark.parametrize("name", MADE)
def test_what_torch_keeps_in_parts(torch: types.ModuleType, name: str) -> None:
    module = MADE[name](torch).eval()
    tensors = module.state_dict()
    if "LSTM" in type(module).__name__:
        module(torch.zeros(1, 1, 3).double())  # a hook sets the whole weight before each call
        wanted = {key: getattr(module, key) for key in _lstm(torch).state_dict()}
    else:
        with torch.no_grad():
            for layer in module:
                if hasattr(layer, "weight_u"):  # likewise
                    layer(torch.zeros({4: (1, 3, 5, 5), 2: (1, 4), 3: (1, 3, 5)}[layer.weight_orig.dim()]).double())
        wanted = {f"{k}.{key}": getattr(layer, key) for k, layer in enumerate(module) for key in ("weight", "bias")}
    folded = checkpoint.fold({f"model.{key}": value for key, value in tensors.items()})
    assert folded.keys() == {f"model.{key}" for key in wanted}
    found = {key: np.asarray(folded[f"model.{key}"]) for key in wanted}
    assert {value.dtype for value in found.values()} == {np.dtype(np.float64)}
    assert_close(found, {key: value.detach().numpy() for key, value in wanted.items()}, rtol=1e-13, atol=1e-14)


@pytest.mark.torch
def test_a_weight_normed_lstm_is_found_and_loads(torch: types.ModuleType) -> None:
    theirs = _weight_norm(torch)
    tensors = {f"module.rnn._orig_mod.{key}": value for key, value in theirs.state_dict().items()}
    [found] = checkpoint.find_rnns(tensors)
    assert (found.prefix, found.num_layers, found.bidirectional) == ("module.rnn.", 2, True)
    ours = filled(lambda: jaxrnn.LSTM(3, 4, 2, bidirectional=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    jaxrnn.load_state_dict(ours, tensors, found.prefix)
    x = np.random.RandomState(0).randn(5, 2, 3)
    assert_close(ours(x)[0], theirs(torch.tensor(x))[0].detach().numpy(), atol=1e-12)


def test_folding_keeps_the_dtype_and_the_order() -> None:
    tensors = {
        "a": np.zeros(1),
        "weight_v": np.ones((2, 2), np.float16),
        "weight_g": np.ones((2, 1), np.float16),
        "z": np.zeros(1),
    }
    folded = checkpoint.fold(tensors)
    assert list(folded) == ["a", "weight", "z"]
    assert folded["weight"].dtype == np.float16
    assert folded["a"] is tensors["a"]


def test_what_only_looks_like_parts_stays() -> None:
    tensors = {name: np.ones(2) for name in ("weight_g", "loss_g", "loss_v", "weight_orig", "mask", "x.weight_mask")}
    assert checkpoint.fold(tensors) == tensors
    assert checkpoint.fold({3: np.ones(1), "weight_hh_l0_raw": np.ones(1)}).keys() == {3, "weight_hh_l0_raw"}


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight_g": np.ones((3, 1)), "weight_v": np.ones((2, 2))},
        {"weight_g": np.ones(2), "weight_v": np.ones((2, 2))},
        {"weight_orig": np.ones((2, 3)), "weight_mask": np.ones((3, 2))},
        {"weight_orig": np.ones((2, 3)), "weight_u": np.ones(4), "weight_v": np.ones(3)},
    ],
)
def test_parts_that_do_not_fit(tensors: dict) -> None:
    """They stay, and where it matters that they do not fit, it is told."""
    assert checkpoint.fold(tensors) == tensors
    with pytest.raises(CheckpointError, match="the parts of weight do not fit together: weight_"):
        jaxrnn.load_state_dict(nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0)), tensors, strict=False)
    gru = {f"enc.{name}": value for name, value in jaxrnn.state_dict(_gru()).items()}
    assert [found.prefix for found in checkpoint.find_rnns(gru | tensors)] == ["enc."]
    del gru["enc.weight_hh_l0"]
    parts = {name.replace("weight", "enc.weight_hh_l0"): value for name, value in tensors.items()}
    with pytest.raises(CheckpointError, match=r"the parts of enc\.weight_hh_l0 do not fit together: enc\."):
        checkpoint.find_rnns(gru | parts)


def test_two_keys_that_become_one() -> None:
    with pytest.raises(CheckpointError, match=r"the keys _orig_mod\.x and x are both read as x"):
        checkpoint.fold({"_orig_mod.x": np.ones(1), "x": np.ones(1)})


def test_raw_weights_of_weight_drop() -> None:
    lstm = filled(lambda: jaxrnn.LSTM(3, 4, rngs=nnx.Rngs(0)))
    tensors = jaxrnn.state_dict(lstm)
    raw = tensors.pop("weight_hh_l0")
    for names in (
        {f"rnn.{name}": value for name, value in tensors.items()},
        {f"rnn.module.{name}": value for name, value in {**tensors, "weight_hh_l0": 0 * raw}.items()},
    ):
        stored = {"rnn.weight_hh_l0_raw": raw, **names}
        prefix = "rnn.module." if len(names) == 4 else "rnn."
        folded = checkpoint.fold(stored, raw=True)
        assert_close(folded[f"{prefix}weight_hh_l0"], raw, atol=0)
        other = filled(lambda: jaxrnn.LSTM(3, 4, rngs=nnx.Rngs(0)), 1)
        assert jaxrnn.load_state_dict(other, folded, prefix) == ([], [])
        assert_close(other.weight_hh_l0[...], raw, atol=0)


def test_module_in_front_of_everything() -> None:
    gru = _gru()
    tensors = {f"module.{name}": value for name, value in jaxrnn.state_dict(gru).items()}
    assert jaxrnn.load_state_dict(_gru(1), tensors) == ([], [])
    with pytest.raises(CheckpointError, match=r"\n  x is unexpected"):
        jaxrnn.load_state_dict(_gru(1), {**tensors, "x": np.ones(1)})

    class Wrapped(nnx.Module):
        def __init__(self) -> None:
            self.module = gru

    assert jaxrnn.load_state_dict(Wrapped(), tensors) == ([], [])
    deeper = {f"module.dec.{name}": value for name, value in jaxrnn.state_dict(gru).items()}
    for prefix in ("dec.", "module.dec."):
        assert jaxrnn.load_state_dict(_gru(1), deeper, prefix) == ([], [])


def test_what_is_not_under_the_prefix_does_not_matter() -> None:
    gru = _gru()
    tensors: dict = {f"dec.{name}": value for name, value in jaxrnn.state_dict(gru).items()}
    tensors |= {"vq.weight_g": np.ones(3), "vq.weight_v": np.ones((5, 2)), 3: np.ones(1)}
    assert jaxrnn.load_state_dict(_gru(1), tensors, "dec.") == ([], [])


def test_what_is_where_is_told() -> None:
    gru = _gru()
    tensors = {f"{place}{name}": value for place in ("enc.", "dec.") for name, value in jaxrnn.state_dict(gru).items()}
    with pytest.raises(CheckpointError, match=r"the prefix 'dec' should end in a dot\ngive 'dec.'"):
        jaxrnn.load_state_dict(gru, tensors, "dec")
    with pytest.raises(CheckpointError, match=r"find_rnns.* lists prefixes and sizes: 'enc.', 'dec.'; strict"):
        jaxrnn.load_state_dict(gru, tensors, "decoder.")
    nested = {"model": tensors, "epoch": 3}
    with pytest.raises(
        CheckpointError,
        match=r"tensors should be a dict of arrays, but it has dicts under model\ngive .* tensors\['model'\]",
    ):
        jaxrnn.load_state_dict(gru, nested, strict=False)
    with pytest.raises(TypeError, match=r"tensors should be a dict from name to array, got str\n.*read a file"):
        jaxrnn.load_state_dict(gru, "model.pt")
    with pytest.raises(
        TypeError, match=r"module should be an nnx.Module, got Linen's GRU: use jaxrnn.checkpoint.linen"
    ):
        jaxrnn.load_state_dict(jaxrnn.linen.GRU(3, 4), tensors, "dec.")
    with pytest.raises(TypeError, match=r"module should be an nnx.Module, got Linen's GRU"):
        jaxrnn.state_dict(jaxrnn.linen.GRU(3, 4))
    assert jaxrnn.state_dict({"rnn": gru}).keys() == {f"rnn.{name}" for name in jaxrnn.state_dict(gru)}
    for other in (gru.spec, lambda x: x, jaxrnn.state_dict(gru), gru.weight_ih_l0, None):
        for function in (
            jaxrnn.state_dict,
            lambda it: jaxrnn.load_state_dict(it, {}),
            lambda it: jaxrnn.torch_init(it, 0),
        ):
            with pytest.raises(TypeError, match=f"module should be an nnx.Module, got {type(other).__name__}: give"):
                function(other)


def test_a_layer_serves_a_cell_and_a_cell_a_layer() -> None:
    layer, cell = _gru(), filled(lambda: jaxrnn.GRUCell(3, 4, rngs=nnx.Rngs(0)), 1)
    jaxrnn.load_state_dict(cell, jaxrnn.state_dict(layer))
    x = jnp.ones((1, 2, 3), jnp.float32)
    assert_close(cell(x[0]), layer(x)[1][0], atol=1e-7)
    other = _gru(2)
    jaxrnn.load_state_dict(other, jaxrnn.state_dict(cell))
    assert_close(other(x)[0], layer(x)[0], atol=0)
    two = jaxrnn.GRU(3, 4, 2, rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match="weight_ih_l1 is missing"):
        jaxrnn.load_state_dict(two, jaxrnn.state_dict(cell))
    with pytest.raises(CheckpointError, match="weight_ih_l1 is unexpected"):
        jaxrnn.load_state_dict(cell, jaxrnn.state_dict(two))


@pytest.mark.torch
@pytest.mark.parametrize("parametrized", [False, True])
@pytest.mark.parametrize("make", ["ConvTranspose1d", "Conv1d"])
def test_spectral_norm_of_a_square_convolution(torch, make, parametrized):
    """Its two first axes are alike: which of them is normalised, only u and v tell."""
    torch.manual_seed(0)
    norm = torch.nn.utils.parametrizations.spectral_norm if parametrized else torch.nn.utils.spectral_norm
    module = norm(getattr(torch.nn, make)(4, 4, 3).double())
    for _ in range(3):
        module(torch.ones(1, 4, 5, dtype=torch.float64))
    module.eval()
    module(torch.ones(1, 4, 5, dtype=torch.float64))
    folded = checkpoint.fold(module.state_dict())["weight"]
    assert_close(folded, module.weight.detach().numpy(), atol=1e-12)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["orthogonal", "custom", "custom, of all weights", "custom, after weight_norm"])
def test_other_parametrizations_are_named_and_their_remedy_works(name: str, torch: types.ModuleType) -> None:
    parametrize = torch.nn.utils.parametrize

    class Doubled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, weight: Any) -> Any:
            return weight * self.scale

    model = torch.nn.ModuleDict({"lstm": torch.nn.LSTM(3, 4).double()})
    if name == "orthogonal":
        torch.nn.utils.parametrizations.orthogonal(model["lstm"], "weight_hh_l0")
    if name == "custom, after weight_norm":
        torch.nn.utils.parametrizations.weight_norm(model["lstm"], "weight_hh_l0")
    if "custom" in name:
        names = [n for n, _ in model["lstm"].named_parameters()] if "all" in name else ["weight_hh_l0"]
        for each in names:
            parametrize.register_parametrization(model["lstm"], each, Doubled())
    tensors = model.state_dict()
    ours = filled(lambda: jaxrnn.LSTM(3, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    words = r"a parametrization computes lstm\.weight_hh_l0 from lstm\.parametrizations\.weight_hh_l0\.original"
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.find_rnns(tensors)
    with pytest.raises(CheckpointError, match=words):
        jaxrnn.load_state_dict(ours, tensors, prefix="lstm.")
    calls = re.findall(r"call torch.nn.utils.parametrize.(remove_parametrizations)\(lstm, '(\w+)'\)", str(caught.value))
    for call, each in calls:
        getattr(parametrize, call)(model["lstm"], each)
    jaxrnn.load_state_dict(ours, model.state_dict(), prefix="lstm.")
    assert_close(
        jaxrnn.state_dict(ours), {key: value.numpy() for key, value in model["lstm"].state_dict().items()}, atol=0
    )


def _gru_in(*places: str, factor: float = 2.0) -> dict[str, np.ndarray]:
    """The weights of a GRU at each place, multiplied for each place after the first."""
    weights = jaxrnn.state_dict(_gru())
    return {f"{p}{name}": value * factor**k for k, p in enumerate(places) for name, value in weights.items()}


@pytest.mark.parametrize("places", [("module.enc.", "enc.module."), ("enc.module.", "module.module.enc.")])
@pytest.mark.parametrize("strict", [True, False])
def test_wrapped_names_that_meet(places: tuple[str, str], strict: bool) -> None:
    model = nnx.Dict(enc=_gru(1))
    words = re.escape(f"{places[0]}weight_ih_l0 and {places[1]}weight_ih_l0 are both read as enc.weight_ih_l0\n")
    with pytest.raises(CheckpointError, match=f"^{words}leave one of them out$"):
        jaxrnn.load_state_dict(model, _gru_in(*places), strict=strict)
    jaxrnn.load_state_dict(model, _gru_in(*places, factor=1.0), strict=False)  # two names of one tensor
    assert_close(jaxrnn.state_dict(model), _gru_in("enc."), atol=0)
    jaxrnn.load_state_dict(_gru(1), _gru_in(*places, "dec."), "dec.")  # what is elsewhere does not matter
    names = [*_gru_in(*places)]
    with pytest.raises(CheckpointError, match=words):
        checkpoint.optimizer_from_torch({"state": {}, "param_groups": []}, model, names)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_keys_that_differ_by_a_wrapper(wrapper: str) -> None:
    tensors = _gru_in("enc.", f"enc.{wrapper}")
    words = rf"the keys enc\.weight_ih_l0 and enc\.{wrapper}weight_ih_l0 are both read as enc\.weight_ih_l0"
    for read in (
        checkpoint.fold,
        checkpoint.find_rnns,
        lambda tensors: jaxrnn.load_state_dict(_gru(), tensors, "enc."),
    ):
        with pytest.raises(CheckpointError, match=words):
            read(tensors)
    names = [*tensors]
    with pytest.raises(CheckpointError, match=words.removeprefix("the keys ")):
        checkpoint.optimizer_from_torch({"state": {}, "param_groups": []}, nnx.Dict(enc=_gru()), names)


def test_a_cells_weights_beside_a_layers() -> None:
    """Neither is taken for the other: those that are not needed are unexpected."""
    layer = jaxrnn.state_dict(_gru())
    cell = {name.removesuffix("_l0"): value + 1 for name, value in layer.items()}
    with pytest.raises(CheckpointError, match="\n  weight_ih is unexpected\n"):
        jaxrnn.load_state_dict(_gru(1), cell | layer)
    with pytest.raises(CheckpointError, match="\n  weight_ih_l0 is unexpected\n"):
        jaxrnn.load_state_dict(jaxrnn.GRUCell(3, 4, rngs=nnx.Rngs(0)), cell | layer)


def test_parts_in_both_spellings_of_torch() -> None:
    """They do not get mixed, and two weights do not become one."""
    one = {"weight_g": np.full((2, 1), 2.0), "weight_v": np.eye(2)}
    other = {"parametrizations.weight.original0": np.full((2, 1), 3.0), "parametrizations.weight.original1": np.eye(2)}
    words = r"weight_g with its other parts and parametrizations\.weight\.original0 with its other parts are both read"
    with pytest.raises(CheckpointError, match=words):
        checkpoint.fold(one | other)
    same = {name: value for name, (_, value) in zip(other, one.items(), strict=True)}
    assert_close(checkpoint.fold(one | same), {"weight": 2 * np.eye(2)})
    linear = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    for mixed in (["weight_v", "parametrizations.weight.original0"], ["weight_g", "parametrizations.weight.original1"]):
        parts = {name: value for name, value in (one | other).items() if name in mixed}
        assert checkpoint.fold(parts) == parts
        with pytest.raises(CheckpointError, match="a parametrization computes weight from parametrizations"):
            jaxrnn.load_state_dict(linear, parts)


@pytest.mark.torch
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_a_parametrization_without_weights_after_a_norm(
    torch: types.ModuleType, norm: str, legacy: bool, tmp_path: Any
) -> None:
    """Of which torch's files say in `_metadata` that it is there."""
    lstm = torch.nn.LSTM(3, 4)
    getattr(torch.nn.utils.parametrizations, norm)(lstm, "weight_hh_l0")
    model = torch.nn.ModuleDict({"enc": torch.nn.ModuleDict({"_orig_mod": lstm})}).eval()

    def save() -> str:
        torch.save(model.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        return str(tmp_path / "a.pt")

    [found] = checkpoint.find_rnns(checkpoint.load(save()))
    assert found.prefix == "enc."
    twice = type("Twice", (torch.nn.Module,), {"forward": lambda self, weight: 2 * weight})
    torch.nn.utils.parametrize.register_parametrization(lstm, "weight_hh_l0", twice())
    tensors = checkpoint.load(save())
    words = r"a parametrization computes enc\.weight_hh_l0 from .*enc\.parametrizations\.weight_hh_l0\.1, and files do"
    for given in (tensors, checkpoint.fold(tensors)):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.find_rnns(given)
        with pytest.raises(CheckpointError, match=words.replace(r"enc\.", "(enc.)?")):
            jaxrnn.load_state_dict(jaxrnn.LSTM(3, 4, rngs=nnx.Rngs(0)), given, "enc.")
    torch.nn.utils.parametrize.remove_parametrizations(lstm, "weight_hh_l0")
    ours = jaxrnn.LSTM(3, 4, rngs=nnx.Rngs(0))
    jaxrnn.load_state_dict(ours, checkpoint.load(save()), "enc.")
    assert_close(ours.weight_hh_l0[...], lstm.weight_hh_l0.detach().numpy(), atol=0)
