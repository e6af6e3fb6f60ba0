"""Engines: the table, which one is chosen, and an engine with a backward pass of its own."""

import ast
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close
from flax import nnx
from jax import lax

import jaxrnn
from jaxrnn import engines
from jaxrnn._compat import time_major
from jaxrnn._core import steps
from jaxrnn.engines import scan
from jaxrnn.engines.scan import Scan

F, H, T, N = 7, 5, 4, 2  # sizes of no other test, whose programs would be found compiled


class Handwritten(Scan):
    """Runs a tanh RNN alone. Its backward pass is written by hand, as a kernel's is."""

    def refuses(self, run: steps.Run) -> str | None:
        plain = run.settings.cell.name == "RNN_TANH" and run.marks == steps.Marks() and not run.settings.reverse
        return None if plain else "it runs RNN_TANH in the order of time, without marks"

    keeps_sums = True

    def forms(self, run: steps.Run) -> Any:
        return {None: scan.Form()}

    def tangents(
        self, form: scan.Form, run: steps.Run, kept: steps.Kept, linear: scan.Linear
    ) -> tuple[steps.Steps, Any]:
        assert kept.sums is not None
        slope, weight = 1 - jnp.tanh(kept.sums.gates[0]) ** 2, run.recurrent.weight_hh
        assert weight is not None

        def shifted(a: jax.Array) -> jax.Array:
            return jnp.concatenate([jnp.zeros_like(a[:1]), a[:-1]])

        def solve(_: Any, b: jax.Array) -> jax.Array:
            def body(d_h: jax.Array, step: Any) -> Any:
                d_h = step[1] + step[0] * (d_h @ weight)
                return d_h, d_h

            return lax.scan(body, jnp.zeros_like(b[0]), (slope, b))[1]

        def backward(_: Any, d_outputs: jax.Array) -> jax.Array:
            CALLED.append("backward")

            def body(d_h: jax.Array, step: Any) -> Any:
                d_total = d_h + step[1]
                return (d_total * step[0]) @ weight.T, d_total

            return lax.scan(body, jnp.zeros_like(d_outputs[0]), (slope, d_outputs), reverse=True)[1]

        known = slope * linear.sums
        known = known.at[0].add(slope[0] * (linear.state[0] @ weight))
        d_h = lax.custom_linear_solve(
            lambda d_h: d_h - slope * (shifted(d_h) @ weight), known, solve, transpose_solve=backward
        )
        return steps.Steps(d_h), (d_h[-1],)


CALLED: list[str] = []


@pytest.fixture(autouse=True)
def handwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.ENGINES, "handwritten", Handwritten())
    monkeypatch.setattr(engines, "AUTO", ["handwritten", "scan"])
    CALLED.clear()


def test_an_engines_own_backward_pass_serves_every_transform() -> None:
    spec = jaxrnn.Spec(jaxrnn.RNN_TANH, F, H, num_layers=2)
    arguments = parameters(spec), normal(T, N, F), normal(2, N, H)

    def transforms(engine: str) -> Any:
        def loss(*arguments: Any) -> jax.Array:
            output, h_n = jaxrnn.apply(spec, *arguments, engine=engine)
            return jnp.sum(jnp.sin(output)) + jnp.sum(h_n**2)

        gradient, every = jax.grad(loss, (0, 1, 2)), jax.tree.map(jnp.cos, arguments)

        def rows(x: jax.Array) -> Any:
            return gradient(arguments[0], x, arguments[2])

        return {
            "grad": gradient(*arguments),
            "jvp": jax.jvp(loss, arguments, every)[1],
            "jvp of grad": jax.jvp(gradient, arguments, every)[1],
            "grad of grad": jax.grad(lambda x: sum(jnp.sum(a**2) for a in jax.tree.leaves(rows(x))))(arguments[1]),
            "vmap of grad": jax.vmap(rows)(jnp.stack([arguments[1], -arguments[1]])),
        }

    found = jax.jit(lambda: transforms("handwritten"))()
    assert CALLED
    assert_close(found, jax.jit(lambda: transforms("scan"))())


def test_auto_takes_the_first_engine_that_does_not_refuse() -> None:
    spec = jaxrnn.Spec(jaxrnn.RNN_TANH, F, H)

    def gradient(spec: jaxrnn.Spec, **marks: Any) -> Any:
        return jax.grad(lambda p: jnp.sum(jaxrnn.apply(spec, p, normal(T, N, F), **marks)[0]))(parameters(spec))

    gradient(spec)
    assert CALLED
    CALLED.clear()
    gradient(spec, lengths=[2, 3])
    gradient(jaxrnn.Spec(jaxrnn.LSTM_CELL, F, H))
    assert not CALLED


def test_an_engine_says_why_it_refuses() -> None:
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H)
    with pytest.raises(ValueError, match=r"'handwritten' cannot run this: it runs RNN_TANH") as raised:
        jaxrnn.apply(spec, parameters(spec), normal(T, N, F), engine="handwritten")
    remedy = re.search(r"Use engine=(\(.*?\)), which runs it by scan, or engine='auto'", str(raised.value))
    assert remedy
    assert ast.literal_eval(remedy[1]) == ("handwritten", "scan")


