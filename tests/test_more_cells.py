"""Cells with parameters of their own, and the modules of any cell. The derivatives of all are in test_recurrence."""

import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close
from flax import nnx
from making import filled, filled_variables

import jaxrnn
from jaxrnn import checkpoint
from jaxrnn.checkpoint.check import check

F, H, T, N = 3, 4, 5, 2
CELLS = [jaxrnn.LAYER_NORM_LSTM_CELL, jaxrnn.PEEPHOLE_LSTM_CELL, jaxrnn.IND_RNN_CELL, jaxrnn.MIN_GRU_CELL]


def _step(gates: tuple, hidden: tuple, state: tuple, params: dict) -> tuple:
    """Every kind of parameter: a number, one for each gate, for each unit, and for each unit of each gate."""
    a, b = gates
    (h,) = state
    a = a * params["for_gates"][0] + params["for_both"][0] * h
    b = b * params["for_gates"][1] + params["for_both"][1]
    return (jnp.tanh(a + params["number"] * params["for_units"] * b),)


EVERY_KIND = jaxrnn.Cell(
    "every kind",
    gates=("a", "b"),
    states=("h",),
    step=_step,
    params={
        "number": (),
        "for_gates": ("gates",),
        "for_units": jaxrnn.Parameter(("hidden",), jax.nn.initializers.constant(0.25)),
        "for_both": ("gates", "hidden"),
    },
)


def test_the_layer_normalised_lstm_is_pytorchs(torch: types.ModuleType) -> None:
    """Against torch's own layer_norm, in the order of PyTorch's benchmarks: values and all gradients."""
    spec = jaxrnn.Spec(jaxrnn.LAYER_NORM_LSTM_CELL, F, H, bias=False)
    params, x, hx = parameters(spec), normal(T, N, F), (normal(1, N, H), normal(1, N, H, seed=1))

    def ours(params: Any, x: Any, hx: Any) -> Any:
        output, (h, c) = jaxrnn.apply(spec, params, x, hx)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(h)) + jnp.sum(c**2)

    w = {name.removesuffix("_l0"): torch.tensor(value, requires_grad=True) for name, value in params.items()}
    inputs, (h_0, c_0) = torch.tensor(x, requires_grad=True), (torch.tensor(a, requires_grad=True) for a in hx)

    def normalised(a: Any, name: str) -> Any:
        weight, bias = w[f"weight_ln_{name}"].flatten(), w[f"bias_ln_{name}"].flatten()
        return torch.nn.functional.layer_norm(a, a.shape[-1:], weight, bias)

    h, c, outputs = h_0[0], c_0[0], []
    for x_t in inputs:
        sums = normalised(x_t @ w["weight_ih"].T, "ih") + normalised(h @ w["weight_hh"].T, "hh")
        i, f, g, o = sums.chunk(4, 1)
        c = normalised(torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g), "c")
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    loss = torch.stack(outputs).sin().sum() + h.cos().sum() + (c**2).sum()
    loss.backward()
    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(params, x, hx)
    expected = {f"{name}_l0": a.grad.numpy() for name, a in w.items()}, inputs.grad, (h_0.grad, c_0.grad)
    assert_close(value, loss.item())
    assert_close(gradients, jax.tree.map(np.asarray, expected))


