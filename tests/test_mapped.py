"""Every argument mapped or not, under every transform, with and without jit: the same as a Python loop over the rows.

Some sizes are equal, for there an axis that is taken for another raises no error.
"""

import functools
import itertools
import random
from typing import Any

import jax
import numpy as np
import pytest
from arrays import normal, parameters
from comparing import assert_close
from covering import covering
from mapping import TABLE, Case, Row, Tree, draw

import jaxrnn


def _rows() -> list[Row]:
    chance = random.Random(0)
    return covering([draw(chance) for _ in range(600)], lambda row: row)


ROWS = _rows()
QUICK = covering(ROWS, lambda row: {name: row[name] for name in ("order", "jit")})


def _name(row: Row) -> str:
    return f"{row['transform']} {row['order']}, {row['jit']}, {row['cell']}"


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=_name(row), marks=() if row in QUICK else pytest.mark.slow) for row in ROWS],
)
def test_as_a_loop(row: Row) -> None:
    case = Case(row)
    assert_close(case.by_vmap(), case.by_loop())


def test_the_rows_have_every_pair_of_settings() -> None:
    """And arguments of every kind have values of every kind."""
    pairs = {pair for row in ROWS for pair in itertools.combinations(row.items(), 2)}
    whole = set()
    for (a, values), (b, others) in itertools.combinations(TABLE.items(), 2):
        whole |= {((a, value), (b, other)) for value in values for other in others}
    never = {pair for pair in whole - pairs if not _excluded(*pair)}
    assert not never


def _excluded(*pair: tuple[str, Any]) -> bool:
    settings = dict(pair)
    resets = any(settings.get(name, "absent") != "absent" for name in ("reset", "reset_state"))
    if settings.get("batched", False) and settings.get("dropout_key", "absent") != "absent":
        return True
    return resets and (settings.get("bidirectional", False) or settings.get("reset") == "absent")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "steps", "remat"),
    [(1, 4, 2), (6, 4, "gates"), (5, 5, "none")],
)
def test_ragged_rows_as_torch_packs_them(rows: int, steps: int, remat: Any, torch: Any) -> None:
    """Rows that are mapped with their lengths: their gradients are a loop's, and those of torch's packed rows."""
    spec = jaxrnn.Spec(jaxrnn.GRU_CELL, 2, 3)
    params, x, weights = parameters(spec), normal(rows, steps, 2), normal(rows, steps, 3)
    lengths = np.random.RandomState(0).randint(1, steps + 1, rows)

    def one(params: Tree, x: Any, n: Any) -> jax.Array:
        return jaxrnn.apply(spec, params, x, lengths=n, remat=remat)[0]

    def mapped(params: Tree) -> jax.Array:
        return (weights * jax.vmap(functools.partial(one, params))(x, lengths)).sum()

    def loop(params: Tree) -> jax.Array:
        return sum((weights[k] * one(params, x[k], lengths[k])).sum() for k in range(rows))

    gru = torch.nn.GRU(2, 3, batch_first=True).double()
    gru.load_state_dict({name: torch.tensor(value) for name, value in params.items()})
    pack = torch.nn.utils.rnn.pack_padded_sequence
    packed, _ = gru(pack(torch.tensor(x), lengths, batch_first=True, enforce_sorted=False))
    output, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=steps)
    (torch.tensor(weights) * output).sum().backward()
    expected = jax.jit(jax.grad(loop))(params)
    assert_close(expected, {name: value.grad.numpy() for name, value in gru.named_parameters()})
    assert_close(jax.grad(mapped)(params), expected)
    assert_close(jax.jit(jax.grad(mapped))(params), expected)
    pushed = [jax.jvp(function, (params,), (params,)) for function in (mapped, loop)]
    assert_close(*pushed)
