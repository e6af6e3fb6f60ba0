"""`kernel_init=`, `recurrent_kernel_init=` and `bias_init=`: torch's draws without them, one draw a gate with them."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from flax import linen, nnx
from jax.nn import initializers
from jax.sharding import PartitionSpec

import jaxrnn
from jaxrnn.initializers import FLAX, forget_bias

F, H = 24, 16
KEY = jax.random.key(0)
ROLES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
LAYERS = {"RNN": jaxrnn.RNN_TANH, "LSTM": jaxrnn.LSTM_CELL, "GRU": jaxrnn.GRU_CELL}
Params = Mapping[str, Any]


def _linen_init(module: Any, *shape: int) -> Params:
    return module.init(KEY, jnp.ones(shape, module.param_dtype))["params"]


def _made(api: str, name: str, *sizes: int, **settings: Any) -> Params:
    """The initial parameters of a layer or a cell, by either API or from a spec."""
    if api == "nnx":
        module = getattr(jaxrnn, name)(*sizes, **settings, rngs=nnx.Rngs(0))
        return dict(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    if api == "linen":
        axes = (2,) if name.endswith("Cell") else (2, 2)
        return _linen_init(getattr(jaxrnn.linen, name)(*sizes, **settings), *axes, sizes[0])
    inits = {key: settings.pop(key) for key in FLAX if key in settings}
    return jaxrnn.Spec(LAYERS[name], *sizes, **settings).init(KEY, **inits)


def _gates(array: jax.Array, gates: int) -> list[np.ndarray]:
    return np.split(np.asarray(array, np.float64), gates)


def _is_torchs(array: Any) -> bool:
    """Uniform within 1/sqrt(H) of 0, and not constant."""
    numbers = np.abs(np.asarray(array, np.float64))
    return bool(numbers.max() <= H**-0.5 and numbers.std() > 0.2 * H**-0.5)


def _has_flaxs(params: Params, gates: int, suffix: str = "", features: int = F) -> None:
    """Kernels of lecun_normal, each gate's recurrent weights orthogonal, and no bias."""
    for kernel in _gates(params[f"weight_ih{suffix}"], gates):
        assert kernel.shape == (H, features)
        spread = features**-0.5
        assert abs(kernel.std() - spread) < 3 * spread / np.sqrt(2 * kernel.size)
        assert abs(kernel.mean()) < 4 * spread / np.sqrt(kernel.size)
        assert np.abs(kernel).max() <= 2 * spread / 0.8796  # where the normal distribution is cut off
        assert np.abs(kernel).max() > 1.5 * spread
    for kernel in _gates(params[f"weight_hh{suffix}"], gates):
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(H), atol=1e-5)
    for role in ("bias_ih", "bias_hh"):
        assert not np.any(params[role + suffix])


class Declared(linen.Module):
    """What Linen draws for these names by this initialiser."""

    shapes: Any

    @linen.compact
    def __call__(self) -> None:
        for name, shape in self.shapes.items():
            self.param(name, lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -0.25, 0.25), shape)


@pytest.mark.parametrize("name", LAYERS)
def test_without_them_the_draws_are_torchs_as_ever(name: str) -> None:
    """Bit for bit: one uniform draw for each parameter."""
    spec = jaxrnn.Spec(LAYERS[name], F, H, 2, bidirectional=True)
    keys = jax.random.split(nnx.Rngs(0).params(), len(spec.shapes()))
    expected = {
        key: jax.random.uniform(keys[k], shape, jnp.float32, -0.25, 0.25)
        for k, (key, shape) in enumerate(spec.shapes().items())
    }
    settings = {"num_layers": 2, "bidirectional": True}
    for none in ({}, dict.fromkeys(FLAX)):
        found = spec.init(nnx.Rngs(0).params(), **none), _made("nnx", name, F, H, **settings, **none)
        jax.tree.map(np.testing.assert_array_equal, found, (expected, expected))
        theirs = Declared(spec.shapes()).init(KEY)["params"]
        jax.tree.map(np.testing.assert_array_equal, _made("linen", name, F, H, **settings, **none), dict(theirs))


FLAX_CELLS = ("LSTMCell", "OptimizedLSTMCell", "SimpleCell", "GRUCell")