def test_engines_are_tried_in_the_order_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.ENGINES, "never", Never())
    jax.clear_caches()

    def ran(cell: jaxrnn.Cell, *engine: str) -> bool:
        CALLED.clear()
        spec = jaxrnn.Spec(cell, F, H)
        jax.grad(lambda p: jnp.sum(jaxrnn.apply(spec, p, normal(T, N, F), engine=engine)[0]))(parameters(spec))
        return bool(CALLED)

    assert ran(jaxrnn.RNN_TANH, "never", "handwritten", "scan")
    assert not ran(jaxrnn.RNN_TANH, "scan", "handwritten")
    assert not ran(jaxrnn.GRU_CELL, "never", "handwritten", "scan")
    with pytest.raises(ValueError, match="cannot run this: never: it never runs; handwritten: it runs RNN_TANH"):
        ran(jaxrnn.GRU_CELL, "never", "handwritten")


class Never(Scan):
    def refuses(self, run: steps.Run) -> str | None:
        return "it never runs"


@pytest.mark.parametrize("engine", ["fast", ("scan", "fast"), (), None], ids=str)
def test_an_unknown_engine_is_an_error_where_it_is_given(engine: Any) -> None:
    wanted = f"'auto', one of {list(engines.ENGINES)}, or a tuple of these in the order in which to try them"
    message = re.escape(f"engine should be {wanted}, got {engine!r}")
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H)
    with pytest.raises(ValueError, match=message):
        jaxrnn.GRU(F, H, engine=engine, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        jaxrnn.linen.GRU(F, H, engine=engine)
    with pytest.raises(ValueError, match=message):
        jaxrnn.apply(spec, parameters(spec), normal(T, N, F), engine=engine)


FORMS = {"GPU": scan._GPU, "narrow on a TPU": scan._NARROW}
MARKED: dict[str, tuple[jaxrnn.Cell, dict[str, Any], dict[str, Any]]] = {
    "GRU both ways, with lengths": (jaxrnn.GRU_CELL, {"bidirectional": True}, {"lengths": np.array([4, 2])}),
    "projected LSTM, gates recomputed": (jaxrnn.LSTM_CELL, {"proj_size": 3}, {"remat": "gates"}),
    "layer-normalised LSTM": (jaxrnn.LAYER_NORM_LSTM_CELL, {}, {}),
    "LSTM with resets, all sizes equal": (jaxrnn.LSTM_CELL, {}, {"reset": np.arange(T * T).reshape(T, T) == 5}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.thorough if "layer" in n else pytest.mark.slow) for n in MARKED]
)
def test_forms_for_other_platforms_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are on a GPU or a TPU, but on a CPU: values, gradients, their tangents, and mapped."""
    cell, settings, options = MARKED[name]
    batch, features, hidden = (T, T, T) if "equal" in name else (N, F, H + 1)
    spec = jaxrnn.Spec(cell, features, hidden, **settings)
    arguments = parameters(spec), normal(T, batch, features)

    def results() -> Any:
        def loss(*arguments: Any) -> jax.Array:
            output, state = jaxrnn.apply(spec, *arguments, engine="scan", **options)
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves((output, state)))

        gradient = jax.grad(loss, (0, 1))
        every = jax.tree.map(jnp.cos, arguments)
        found = loss(*arguments), jax.jvp(gradient, arguments, every)
        # As many in the mapped axis as steps.
        return found, jax.vmap(lambda x: gradient(arguments[0], x))(jnp.stack([arguments[1], every[1]] * (T // 2)))

    jax.clear_caches()
    expected = jax.jit(results)()
    for form in FORMS.values():
        chosen = []

        def one_form(self: Any, run: Any, form: Any = form, chosen: list = chosen) -> Any:
            chosen.append(form)
            return {None: form}

        monkeypatch.setattr(Scan, "forms", one_form)
        jax.clear_caches()
        assert_close(jax.jit(results)(), expected, atol=1e-13)
        assert chosen
    jax.clear_caches()


def test_a_time_major_array_is_the_same() -> None:
    """Under every transform, in whatever way it is mapped."""
    a, weight = normal(T, N, F), normal(F, H)

    def results(product: Any) -> Any:
        def loss(a: Any, weight: Any) -> jax.Array:
            return jnp.sum(jnp.sin(product(a, weight)))

        gradient = jax.grad(loss, (0, 1))
        rows = jnp.stack([a, a + 1])
        mapped = [jax.jit(jax.vmap(gradient, (axis, None)))(jnp.moveaxis(rows, 0, axis), weight) for axis in range(4)]
        return jax.jit(product)(a, weight), jax.jvp(gradient, (a, weight), (a + 1, weight)), mapped

    assert_close(results(lambda a, weight: time_major(a @ weight)), results(jnp.matmul), atol=1e-13)