@pytest.mark.parametrize("cell", [*CELLS, EVERY_KIND], ids=lambda cell: cell.name)
def test_the_modules_of_any_cell(cell: jaxrnn.Cell) -> None:
    """Both of Flax's APIs have the parameters of the spec, and compute what `apply` does."""
    spec = jaxrnn.Spec(cell, F, H, 2, bidirectional=True)
    module = filled(lambda: jaxrnn.Recurrent(cell, F, H, 2, bidirectional=True, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert {name: params[name].shape for name in spec.shapes()} == spec.shapes()
    x, lengths = normal(T, N, F).astype(np.float32), [T, 2]
    linen_module = jaxrnn.linen.Recurrent(cell, F, H, 2, bidirectional=True)
    variables = filled_variables(linen_module, x)
    assert jax.tree.map(jnp.shape, variables["params"]) == spec.shapes()
    expected = jaxrnn.apply(spec, params, x, lengths=lengths)
    assert_close(module(x, lengths=lengths), expected, atol=0)
    assert_close(linen_module.apply({"params": params}, x, lengths=lengths), expected, atol=0)
    assert_close(module(jaxrnn.pack_padded_sequence(x, lengths))[1], expected[1], atol=1e-6)


def test_one_step_is_a_step_of_the_sequence() -> None:
    spec, one = jaxrnn.Spec(EVERY_KIND, F, H), jaxrnn.CellSpec(EVERY_KIND, F, H)
    params, x = parameters(spec), normal(T, F)
    outputs, h_n = jaxrnn.apply(spec, params, x)
    h = np.zeros(H)
    for x_t, output in zip(x, outputs, strict=True):
        h = jaxrnn.apply_cell(one, {name.removesuffix("_l0"): value for name, value in params.items()}, x_t, h)
        assert_close(h, output)
    assert_close(h, h_n[0])


def test_initial_values_are_the_parameters_own() -> None:
    module = jaxrnn.Recurrent(EVERY_KIND, F, H, rngs=nnx.Rngs(0))
    values = jaxrnn.state_dict(module)
    assert np.all(values["for_units_l0"] == 0.25)
    assert values["number_l0"].shape == ()
    assert 0 < np.abs(values["for_both_l0"]).max() <= 0.5
    variables = jaxrnn.linen.Recurrent(EVERY_KIND, F, H).init(jax.random.key(0), np.zeros((T, F), np.float32))
    assert np.all(variables["params"]["for_units_l0"] == 0.25)


@pytest.mark.parametrize("remat", ["gates", 2])
def test_recomputing_changes_nothing(remat: Any) -> None:
    spec = jaxrnn.Spec(EVERY_KIND, F, H, bidirectional=True)
    params, x = parameters(spec), normal(T, N, F)

    def gradient(params: Any, x: Any, remat: Any) -> Any:
        return jax.grad(lambda *a: jnp.sum(jnp.sin(jaxrnn.apply(spec, *a, remat=remat)[0])), (0, 1))(params, x)

    found, expected = jax.jit(lambda *a: [gradient(*a, remat), gradient(*a, "none")])(params, x)
    assert_close(found, expected)


def test_16_bit_gradients_of_own_parameters_add_up_in_float32() -> None:
    spec = jaxrnn.Spec(jaxrnn.IND_RNN_CELL, 1, 1, bias=False)
    params = {"weight_ih_l0": np.ones((1, 1)), "weight_u_l0": np.array([0.5])}

    def gradient(dtype: Any) -> np.ndarray:
        x = jnp.ones((1000, 1), dtype)
        typed = {name: jnp.asarray(value, dtype) for name, value in params.items()}
        found = jax.jit(jax.grad(lambda p: jnp.sum(jaxrnn.apply(spec, p, x)[0])))(typed)
        return np.asarray(found["weight_u_l0"], np.float64)

    assert_close(gradient(jnp.bfloat16) / gradient(jnp.float64), np.ones(1), atol=0.02)


def test_units_sharded_are_as_units_together(optimized: None) -> None:
    spec = jaxrnn.Spec(EVERY_KIND, F, H)
    params, x = parameters(spec), normal(T, N, F)

    def gradient(params: Any, axis: str | None) -> Any:
        return jax.grad(lambda p: jnp.sum(jnp.sin(jaxrnn.apply(spec, p, x, hidden_axis=axis)[0])))(params)

    expected = jax.jit(gradient, static_argnums=1)(params, None)
    with jax.set_mesh(jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))):
        found = jax.jit(gradient, static_argnums=1)(params, "model")
    assert_close(found, expected)
    assert spec.hidden_axes()["for_both_l0"] == (False, True)
    assert spec.hidden_axes()["number_l0"] == ()


def test_checkpoints_hold_own_parameters(tmp_path: Path) -> None:
    """Saved, loaded, and found by their names."""
    path, cells = tmp_path / "model.safetensors", (*(cell for cell in CELLS if cell.own), EVERY_KIND)
    saved = {}
    for k, cell in enumerate(cells):
        spec = jaxrnn.Spec(cell, F, H, 2, bidirectional=True, bias=k % 2 == 0)
        saved |= {f"rnn{k}.{name}": value for name, value in parameters(spec).items()}
    checkpoint.save(path, saved)
    loaded = checkpoint.load(path)
    found = checkpoint.find_rnns(loaded, cells=[EVERY_KIND])
    assert [(rnn.prefix, rnn.spec) for rnn in found] == [
        (f"rnn{k}.", jaxrnn.Spec(cell, F, H, 2, bidirectional=True, bias=k % 2 == 0)) for k, cell in enumerate(cells)
    ]
    assert found[1].kind == "PeepholeLSTM"
    assert not found[1].in_torch
    assert check(found[1], loaded, None).finite
    module = jaxrnn.Recurrent(found[3].spec.cell, F, H, 2, bidirectional=True, bias=False, rngs=nnx.Rngs(0))
    assert jaxrnn.load_state_dict(module, loaded, prefix="rnn3.") == ([], [])
    assert_close(
        jaxrnn.state_dict(module), {name: loaded[f"rnn3.{name}"] for name in found[3].spec.shapes()}, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"params of their own, whose names tell them from torch's, got \['minGRU'\]"):
        checkpoint.find_rnns(loaded, cells=[jaxrnn.MIN_GRU_CELL])
    del loaded["rnn1.weight_co_l1"]
    others = [rnn.prefix for rnn in found if rnn.prefix != "rnn1."]
    for words in (r"rnn1.weight_co_l1 is missing", r"rnn1.weight_co_l1 is \(5,\), should be \(4,\)"):
        with pytest.warns(UserWarning, match=words):
            assert [rnn.prefix for rnn in checkpoint.find_rnns(loaded, cells=[EVERY_KIND])] == others
        loaded["rnn1.weight_co_l1"] = np.zeros(H + 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"params": {"weight_hh": ("hidden",)}}, "Python names other than .*, got 'weight_hh'"),
        ({"params": {"a.b": ("hidden",)}}, "Python names other than .*, got 'a.b'"),
        ({"params": {"u": ("hidden", "gates")}}, r"axes of 'u' .* got \('hidden', 'gates'\)"),
        ({"params": {"u": "hidden"}}, r"axes of 'u' .* got 'hidden'"),
        ({"recurrent": False, "apart": ("a",)}, r"should have apart=\(\) and projects=False"),
        ({"recurrent": False, "projects": True}, r"should have apart=\(\) and projects=False"),
    ],
)
def test_a_cell_checks_its_parameters(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jaxrnn.Cell("mine", ("a", "b"), ("h",), lambda *_: (), **fields)
