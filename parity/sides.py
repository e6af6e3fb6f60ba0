"""Run a case with one library. A side is a function of a case and a dtype; all give the same named arrays."""

import functools
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxrnn
from jaxrnn._core.options import Options

from .cases import CHUNKS, Case, NamedArrays

Side = Callable[[Case, str], NamedArrays]


def given_state(case: Case, arrays: dict[str, Any], suffix: str) -> Any:
    """A state as the modules take and return it: one array, for an LSTM two."""
    state = tuple(arrays[f"{name}_{suffix}"] for name in case.states)
    return state if len(state) > 1 else state[0]


def _named(case: Case, returned: Any) -> dict[str, Any]:
    """The results of a module by name."""
    results = {}
    if case.steps is not None:
        results["output"], returned = returned
    state = returned if len(case.states) > 1 else (returned,)
    return results | {f"{name}_n": array for name, array in zip(case.states, state, strict=True)}


def run_torch(case: Case, dtype: str, device: str = "cpu") -> NamedArrays:
    """The case with torch.nn and torch's defaults, but without TF32 on a GPU."""
    import torch
    from torch.nn.utils import rnn

    torch.set_num_threads(1)  # the same sums in the same order, however many cores there are
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    kind: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "device": "cpu" if case.second else device,
    }  # cuDNN has none
    parameters, inputs, cotangents, *tangents = (
        {name: torch.tensor(array, **kind) for name, array in arrays.items()}
        for arrays in (*case.arrays(), *case.tangents())
    )
    module = getattr(torch.nn, case.module)(**case.constructor, **kind)
    module.load_state_dict(parameters)
    for tensor in inputs.values():
        tensor.requires_grad_()
    x, hx = inputs["input"], given_state(case, inputs, "0") if case.hx else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
        if case.lengths is None and case.mask is None:
            results = _named(case, module(x, hx))
        else:
            batch_first, pack, pad = module.batch_first, rnn.pack_padded_sequence, rnn.pad_packed_sequence
            valid, lengths, time = case.valid(), list(case.lengths or ()), int(batch_first)
            if valid is not None:  # the valid steps of each row come first
                order = np.argsort(~valid, axis=time, kind="stable")
                places = [torch.tensor(a, device=x.device)[..., None] for a in (order, np.argsort(order, axis=time))]
                x, lengths = torch.take_along_dim(x, places[0], time), valid.sum(axis=time).tolist()
            output, state = module(pack(x, lengths, batch_first, enforce_sorted=case.way == "sorted"), hx)
            output, _ = pad(output, batch_first, total_length=case.steps)
            if valid is not None:
                output = torch.take_along_dim(output, places[1], time)
            results = _named(case, (output, state))
    sources = inputs | dict(module.named_parameters())
    returned = [results[name] for name in cotangents]

    def gradient(of: Any, by: Any, cotangents: Any, **settings: bool) -> Any:
        return torch.autograd.grad(list(of), list(by), list(cotangents), **settings)

    gradients = gradient(returned, sources.values(), cotangents.values(), create_graph=case.second)
    named = results | {f"{name}.grad": array for name, array in zip(sources, gradients, strict=True)}
    if case.second:
        # Forward as the derivative, by the cotangents, of what is linear in them: torch has no forward mode for packs.
        directions = [(tangents[1] | tangents[0])[name] for name in sources]
        linear = [torch.zeros_like(tensor, requires_grad=True) for tensor in returned]
        pulled = gradient(returned, sources.values(), linear, create_graph=True)
        pairs = [
            ("jvp", cotangents, gradient(pulled, linear, directions)),
            ("hvp", sources, gradient(gradients, sources.values(), directions, materialize_grads=True)),
        ]
        named |= {f"{name}.{what}": t for what, names, arrays in pairs for name, t in zip(names, arrays, strict=True)}
    # NumPy has no bfloat16 of its own.
    return {name: (t if dtype.startswith("float") else t.double()).detach().cpu().numpy() for name, t in named.items()}


class Feed(NamedTuple):
    """The static part of how a case feeds its sequence to a JAX module."""

    way: str
    lengths: tuple[int, ...] | None
    batch_first: bool
    steps: int | None

    @classmethod
    def of(cls, case: Case) -> "Feed":
        static = case.lengths if case.way in ("packed", "sorted") else None
        return cls(case.way, static, case.arguments.get("batch_first", False), case.steps)

    def __call__(self, module: Callable, x: jax.Array, hx: Any, marks: Mapping[str, jax.Array]) -> Any:
        if self.way in ("whole", "lengths", "mask"):
            return module(x, hx, **marks)
        if self.way in ("chunked", "steps"):
            parts = jnp.split(x, np.cumsum(CHUNKS)[:-1]) if self.way == "chunked" else list(x)
            outputs = []
            for part in parts:
                output, hx = module(part, hx, **({"method": "step"} if self.way == "steps" else {}))
                outputs.append(output)
            return (jnp.stack if self.way == "steps" else jnp.concatenate)(outputs), hx
        assert self.lengths is not None
        packed = jaxrnn.pack_padded_sequence(x, self.lengths, self.batch_first, enforce_sorted=self.way == "sorted")
        output, state = module(packed, hx)
        return jaxrnn.pad_packed_sequence(output, self.batch_first, total_length=self.steps)[0], state