@pytest.mark.parametrize("name", FLAX_CELLS)
@pytest.mark.parametrize("api", [nnx, linen])
def test_flax_is_what_flaxs_cells_have_by_default(api: Any, name: str) -> None:
    defaults = inspect.signature(getattr(api, name).__init__).parameters
    for key, ours in FLAX.items():
        shape = (H,) if key == "bias_init" else (F, H)
        with jax.enable_x64(False):  # nnx.LSTMCell draws in JAX's default dtype
            found, expected = (init(KEY, shape, jnp.float32) for init in (ours, defaults[key].default))
        np.testing.assert_array_equal(found, expected)


def _from_flax(api: str, name: str) -> Params:
    cell = {"RNN": "SimpleCell", "LSTM": "LSTMCell", "GRU": "GRUCell"}[name]
    if api == "nnx":
        return jaxrnn.state_dict(jaxrnn.from_flax(getattr(nnx, cell)(F, H, rngs=nnx.Rngs(0))))
    theirs = getattr(linen, cell)(H)
    x = jnp.ones((2, F), jnp.float32)
    return jaxrnn.from_flax(theirs, theirs.init(KEY, theirs.initialize_carry(KEY, x.shape), x))[1]["params"]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_the_weights_are_distributed_as_flaxs(api: str, name: str) -> None:
    gates = len(LAYERS[name].gates)
    _has_flaxs(_made(api, f"{name}Cell", F, H, **FLAX), gates)
    params = _made(api, name, F, H, num_layers=2, bidirectional=True, **FLAX)
    for suffix, features in {"_l0": F, "_l0_reverse": F, "_l1": 2 * H, "_l1_reverse": 2 * H}.items():
        _has_flaxs(params, gates, suffix, features)
    theirs = _from_flax(api, name)
    if (api, name) == ("nnx", "GRU"):  # which makes one draw for its three gates
        together = np.asarray(theirs["weight_hh"])
        np.testing.assert_allclose(together.T @ together, np.eye(H), atol=1e-5)
        theirs = {**theirs, "weight_hh": params["weight_hh_l0"]}
    _has_flaxs(theirs, gates)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_each_gate_is_a_draw_of_its_own(api: str) -> None:
    """With Flax's shape, and the key of its own."""
    seen = []

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        seen.append((jax.random.key_data(key).tolist(), shape, dtype))
        return len(seen) * jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)

    params = _made(api, "GRU", 3, 2, kernel_init=init, bias_init=init)
    assert [shape for _, shape, _ in seen] == [(3, 2)] * 3 + [(2,)] * 3 + [(2,)]  # the last is n's in bias_hh
    assert len({str(key) for key, *_ in seen}) == 7
    rows = np.arange(6.0).reshape(3, 2).T
    np.testing.assert_array_equal(params["weight_ih_l0"], np.concatenate([rows, 2 * rows, 3 * rows]))
    np.testing.assert_array_equal(params["bias_ih_l0"], [0, 4, 0, 5, 0, 6])
    np.testing.assert_array_equal(params["bias_hh_l0"], [0, 0, 0, 0, 0, 7])


@pytest.mark.parametrize("api", ["nnx", "linen", "spec"])
def test_some_gates_alone(api: str) -> None:
    inits = {"recurrent_kernel_init": {"z": initializers.orthogonal()}, "bias_init": {"r": initializers.ones}}
    params = _made(api, "GRU", F, H, **inits)
    r, z, n = _gates(params["weight_hh_l0"], 3)
    np.testing.assert_allclose(z @ z.T, np.eye(H), atol=1e-5)
    first, second = (_gates(params[name], 3) for name in ("bias_ih_l0", "bias_hh_l0"))
    assert (first[0] == 1).all()
    assert (second[0] == 0).all()
    assert all(map(_is_torchs, [r, n, params["weight_ih_l0"], *first[1:], *second[1:]]))
    n_too = _made(api, "GRU", F, H, bias_init={"n": initializers.ones})
    assert (_gates(n_too["bias_ih_l0"], 3)[2] == 1).all()
    assert (_gates(n_too["bias_hh_l0"], 3)[2] == 1).all()
    assert _is_torchs(_gates(n_too["bias_hh_l0"], 3)[0])


