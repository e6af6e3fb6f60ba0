"""Flax's Sequential unpacks a tuple: a state is never the next module's first state, and OutputOnly returns none."""

import functools
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from comparing import assert_close
from flax import linen, nnx
from making import filled, filled_variables

import jaxrnn
from jaxrnn.checkpoint import linen as checkpoint_linen

T, N, H = 3, 2, 4
KINDS = ["RNN", "LSTM", "GRU"]
REFUSED = (
    r"hx of {} came from Sequential, which .*: to drop the state, wrap that module, if it is a layer, as "
    r"{}\.OutputOnly\(layer\), or put `lambda output, state: output` between"
)


def _made(api: str, name: str) -> Any:
    if api == "linen":
        return getattr(jaxrnn.linen, name)(H, H, param_dtype=jnp.float64)
    return getattr(jaxrnn, name)(H, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0))


def _call(api: str, modules: list[Any], *arguments: Any) -> Any:
    if api == "linen":
        return linen.Sequential(modules).init_with_output(jax.random.key(0), *arguments)[0]
    return nnx.Sequential(*modules)(*arguments)


@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize(
    ("one", "other"), [*((kind, kind) for kind in KINDS), ("LSTMCell", "GRUCell"), ("LSTMCell", "RNNCell")]
)
def test_a_state_is_no_first_state_of_the_next(api: str, one: str, other: str) -> None:
    x = normal(N, H) if "Cell" in one else normal(T, N, H)
    modules = [_made(api, one), _made(api, other)]
    ours = jaxrnn.linen if api == "linen" else jaxrnn
    with pytest.raises(TypeError, match=REFUSED.format(other, ours.__name__)):
        _call(api, modules, x)
    # What the message says.
    first, last = modules
    _call(api, [first, lambda output, state: output, last], x)
    if "Cell" not in one:
        assert _call(api, [ours.OutputOnly(first), last], x)[0].shape == (T, N, H)
        with pytest.raises(TypeError, match=REFUSED.format("OutputOnly", ours.__name__)):
            _call(api, [first, ours.OutputOnly(last)], x)


def test_what_the_message_says_is_right() -> None:
    one, other = (jaxrnn.GRU(H, H, param_dtype=jnp.float64, rngs=nnx.Rngs(k)) for k in range(2))
    x, hx = normal(T, N, H), normal(1, N, H)
    model = nnx.Sequential(one, lambda output, state: output, other)
    assert_close(model(x, hx), other(one(x, hx)[0]), atol=1e-12)  # the first takes what the user gives


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat], ids=lambda transform: transform.__name__)
def test_under_nnx_transforms(transform: Any) -> None:
    model = nnx.Sequential(_made("nnx", "GRU"), _made("nnx", "GRU"))
    with pytest.raises(TypeError, match=REFUSED.format("GRU", "jaxrnn")):
        transform(lambda model, x: model(x))(model, normal(T, N, H))


def test_a_transformed_module_of_linen() -> None:
    lstm, x = linen.remat(jaxrnn.linen.LSTM), normal(T, N, H)
    with pytest.raises(TypeError, match=REFUSED.format("LSTM", "jaxrnn.linen")):
        _call("linen", [_made("linen", "LSTM"), lstm(H, H, param_dtype=jnp.float64)], x)
    hx = (jnp.zeros((1, N, H)),) * 2
    assert _call("linen", [lstm(H, H, param_dtype=jnp.float64), lambda output, state: output], x, hx).shape == (T, N, H)


class _Decoder(nnx.Module):
    def __init__(self) -> None:
        self.gru = _made("nnx", "GRU")

    def __call__(self, x: jax.Array) -> jax.Array:
        output, h_n = self.gru(x)
        return self.gru(output, h_n)[0]


def test_modules_that_pass_states_themselves() -> None:
    rnn = nnx.RNN(jaxrnn.FlaxCell(_made("nnx", "LSTMCell")))
    assert _call("nnx", [_Decoder(), rnn, _Decoder()], normal(T, N, H)).shape == (T, N, H)


def _first(output: jax.Array, state: jax.Array) -> jax.Array:
    return output