def precision() -> str:
    """The precision of products in the JAX sides: "highest", unless JAX's default was set.

    TF32 and bfloat16 products, which accelerators take by default, are a choice of speed, not what is compared here.
    """
    return Options().precision_in_effect or "highest"


# Modules that differ in their numbers only are equal here, and share a compilation. Old compilations are dropped: each
# takes memory maps, and Linux gives a process 65,530.
@functools.lru_cache(maxsize=16)
def _differentiate(call: Callable[..., Any], module: Hashable, feed: Feed) -> Callable[..., Any]:
    @jax.jit
    def differentiate(sources: Any, marks: Mapping[str, jax.Array], cotangents: Any, tangents: Any) -> Any:
        def run(parameters: Any, x: jax.Array, hx: Any) -> Any:
            return feed(functools.partial(call, module, parameters), x, hx, marks)

        def gradient(*sources: Any) -> Any:
            return jax.vjp(run, *sources)[1](cotangents)

        returned, pullback = jax.vjp(run, *sources)
        if tangents is None:
            return returned, pullback(cotangents), None, None
        # The second derivative in reverse both times, as torch has it.
        second = jax.vjp(gradient, *sources)[1](tangents)
        return returned, pullback(cotangents), jax.jvp(run, sources, tangents)[1], second

    return differentiate


def _run_jax(
    case: Case, dtype: str, build: Callable[[Case, str, NamedArrays], tuple[Hashable, Any]], call: Callable[..., Any]
) -> NamedArrays:
    """Run a JAX side. `build` returns the static and the differentiable part of a module, which `call` calls."""
    parameters, inputs, cotangents, d_parameters, d_inputs = (
        {name: array.astype(jnp.dtype(dtype)) for name, array in arrays.items()}
        for arrays in (*case.arrays(), *case.tangents())
    )
    state = given_state(case, cotangents, "n")

    def sources(parameters: Any, inputs: NamedArrays) -> tuple:
        return parameters, inputs["input"], given_state(case, inputs, "0") if case.hx else None

    with jax.default_matmul_precision(precision()):
        module, parameters = build(case, dtype, parameters)
        returned, first, forward, second = _differentiate(call, module, Feed.of(case))(
            sources(parameters, inputs),
            case.marks(),
            state if case.steps is None else (cotangents["output"], state),
            sources(d_parameters, d_inputs) if case.second else None,
        )
    named = _named(case, returned)
    if case.second:
        named |= {f"{name}.jvp": array for name, array in _named(case, forward).items()}
    for order, derivatives in (("grad", first), ("hvp", second)):
        if derivatives is not None:
            by_parameter, *by_input = derivatives
            arrays = dict(zip(inputs, jax.tree.leaves(by_input), strict=True)) | by_parameter
            named |= {f"{name}.{order}": array for name, array in arrays.items()}
    return {name: np.asarray(array) for name, array in named.items()}


def build_nnx(case: Case, dtype: str, parameters: NamedArrays, **settings: Any) -> tuple[Hashable, Any]:
    make = functools.partial(getattr(jaxrnn, case.module), **case.constructor, param_dtype=jnp.dtype(dtype), **settings)
    module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))  # random numbers would compile for each shape
    jaxrnn.load_state_dict(module, parameters)
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def call_nnx(graphdef: Any, parameters: Any, *arguments: Any, method: str = "__call__", **kwargs: Any) -> Any:
    return getattr(nnx.merge(graphdef, nnx.State(parameters)), method)(*arguments, **kwargs)


def run_jaxrnn(case: Case, dtype: str) -> NamedArrays:
    """The case with jaxrnn's flax.nnx module, differentiated under jit."""
    return _run_jax(case, dtype, build_nnx, call_nnx)


def build_linen(case: Case, dtype: str, parameters: NamedArrays) -> tuple[Hashable, Any]:
    return getattr(jaxrnn.linen, case.module)(**case.constructor, param_dtype=jnp.dtype(dtype)), parameters


def call_linen(module: Any, parameters: Any, *arguments: Any, **kwargs: Any) -> Any:
    return module.apply({"params": parameters}, *arguments, **kwargs)


def run_linen(case: Case, dtype: str) -> NamedArrays:
    """The case with jaxrnn's flax.linen module, differentiated under jit."""
    return _run_jax(case, dtype, build_linen, call_linen)


SIDES: dict[str, Side] = {"torch": run_torch, "jaxrnn": run_jaxrnn, "linen": run_linen}