def test_a_forget_bias() -> None:
    """The sum of both biases is the value for f, and 0 for the others; the weights are torch's."""
    for value in (1.0, 2.5):
        params = _made("nnx", "LSTM", F, H, bias_init=forget_bias(value))
        total = np.reshape(params["bias_ih_l0"] + params["bias_hh_l0"], (4, H))
        np.testing.assert_array_equal(total, np.repeat([[0], [value], [0], [0]], H, axis=1))
        assert _is_torchs(params["weight_hh_l0"])
    assert forget_bias().keys() == set(jaxrnn.LSTM_CELL.gates)


@pytest.mark.parametrize("api", ["nnx", "linen", "spec"])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float16, jnp.bfloat16])
def test_a_projection_and_other_dtypes(api: str, dtype: Any) -> None:
    """QR, which is what is orthogonal, has no dtype of 16 bits."""
    if api == "spec":
        params = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, proj_size=5).init(KEY, dtype, **FLAX)
    else:
        params = _made(api, "LSTM", F, H, proj_size=5, param_dtype=dtype, **FLAX)
    assert {value.dtype for value in params.values()} == {jnp.dtype(dtype)}
    size = 1e-12 if dtype == jnp.float64 else 0.02
    for kernel in _gates(params["weight_hh_l0"], 4):
        np.testing.assert_allclose(kernel.T @ kernel, np.eye(5), atol=size)
    assert abs(np.asarray(params["weight_hr_l0"], np.float64).std() - H**-0.5) < 0.4 * H**-0.5
    some = jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H, proj_size=5).init(KEY, dtype, kernel_init={"i": initializers.zeros})
    assert _is_torchs(some["weight_hr_l0"])


def test_other_cells_keep_what_is_their_own() -> None:
    for cell in (jaxrnn.LAYER_NORM_LSTM_CELL, jaxrnn.PEEPHOLE_LSTM_CELL, jaxrnn.IND_RNN_CELL, jaxrnn.MIN_GRU_CELL):
        spec = jaxrnn.Spec(cell, F, H)
        before, after = spec.init(KEY), spec.init(KEY, **FLAX)
        assert list(after) == list(spec.shapes())
        own = [name for name in before if name.removesuffix("_l0") in cell.params]
        for name in own:
            np.testing.assert_array_equal(before[name], after[name])
        assert not np.any(after["bias_ih_l0"])
        assert not _is_torchs(after["weight_ih_l0"])
    assert (jaxrnn.Spec(jaxrnn.LAYER_NORM_LSTM_CELL, F, H).init(KEY, **FLAX)["weight_ln_c_l0"] == 1).all()


def test_sizes_of_zero_and_no_biases() -> None:
    params = jaxrnn.CellSpec(jaxrnn.LSTM_CELL, 0, 0).init(KEY, **FLAX)
    assert {name: value.shape for name, value in params.items()} == jaxrnn.CellSpec(jaxrnn.LSTM_CELL, 0, 0).shapes()
    no_input = jaxrnn.CellSpec(jaxrnn.GRU_CELL, 0, H).init(KEY, **FLAX)
    _, z, _ = _gates(no_input["weight_hh"], 3)
    np.testing.assert_allclose(z @ z.T, np.eye(H), atol=1e-5)
    assert list(jaxrnn.CellSpec(jaxrnn.GRU_CELL, F, H, bias=False).init(KEY, **FLAX)) == ["weight_ih", "weight_hh"]


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_sharded_parameters(api: str) -> None:
    """The same numbers, with their axes, and on a mesh sharded."""
    plain = _made(api, "LSTM", F, H, **FLAX)
    spec = PartitionSpec(None, "model")
    with jax.set_mesh(jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))):
        if api == "nnx":
            module = nnx.jit(lambda: jaxrnn.LSTM(F, H, hidden_axis="model", **FLAX, rngs=nnx.Rngs(0)))()
            weight = module.weight_hh_l0
            assert nnx.get_partition_spec(nnx.state(module))["weight_hh_l0"].get_raw_value() == spec
            weight = weight[...]
        else:
            module = jaxrnn.linen.LSTM(F, H, hidden_axis="model", **FLAX)
            variables = jax.jit(module.init)(KEY, jnp.ones((2, 2, F), jnp.float32))
            assert linen.get_partition_spec(variables)["params"]["weight_hh_l0"] == spec
            weight = variables["params"]["weight_hh_l0"].unbox()
    np.testing.assert_allclose(weight, plain["weight_hh_l0"], atol=1e-6)


