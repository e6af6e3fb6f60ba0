"""Build a recurrent module from a checkpoint, run it, and compare it with torch's."""

import functools
import importlib
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import jaxrnn.nnx
from jaxrnn.checkpoint.arrays import to_numpy
from jaxrnn.checkpoint.find import FoundRNN
from jaxrnn.checkpoint.nnx import load_state_dict

_STEPS, _BATCH = 7, 3
# Far above rounding in float64, and far below the effect of any mistake.
LIMIT = 1e-9


class Checked(NamedTuple):
    """The result of `check`.

    Attributes:
        finite: whether all results are finite.
        difference: max |ours - torch's| / max(1, max |torch's|); None without torch, or if torch has no such module.
    """

    finite: bool
    difference: float | None

    @property
    def equal(self) -> bool:
        """Whether no difference was found. NaN and infinities equal torch's."""
        return self.difference is None or self.difference <= LIMIT


def installed_torch() -> ModuleType | None:
    """PyTorch, or None if it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def check(rnn: FoundRNN, tensors: Mapping[str, Any], torch: ModuleType | None) -> Checked:
    """Build a module that `find_rnns` found, run it on random numbers in float64, and compare with torch if it has one.

    Settings that are not in a state dict are those that `find_rnns` assumes.

    Raises:
        CheckpointError: its tensors cannot be read.
    """
    params = {
        name: to_numpy(rnn.prefix + name, tensors[rnn.prefix + name]).astype(np.float64) for name in rnn.spec.shapes()
    }
    random = np.random.default_rng(0)
    x = random.standard_normal((_BATCH, rnn.input_size) if rnn.is_cell else (_STEPS, _BATCH, rnn.input_size))
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as those of load_state_dict, which the caller repeats
        make = functools.partial(getattr(jaxrnn.nnx, rnn.class_name), **rnn.arguments, param_dtype=np.float64)
        module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))  # without random numbers, which would be compiled
        load_state_dict(module, params)
        module.eval()  # as torch's below
        states = jax.tree.map(lambda shape: random.standard_normal(shape.shape), jax.eval_shape(module, x))
        hx = states if rnn.is_cell else states[1]
        ours = [np.asarray(array) for array in jax.tree.leaves(module(x, hx))]
        finite = all(np.isfinite(array).all() for array in ours)
        if torch is None or not rnn.in_torch:
            return Checked(finite, None)
        theirs = getattr(torch.nn, rnn.class_name)(**rnn.arguments, dtype=torch.float64).eval()
        theirs.load_state_dict({key: torch.tensor(value) for key, value in params.items()}, strict=True)
        with torch.no_grad():
            results = theirs(torch.tensor(x), jax.tree.map(torch.tensor, hx))
        pairs = zip(ours, jax.tree.leaves(results), strict=True)
        return Checked(finite, max(_difference(a, b.numpy()) for a, b in pairs))


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0, np.abs(ours - theirs))
    largest = np.max(np.abs(theirs), where=np.isfinite(theirs), initial=1)
    return float(np.max(np.where(np.isnan(distance), np.inf, distance), initial=0) / largest)