class _Own(jaxrnn.GRU):
    def __call__(self, x: jax.Array, hx: Any = None, **settings: Any) -> Any:
        return super().__call__(x, hx, **settings)


class _Loop(nnx.Sequential):
    def __call__(self, x: jax.Array, states: list[jax.Array]) -> jax.Array:
        for layer, state in zip(self.layers, states, strict=True):
            x, _ = layer(x, state)
        return x


def test_where_a_sequential_is_in_doubt() -> None:
    """Refused is what Sequential unpacks, wherever the layer is; what anybody passes on purpose is right."""
    x, hx = normal(T, N, H), normal(1, N, H)
    gru, other = _made("nnx", "GRU"), _made("nnx", "GRU")
    own = _Own(H, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    refused = {
        "twice": nnx.Sequential(gru, gru),
        "nested": nnx.Sequential(gru, nnx.Sequential(other)),
        "nested before": nnx.Sequential(nnx.Sequential(gru), other),
        "a subclass": nnx.Sequential(gru, own),
        "a partial": nnx.Sequential(functools.partial(gru, lengths=[T] * N), other),
        "jit": nnx.Sequential(nnx.jit(gru), other),
    }
    for name, model in refused.items():
        with pytest.raises(TypeError, match=r"hx of \w+ came from Sequential"):
            pytest.fail(f"{name}: {model(x)[0].shape}")
    passed = {
        "jit first": (nnx.Sequential(nnx.jit(gru), _first, other), (x, hx)),
        "a partial first": (nnx.Sequential(functools.partial(gru, lengths=[T] * N), _first, other), (x, hx)),
        "a function": (nnx.Sequential(lambda x: (x, hx), gru), (x,)),
        "keywords": (nnx.Sequential(lambda x: {"x": x, "hx": hx}, gru), (x,)),
        "a loop of one's own": (_Loop(gru, other), (x, [hx, hx])),
        "on purpose": (nnx.Sequential(gru, lambda output, state: other(output, state)), (x,)),
        "nested first": (nnx.Sequential(nnx.Sequential(gru), _first), (x, hx)),
    }
    for name, (model, arguments) in passed.items():
        assert jax.tree.leaves(model(*arguments))[0].shape == (T, N, H), name


def test_where_a_sequential_of_linen_is_in_doubt() -> None:
    x, gru = normal(T, N, H), _made("linen", "GRU")
    for modules in ([gru, gru], [gru, linen.Sequential([_made("linen", "GRU")])]):
        with pytest.raises(TypeError, match=REFUSED.format("GRU", "jaxrnn.linen")):
            _call("linen", modules, x)

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        return call(*args, **kwargs)

    with linen.intercept_methods(intercept), pytest.raises(TypeError, match=REFUSED.format("GRU", "jaxrnn.linen")):
        _call("linen", [gru, _made("linen", "GRU")], x)
    assert _call("linen", [lambda x: (x, normal(1, N, H)), gru], x)[0].shape == (T, N, H)


# OutputOnly.

MARKS = {"lengths": np.array([3, 1]), "reset": np.arange(T * N).reshape(T, N) % 4 == 2, "reset_state": normal(H)}


def _layer(**settings: Any) -> jaxrnn.LSTM:
    return filled(lambda: jaxrnn.LSTM(H, H, 2, **settings, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_every_argument_is_passed_on(api: str) -> None:
    x, hx = normal(T, N, H), (normal(2, N, H), normal(2, N, H, seed=1))
    marks = MARKS | {"reset_state": (normal(H), normal(H))}
    if api == "nnx":
        layer: Any = _layer(dropout=0.5)
        alone: Any = jaxrnn.OutputOnly(layer)
        settings: Any = {"rngs": jax.random.key(0)}
    else:
        module = jaxrnn.linen.LSTM(H, H, 2, dropout=0.5, param_dtype=jnp.float64)
        params = filled_variables(module, x, deterministic=True)["params"]
        layer = functools.partial(module.apply, {"params": params})
        alone = functools.partial(jaxrnn.linen.OutputOnly(module).apply, {"params": {"layer": params}})
        settings = {"rng": jax.random.key(0), "deterministic": False}
        assert_close(alone(x, hx, True), layer(x, hx, True)[0], atol=0)  # `linen.remat` wants it by position
        with pytest.raises(ValueError, match="deterministic"):
            alone(x)
    assert_close(alone(x, hx, **marks, **settings), layer(x, hx, **marks, **settings)[0], atol=0)
    packed = jaxrnn.pack_padded_sequence(x, [3, 1])
    found = alone(packed, deterministic=True)
    assert isinstance(found, jaxrnn.PackedSequence)
    assert_close(found.data, layer(packed, deterministic=True)[0].data, atol=0)
    with pytest.raises(TypeError, match=r"module\(\) got an unexpected keyword argument 'nothing'"):
        alone(x, nothing=1)


def test_what_is_no_layer_is_refused() -> None:
    rngs = nnx.Rngs(0)
    for module in (jaxrnn.LSTMCell(H, H, rngs=rngs), nnx.RNN(nnx.GRUCell(H, H, rngs=rngs)), jaxrnn.linen.GRU(H, H)):
        with pytest.raises(TypeError, match=r"layer should be an RNN, LSTM, GRU or Recurrent of jaxrnn\.nnx, got "):
            jaxrnn.OutputOnly(module)
    for module in (jaxrnn.linen.GRUCell(H, H), linen.RNN(linen.GRUCell(H)), _made("nnx", "GRU")):
        with pytest.raises(TypeError, match=r"layer should be .* of jaxrnn\.linen, got "):
            jaxrnn.linen.OutputOnly(module)
    jaxrnn.linen.OutputOnly(linen.remat(jaxrnn.linen.LSTM)(H, H))


def _model() -> nnx.Sequential:
    """PyTorch's model has a module of its own in the second place, which takes the output."""
    head = filled(lambda: nnx.Linear(H, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(1)))
    return nnx.Sequential(jaxrnn.OutputOnly(_layer(dropout=0.5)), lambda output: output, head)


def test_in_nnx_with_dropout_and_transforms() -> None:
    model, x = _model(), normal(T, N, H)
    layer, head = model.layers[0].layer, model.layers[2]

    def by_hand(**settings: Any) -> jax.Array:
        return head(layer(x, **settings)[0])

    assert not np.array_equal(model(x), model(x))  # as train() would make it
    assert_close(model(x, rngs=nnx.Rngs(3)), by_hand(rngs=nnx.Rngs(3)), atol=0)  # Sequential passes rngs on
    model.eval()
    assert layer.deterministic
    plain = by_hand()
    assert_close([model(x), nnx.jit(lambda model, x: model(x))(model, x)], [plain, plain])
    assert not np.array_equal(nnx.view(model, deterministic=False)(x), plain)
    model.train()
    assert_close(nnx.view(model, deterministic=True)(x), plain, atol=0)
    assert_close(model(x, deterministic=True), plain, atol=0)  # the first module gets what Sequential got
    graph, state = nnx.split(nnx.view(model, deterministic=True))
    assert_close(nnx.merge(graph, state)(x), plain, atol=0)
    gradient = nnx.grad(lambda model: jnp.sum(model(x)))(nnx.view(model, deterministic=True))
    assert all(np.abs(a).max() > 0 for a in jax.tree.leaves(gradient))


def test_in_linen_with_dropout() -> None:
    x = normal(T, N, H)
    plain, drops = (
        linen.Sequential([jaxrnn.linen.OutputOnly(layer), linen.Dense(2, param_dtype=jnp.float64)])
        for layer in (
            jaxrnn.linen.LSTM(H, H, 2, dropout=0.5, param_dtype=jnp.float64, deterministic=off) for off in (True, False)
        )
    )
    variables = plain.init(jax.random.key(0), x)
    assert list(variables["params"]["layers_0"]) == ["layer"]
    output, _ = plain.layers[0].layer.apply({"params": variables["params"]["layers_0"]["layer"]}, x)
    head = variables["params"]["layers_1"]
    assert_close(plain.apply(variables, x), output @ head["kernel"] + head["bias"])
    one, other = (drops.apply(variables, x, rngs={"dropout": jax.random.key(k)}) for k in range(2))
    assert not np.array_equal(one, other)


def test_packed_rows_do_not_pass_through_a_sequential() -> None:
    """They are a tuple, which it unpacks. In the first place they are allowed."""
    packed = jaxrnn.pack_padded_sequence(normal(T, N, H), [3, 1])
    one, other = jaxrnn.OutputOnly(_made("nnx", "GRU")), jaxrnn.OutputOnly(_made("nnx", "GRU"))
    assert isinstance(nnx.Sequential(one)(packed), jaxrnn.PackedSequence)
    with pytest.raises(TypeError, match="positional arguments"):
        nnx.Sequential(one, other)(packed)


def test_torchs_sequential_is_loaded(torch: types.ModuleType) -> None:
    class Extract(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x[0]

    theirs = torch.nn.Sequential(torch.nn.LSTM(H, H, 2, dropout=0.5), Extract(), torch.nn.Linear(H, 2)).double().eval()
    model, x = _model(), normal(T, N, H)
    model.eval()
    assert jaxrnn.load_state_dict(model, theirs.state_dict()) == ([], [])
    expected = theirs(torch.tensor(x)).detach().numpy()
    assert_close(model(x), expected)
    assert list(jaxrnn.state_dict(model)) == list(theirs.state_dict())
    layer = jaxrnn.linen.LSTM(H, H, 2, dropout=0.5, param_dtype=jnp.float64, deterministic=True)
    parts = [jaxrnn.linen.OutputOnly(layer), lambda output: output, linen.Dense(2, param_dtype=jnp.float64)]
    module = linen.Sequential(parts)
    loaded = checkpoint_linen.load_state_dict(module, filled_variables(module, x), theirs.state_dict(), x)
    assert_close(module.apply(loaded.variables, x), expected)
    assert list(checkpoint_linen.state_dict(module, loaded.variables, x)) == list(theirs.state_dict())


def test_saved_and_loaded_as_the_layer(tmp_path: Path) -> None:
    """Also alone, shared, and in a subclass with a parameter of its own."""

    class Scaled(jaxrnn.OutputOnly):
        def __init__(self, layer: Any, **params: Any) -> None:
            super().__init__(layer)
            for name, value in params.items():
                setattr(self, name, nnx.Param(value))

    layer = _layer()
    expected = jaxrnn.state_dict(layer)
    jaxrnn.checkpoint.save(tmp_path / "lstm.safetensors", jaxrnn.state_dict(jaxrnn.OutputOnly(layer)))
    tensors = jaxrnn.checkpoint.load(tmp_path / "lstm.safetensors")
    jaxrnn.load_state_dict(layer, {name: np.zeros_like(value) for name, value in expected.items()})
    assert jaxrnn.load_state_dict(jaxrnn.OutputOnly(layer), tensors) == ([], [])
    assert_close(jaxrnn.state_dict(layer), expected, atol=0)
    shared = jaxrnn.OutputOnly(layer)
    assert list(jaxrnn.state_dict(nnx.Sequential(shared, shared))) == [
        f"{k}.{name}" for k in range(2) for name in expected
    ]
    assert list(jaxrnn.state_dict(Scaled(layer, scale=jnp.ones(1)))) == ["scale", *expected]
    with pytest.raises(jaxrnn.CheckpointError, match=r"weight_ih_l0.*\nrename one of them"):
        jaxrnn.state_dict(Scaled(layer, weight_ih_l0=jnp.ones(1)))
    alone = jaxrnn.linen.OutputOnly(jaxrnn.linen.LSTM(H, H, 2, param_dtype=jnp.float64))
    x = normal(T, N, H)
    loaded = checkpoint_linen.load_state_dict(alone, filled_variables(alone, x), tensors, x)
    assert_close(checkpoint_linen.state_dict(alone, loaded.variables, x), expected, atol=0)
    assert_close(alone.apply(loaded.variables, x), layer(x)[0], atol=0)