def test_under_jit_and_vmap_over_keys() -> None:
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H)
    keys = jax.random.split(KEY, 3)
    many = jax.jit(jax.vmap(lambda key: spec.init(key, **FLAX)))(keys)
    for k in range(3):
        one = spec.init(keys[k], **FLAX)
        jax.tree.map(lambda a, b, k=k: np.testing.assert_allclose(a[k], b, atol=1e-6), many, one)
    made = nnx.vmap(lambda key: jaxrnn.GRU(F, H, **FLAX, rngs=nnx.Rngs(key)))(keys)
    assert made.weight_hh_l0.shape == (3, 3 * H, H)
    assert not np.array_equal(made.weight_hh_l0[0], made.weight_hh_l0[1])


def test_a_module_does_not_keep_them() -> None:
    """So that modules of the same settings run the same compiled program."""
    plain, flax = (nnx.split(jaxrnn.GRU(3, 4, **inits, rngs=nnx.Rngs(0)))[0] for inits in ({}, FLAX))
    assert plain == flax
    shapes = nnx.eval_shape(lambda: jaxrnn.GRU(3, 4, **FLAX, rngs=nnx.Rngs(0)))
    assert shapes.weight_hh_l0.shape == (12, 4)


def test_linens_transforms_take_a_module_with_them() -> None:
    """Some compare its fields, or copy it."""
    x = jnp.asarray(normal(2, 3, F), jnp.float32)

    class Model(linen.Module):
        wrap: Callable[[Any], Any]

        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return self.wrap(jaxrnn.linen.LSTM)(F, H, bias_init=forget_bias(), name="lstm")(x)[0]

    for wrap in (linen.jit, linen.remat):
        model = Model(wrap)
        variables = model.init(KEY, x)
        assert variables["params"]["lstm"]["bias_ih_l0"].sum() == H
        assert model.apply(variables, x).shape == (2, 3, H)


def _boxed(*arguments: Any) -> Any:
    return linen.with_partitioning(initializers.zeros, (None, "model"))(*arguments)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a name": (
        {"kernel_init": "orthogonal"},
        TypeError,
        "kernel_init should be a function (key, shape, dtype), such as jax.nn.initializers.orthogonal(), got 'ortho",
    ),
    "a number": ({"bias_init": 1.0}, TypeError, "bias_init should be a function (key, shape, dtype)"),
    "of one gate": (
        {"recurrent_kernel_init": {"r": 1.0}},
        TypeError,
        "recurrent_kernel_init['r'] should be a function (key, shape, dtype)",
    ),
    "another function": ({"bias_init": jnp.ones}, TypeError, "bias_init should be a function (key, shape, dtype)"),
    "a maker of some": ({"bias_init": initializers.normal}, TypeError, "bias_init should be a function"),
    "not called": (
        {"recurrent_kernel_init": initializers.orthogonal},
        TypeError,
        "recurrent_kernel_init should return an array of shape (4, 4), got function: call it first, as in orthogonal()",
    ),
    "another shape": (
        {"kernel_init": lambda key, shape, dtype: jnp.zeros(shape[::-1], dtype)},
        TypeError,
        "kernel_init should return an array of shape (3, 4), got one of shape (4, 3): it is called for each gate",
    ),
    "with axes": (
        {"kernel_init": _boxed},
        TypeError,
        "kernel_init should return an array of shape (3, 4), got Partitioned: to shard parameters, give hidden_axis",
    ),
    "another cell's gate": (
        {"bias_init": forget_bias()},
        ValueError,
        "bias_init should have names of gates of GRU, ('r', 'z', 'n'), got 'i'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_ones_say_what_to_give(name: str) -> None:
    wrong, error, words = WRONG[name]
    for make in (
        lambda: jaxrnn.GRU(3, 4, **wrong, rngs=nnx.Rngs(0)),
        lambda: jaxrnn.Spec(jaxrnn.GRU_CELL, 3, 4).init(KEY, **wrong),
        lambda: _linen_init(jaxrnn.linen.GRU(3, 4, **wrong), 2, 2, 3),
    ):
        with pytest.raises(error, match=re.escape(words)):
            make()


def test_linen_says_so_at_construction() -> None:
    with pytest.raises(ValueError, match="got 'i'"):
        jaxrnn.linen.GRU(3, 4, bias_init=forget_bias())


def test_flax_is_read_only() -> None:
    with pytest.raises(TypeError):
        FLAX["bias_init"] = initializers.ones
