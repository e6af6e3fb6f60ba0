"""Build a recurrent module from a checkpoint, run it, and compare it with the original, or with torch's."""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import jaxrnn.nnx
from jaxrnn.checkpoint.arrays import to_numpy
from jaxrnn.checkpoint.find import FoundRNN
from jaxrnn.checkpoint.named import CannotRun, origins_of
from jaxrnn.checkpoint.nnx import load_state_dict

_STEPS, _BATCH = 7, 3
# Far above rounding, and far below the effect of any mistake: in float64, and for originals that have float32 alone.
LIMIT, LIMIT_32 = 1e-9, 1e-4


class Checked(NamedTuple):
    """The result of `check`.

    Attributes:
        finite: whether all results are finite.
        difference: max |ours - theirs| / max(1, max |theirs|); None if there is nothing to compare with.
        original: what it was compared with, such as "flax.linen.GRUCell".
        limit: up to which difference it is taken for equal.
    """

    finite: bool
    difference: float | None
    original: str = ""
    limit: float = LIMIT

    @property
    def equal(self) -> bool:
        """Whether no difference was found. NaN and infinities equal theirs."""
        return self.difference is None or self.difference <= self.limit


def installed_torch() -> ModuleType | None:
    """PyTorch, or None if it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def check(rnn: FoundRNN, tensors: Mapping[str, Any], torch: ModuleType | None, run_code: bool = False) -> Checked:
    """Build a module that `find_rnns` found, run it on random numbers in float64, and compare the results.

    They are compared with those of the original in its own library, if that is installed; otherwise with those of
    torch's module of the same weights, if torch is given and has one. An original that is code in the file runs only
    with `run_code`. Settings that are not in a state dict are those that `find_rnns` assumes.

    Raises:
        CheckpointError: its tensors cannot be read.
    """
    params = {
        name: to_numpy(rnn.prefix + name, tensors[rnn.prefix + name]).astype(np.float64) for name in rnn.spec.shapes()
    }
    random = np.random.default_rng(0)
    x = random.standard_normal((_BATCH, rnn.input_size) if rnn.is_cell else (_STEPS, _BATCH, rnn.input_size))
    arguments = rnn.arguments | ({} if rnn.is_cell else {"batch_first": False})
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as those of load_state_dict, which the caller repeats
        make = functools.partial(getattr(jaxrnn.nnx, rnn.class_name), **arguments, param_dtype=np.float64)
        module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))  # without random numbers, which would be compiled
        load_state_dict(module, params)
        module.eval()  # as the original below
        states = jax.tree.map(lambda shape: random.standard_normal(shape.shape), jax.eval_shape(module, x))
        hx = states if rnn.is_cell else states[1]
        ours = [np.asarray(array) for array in jax.tree.leaves(module(x, hx))]
        finite = all(np.isfinite(array).all() for array in ours)
        origin = origins_of(tensors).get(rnn.prefix)
        if origin is not None and (run_code or not origin.runs_code):
            dtype = np.float64 if origin.exact else np.float32
            with contextlib.suppress(ImportError, CannotRun):
                theirs = origin.run(x.astype(dtype), [each.astype(dtype) for each in jax.tree.leaves(hx)])
                return Checked(finite, _largest(ours, theirs), origin.title, LIMIT if origin.exact else LIMIT_32)
        if torch is None or not rnn.in_torch:
            return Checked(finite, None)
        layer = getattr(torch.nn, rnn.class_name)(**arguments, dtype=torch.float64).eval()
        layer.load_state_dict({key: torch.tensor(value) for key, value in params.items()}, strict=True)
        with torch.no_grad():
            results = layer(torch.tensor(x), jax.tree.map(torch.tensor, hx))
        theirs = [each.numpy() for each in jax.tree.leaves(results)]
        return Checked(finite, _largest(ours, theirs), f"torch.nn.{rnn.class_name}")


def _largest(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    return max(_difference(a, b) for a, b in zip(ours, theirs, strict=True))


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0, np.abs(ours - theirs))
    largest = np.max(np.abs(theirs), where=np.isfinite(theirs), initial=1)
    return float(np.max(np.where(np.isnan(distance), np.inf, distance), initial=0) / largest)
