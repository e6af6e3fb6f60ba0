"""Run a case with one library. A side is a function of a case and a dtype; all give the same named arrays."""

import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxrnn
from parity.cases import Arrays, Case

Side = Callable[[Case, str], Arrays]


def _state(case: Case, arrays: dict[str, Any], suffix: str) -> Any:
    """A state as the modules take and return it: one array, for an LSTM two."""
    state = tuple(arrays[f"{name}_{suffix}"] for name in case.states)
    return state if len(state) > 1 else state[0]


def _named(case: Case, returned: Any) -> dict[str, Any]:
    """By name, what a module returned."""
    results = {}
    if case.steps is not None:
        results["output"], returned = returned
    state = returned if len(case.states) > 1 else (returned,)
    return results | {f"{name}_n": array for name, array in zip(case.states, state, strict=True)}


def run_torch(case: Case, dtype: str) -> Arrays:
    """The case with torch.nn, on the CPU, in torch's default way."""
    import torch

    torch.set_num_threads(1)  # the same sums in the same order, however many cores there are
    parameters, inputs, cotangents = (
        {name: torch.tensor(array, dtype=getattr(torch, dtype)) for name, array in arrays.items()}
        for arrays in case.arrays()
    )
    module = getattr(torch.nn, case.module)(**case.constructor, dtype=getattr(torch, dtype))
    module.load_state_dict(parameters)
    for tensor in inputs.values():
        tensor.requires_grad_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
        results = _named(case, module(inputs["input"], _state(case, inputs, "0") if case.hx else None))
    sources = inputs | dict(module.named_parameters())
    gradients = torch.autograd.grad(
        [results[name] for name in cotangents], list(sources.values()), list(cotangents.values())
    )
    named = results | {f"{name}.grad": gradient for name, gradient in zip(sources, gradients, strict=True)}
    return {name: tensor.detach().numpy() for name, tensor in named.items()}


# Modules that differ in their numbers only are equal here, and share a compilation. Old compilations are dropped: each
# takes memory maps, and Linux gives a process 65,530.
@functools.lru_cache(maxsize=16)
def _differentiate(call: Callable[..., Any], module: Hashable) -> Callable[..., Any]:
    @jax.jit
    def differentiate(parameters: Any, inputs: Any, cotangents: Any) -> Any:
        returned, pullback = jax.vjp(functools.partial(call, module), parameters, *inputs)
        return returned, pullback(cotangents)

    return differentiate


def _run_jax(
    case: Case, dtype: str, build: Callable[[Case, str, Arrays], tuple[Hashable, Any]], call: Callable[..., Any]
) -> Arrays:
    """What the JAX sides share. `build` gives the static and the differentiable part of a module that `call` calls."""
    parameters, inputs, cotangents = (
        {name: array.astype(dtype) for name, array in arrays.items()} for arrays in case.arrays()
    )
    hx = _state(case, inputs, "0") if case.hx else None
    state = _state(case, cotangents, "n")
    # TF32 and bfloat16 products on accelerators are a choice of speed, not what is compared here.
    with jax.default_matmul_precision("highest"):
        module, parameters = build(case, dtype, parameters)
        returned, (d_parameters, *d_inputs) = _differentiate(call, module)(
            parameters, (inputs["input"], hx), state if case.steps is None else (cotangents["output"], state)
        )
    named = _named(case, returned)
    named |= {f"{name}.grad": array for name, array in zip(inputs, jax.tree.leaves(d_inputs), strict=True)}
    named |= {f"{name}.grad": array for name, array in d_parameters.items()}
    return {name: np.asarray(array) for name, array in named.items()}


def _build_nnx(case: Case, dtype: str, parameters: Arrays) -> tuple[Hashable, Any]:
    module = getattr(jaxrnn, case.module)(**case.constructor, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    jaxrnn.load_state_dict(module, parameters)
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def _call_nnx(graphdef: Any, parameters: Any, x: jax.Array, hx: Any) -> Any:
    return nnx.merge(graphdef, nnx.State(parameters))(x, hx)


def run_jaxrnn(case: Case, dtype: str) -> Arrays:
    """The case with jaxrnn's flax.nnx module, differentiated under jit."""
    return _run_jax(case, dtype, _build_nnx, _call_nnx)


SIDES: dict[str, Side] = {"torch": run_torch, "jaxrnn": run_jaxrnn}
