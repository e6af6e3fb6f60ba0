"""What the compiler makes of it: no history in inference, one product for a weight's gradient, vector instructions."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from arrays import normal, parameters

import jaxrnn

pytestmark = pytest.mark.usefixtures("optimized")

CELLS = {"LSTM": (jaxrnn.LSTM_CELL, 4), "GRU": (jaxrnn.GRU_CELL, 3), "RNN": (jaxrnn.RNN_TANH, 1)}


def _made_in_loops(function: Callable, *arguments: Any) -> set[str]:
    """The shapes of the arrays that operations inside the loops of the compiled function make."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    bodies = set(re.findall(r"body=%([\w.\-]+)", text))
    assert bodies, "the compiled function has no loop"
    made, inside = set(), False
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) \(", line):
            inside = header[1] in bodies
        elif inside and (operation := re.match(r"\s+(?:ROOT )?%\S+ = \w+(\[[\d,]+\])\S* ([\w\-]+)\(", line)):
            shape, name = operation.groups()
            if name not in ("parameter", "get-tuple-element", "bitcast", "copy"):
                made.add(shape)
    return made


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_the_weight_gradient_is_no_sum_inside_the_loop(name: str) -> None:
    (cell, gates), hidden = CELLS[name], 24
    spec = jaxrnn.Spec(cell, 7, hidden)
    params, x = parameters(spec), normal(6, 5, 7)
    weight = {f"[{gates * hidden},{hidden}]", f"[{hidden},{gates * hidden}]"}

    def loss(params: Any, x: Any) -> jax.Array:
        return jnp.sum(jaxrnn.apply(spec, params, x)[0] ** 2)

    def plain_loss(params: Any, x: Any) -> jax.Array:
        def body(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, None]:
            z = x_t @ params["weight_ih_l0"].T + h @ params["weight_hh_l0"].T
            return jnp.tanh(z[:, :hidden]) + jnp.tanh(z[:, hidden : 2 * hidden]), None

        return jnp.sum(jax.lax.scan(body, jnp.zeros((5, hidden)), x)[0] ** 2)

    assert not _made_in_loops(jax.grad(loss), params, x) & weight
    # The check sees what it looks for: plain autodiff does add up the weight gradient in its loop.
    assert _made_in_loops(jax.grad(plain_loss), params, x) & weight


def test_inference_keeps_no_history_but_the_outputs() -> None:
    """Temporary memory, beside the input's part of the gates, which is made before the loop where it is small."""
    batch, features, hidden = 8, 4, 16
    spec = jaxrnn.Spec(jaxrnn.LSTM_CELL, features, hidden)
    params = parameters(spec)

    def memory(function: Callable, steps: int) -> int:
        x = jax.ShapeDtypeStruct((steps, batch, features), jnp.float64)
        return jax.jit(function).lower(x).compile().memory_analysis().temp_size_in_bytes

    def run(x: Any) -> Any:
        return jaxrnn.apply(spec, params, x)

    def growth(function: Callable) -> float:
        """How many arrays (batch, hidden) of float64 it keeps for each step."""
        return (memory(function, 600) - memory(function, 100)) / 500 / (8 * batch * hidden)

    assert growth(run) < 4 + 1.5  # four gates, and the outputs before they are returned
    assert growth(jax.grad(lambda x: run(x)[0].sum())) > 10  # what training keeps is seen


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what a CPU runs")
@pytest.mark.parametrize("name", CELLS)
def test_gates_are_computed_several_numbers_at_a_time(name: str, tmp_path: Path) -> None:
    spec = jaxrnn.Spec(CELLS[name][0], 16, 128)
    params, x = parameters(spec, "float32"), normal(50, 4, 16).astype("float32")

    def run(params: Any, x: Any) -> jax.Array:
        return jnp.sum(jaxrnn.apply(spec, params, x)[0] ** 2)

    for what, function in (("inference", run), ("training", jax.grad(run, (0, 1)))):
        lowered = jax.jit(function).lower(params, x)
        # Without this JAX 0.12 writes no instructions; a pattern that also matches MLIR passes crashes now and then.
        lowered.compile(compiler_options={"xla_dump_to": str(tmp_path / what), "xla_dump_emitter_re": "llvm"})
        gates = 0
        for kernel in (tmp_path / what).glob("*.ir-with-opt.ll"):
            operations = re.findall(r"= f(?:add|sub|mul|div) (?:[a-z]+ )*(<\d+ x )?float", kernel.read_text())
            several = sum(kind not in ("", "<1 x ") for kind in operations)
            if len(operations) > 40:  # with a tanh or a logistic; the same one by one is for arrays that overlap
                gates += 1
                assert several >= len(operations) / 2, (kernel.name, several, len(operations))
        assert gates, f"{what} has no kernel that computes gates"
