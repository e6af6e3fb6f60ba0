"""Flax's Sequential unpacks a tuple: the state of one module never passes for the first state of the next."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from arrays import normal
from comparing import assert_close
from flax import linen, nnx

import jaxrnn

T, N, H = 3, 2, 4
KINDS = ["RNN", "LSTM", "GRU"]
REFUSED = r"hx of {} came from Sequential, which .*: to drop the state, put `lambda output, state: output`"


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
    with pytest.raises(TypeError, match=REFUSED.format(other)):
        _call(api, modules, x)
    modules.insert(1, lambda output, state: output)  # what the message says
    _call(api, modules, x)


def test_what_the_message_says_is_right() -> None:
    one, other = (jaxrnn.GRU(H, H, param_dtype=jnp.float64, rngs=nnx.Rngs(k)) for k in range(2))
    x, hx = normal(T, N, H), normal(1, N, H)
    model = nnx.Sequential(one, lambda output, state: output, other)
    assert_close(model(x, hx), other(one(x, hx)[0]), atol=1e-12)  # the first takes what the user gives


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat], ids=lambda transform: transform.__name__)
def test_under_nnx_transforms(transform: Any) -> None:
    model = nnx.Sequential(_made("nnx", "GRU"), _made("nnx", "GRU"))
    with pytest.raises(TypeError, match=REFUSED.format("GRU")):
        transform(lambda model, x: model(x))(model, normal(T, N, H))


def test_a_transformed_module_of_linen() -> None:
    lstm, x = linen.remat(jaxrnn.linen.LSTM), normal(T, N, H)
    with pytest.raises(TypeError, match=REFUSED.format("LSTM")):
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
        with pytest.raises(TypeError, match=REFUSED.format("GRU")):
            _call("linen", modules, x)

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        return call(*args, **kwargs)

    with linen.intercept_methods(intercept), pytest.raises(TypeError, match=REFUSED.format("GRU")):
        _call("linen", [gru, _made("linen", "GRU")], x)
    assert _call("linen", [lambda x: (x, normal(1, N, H)), gru], x)[0].shape == (T, N, H)
