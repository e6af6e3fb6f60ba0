"""Flax's recurrent modules in tests, of both APIs: made, filled with numbers, and compared with ours."""

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from arrays import normal
from comparing import assert_close
from flax import linen, nnx
from making import filled, filled_variables

import jaxrnn
from jaxrnn.checkpoint.dialects import DIALECTS

F, H, T, N = 5, 4, 2, 3
LENGTHS = jnp.array([1, 2, 2])
FLAX = {"flax.linen": linen, "flax.nnx": nnx}
Settings = dict[str, Any]


@dataclasses.dataclass
class Made:
    """A value of a setting that is made anew for each module."""

    make: Callable[[str, nnx.Rngs], Any]


def make_rnn(library: str, name: str, changed: Settings) -> Callable[[nnx.Rngs], Any]:
    """A function that makes an RNN or a Bidirectional, in which the class of a table has changed settings."""
    flax, is_cell = FLAX[library], (library, name) in DIALECTS

    def resolved(rngs: nnx.Rngs) -> Settings:
        return {key: value.make(library, rngs) if isinstance(value, Made) else value for key, value in changed.items()}

    def cell(rngs: nnx.Rngs) -> Any:
        kind = name if is_cell else "OptimizedLSTMCell" if name == "Linear" else "SimpleCell"
        made = make_cell(library, kind, rngs, resolved(rngs) if is_cell else {})
        if name == "Linear":
            settings = {"in_features": H, "out_features": 4 * H, "dtype": jnp.float64, "param_dtype": jnp.float64}
            made.dense_h = nnx.Linear(**{**settings, "rngs": rngs, **resolved(rngs)})
        return made

    def make(rngs: nnx.Rngs) -> Any:
        if name.startswith("RNN in"):
            return flax.Bidirectional(*(flax.RNN(**{"cell": cell(rngs), **resolved(rngs)}) for _ in range(2)))
        if name == "Bidirectional":
            members = {"forward_rnn": flax.RNN(cell(rngs)), "backward_rnn": flax.RNN(cell(rngs))}
            return flax.Bidirectional(**{**members, **resolved(rngs)})
        return flax.RNN(**{"cell": cell(rngs), **(resolved(rngs) if name == "RNN" else {})})

    return make


def make_cell(library: str, kind: str, rngs: nnx.Rngs, changed: Settings) -> Any:
    """A cell in float64. A change that an NNX cell does not read is an attribute, None for another layer."""
    settings = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    settings |= {"features": H} if library == "flax.linen" else {"in_features": F, "hidden_features": H, "rngs": rngs}
    kind = getattr(FLAX[library], kind)
    later = changed.keys() - inspect.signature(kind.__init__).parameters.keys()
    if library == "flax.nnx" and "param_dtype" not in changed:
        later |= changed.keys() & {"dtype", "promote_dtype"}
    made = kind(**settings | {key: value for key, value in changed.items() if key not in later})
    for key in later:
        if changed[key] is None:
            old = getattr(made, key)
            sizes = {"in_features": old.in_features, "out_features": old.out_features, "use_bias": not old.use_bias}
            changed[key] = nnx.Linear(**sizes, dtype=jnp.float64, param_dtype=jnp.float64, rngs=rngs)
        setattr(made, key, changed[key])
    return made


class Theirs:
    """A recurrent module of either API, with random numbers in it."""

    def __init__(self, library: str, make: Callable[[nnx.Rngs], Any], dtype: Any = jnp.float64) -> None:
        self.api = library
        self.module = filled(lambda: make(nnx.Rngs(0))) if library == "flax.nnx" else make(nnx.Rngs(0))
        cell = getattr(self.module, "forward_rnn", self.module).cell
        features = getattr(cell, "in_features", F)
        shape = (T, N, features) if self.module.time_major else (N, T, features)
        self.x = jnp.asarray(normal(*shape), dtype)
        self.variables = filled_variables(self.module, self.x) if library == "flax.linen" else None
        self.weights = self.variables or nnx.state(self.module)

    def __call__(self, x: Any, lengths: Any) -> Any:
        """The output where it is valid, and the carry as ours."""
        settings = {"seq_lengths": lengths, "return_carry": True}
        if self.api == "flax.linen":
            carry, output = jax.jit(lambda x: self.module.apply(self.variables, x, **settings))(x)
        else:
            carry, output = self.module(x, **settings, rngs=nnx.Rngs(0).carry)
        return self.valid(output, lengths), as_ours(carry, self.cells)

    @property
    def cells(self) -> list[Any]:
        if isinstance(self.module, FLAX[self.api].RNN):
            return [self.module.cell]
        return [self.module.forward_rnn.cell, self.module.backward_rnn.cell]

    def valid(self, output: Any, lengths: Any) -> Any:
        """The output, with zeros after a row's end."""
        keep = jnp.arange(T) < (jnp.full(N, T) if lengths is None else lengths)[:, None]
        return output * (keep.T if self.module.time_major else keep)[..., None]

    def ours(self) -> Callable[..., Any]:
        """Ours, as a function of x, hx and lengths."""
        made = jaxrnn.from_flax(self.module, self.variables)
        return (
            made if self.api == "flax.nnx" else jax.jit(lambda *args, **kwargs: made[0].apply(made[1], *args, **kwargs))
        )


def as_ours(carry: Any, cells: list[Any]) -> Any:
    """A carry as a state of ours: h first, and an axis for directions."""
    each = carry if len(cells) == 2 else (carry,)
    if isinstance(each[0], tuple):
        return jnp.stack([h for _, h in each]), jnp.stack([c for c, _ in each])
    return jnp.stack(each)


def assert_same(theirs: Theirs, ours: Callable[..., Any], atol: float = 1e-12) -> None:
    """Check that both give the same numbers. One row is shorter."""
    assert_close(ours(theirs.x, lengths=LENGTHS), theirs(theirs.x, LENGTHS), atol=atol)


def assert_equal_modules(one: Any, other: Any) -> None:
    """Check that two modules of ours, with variables or not, are the same."""
    if isinstance(one, nnx.Module):
        assert one.spec == other.spec
        assert_close(jaxrnn.state_dict(one), jaxrnn.state_dict(other), atol=0)
    else:
        assert one[0].spec == other[0].spec
        assert_close(one[1], other[1], atol=0)


FLIP = r"jaxrnn\.flip_sequences\([^)]*\)"


def expression(pattern: str, words: str, **names: Any) -> Any:
    """The value of an expression that a remedy has."""
    found = re.search(pattern, words)
    assert found, f"{words!r} should have {pattern}"
    return eval(found[0], {"jax": jax, "jaxrnn": jaxrnn, **names})


def quietly(make: Callable[..., Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()
