"""What a type checker tells users of what they get."""

import typing
from pathlib import Path

import jax
import pytest

import jaxrnn

SNIPPET = """
from typing import assert_type

import jax
import jax.numpy as jnp
from flax import nnx

import jaxrnn

Pair = tuple[jax.Array, jax.Array]
x, rngs = jnp.ones((5, 3, 2)), nnx.Rngs(0)
for gru in (jaxrnn.GRU(2, 3, rngs=rngs), jaxrnn.linen.GRU(2, 3)):
    assert_type(gru(x)[1], jax.Array)
for lstm in (jaxrnn.LSTM(2, 3, rngs=rngs), jaxrnn.linen.LSTM(2, 3)):
    assert_type(lstm(x)[1], Pair)
    output, state = lstm(x)
    output, (h_n, c_n) = lstm(x, state)
assert_type(jaxrnn.RNNCell(2, 3, rngs=rngs)(x[0]), jax.Array)
assert_type(jaxrnn.LSTMCell(2, 3, rngs=rngs)(x[0]), Pair)
spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 2, 3)
output, h_n = jaxrnn.apply(spec, spec.init(jax.random.key(0)), x)
h_n.at[0].set(0)
"""


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("cell", [False, True])
def test_the_annotations_tell_one_array_or_two(kind: str, cell: bool) -> None:
    """What mypy reads, below."""
    state = tuple[jax.Array, jax.Array] if kind == "LSTM" else jax.Array
    for api in (jaxrnn, jaxrnn.linen):
        base = getattr(api, kind + "Cell" * cell).__orig_bases__[0]
        assert typing.get_args(base) == (state,)
        returned = typing.get_type_hints(typing.get_origin(base).__call__)["return"]
        assert (returned if cell else typing.get_args(returned)[1]) == typing.get_origin(base).__parameters__[0]


@pytest.mark.slow
def test_the_state_is_one_array_or_two(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    path = tmp_path / "snippet.py"
    path.write_text(SNIPPET)
    found, errors, status = api.run([str(path), "--check-untyped-defs"])
    assert (errors, status) == ("", 0), found
