"""All uses of names that JAX, Flax and orbax do not promise to keep: one function each, with the reason.

These libraries promise what their API references document. JAX promises nothing in `jax.core`, `jax.extend`,
`jax.interpreters` and `jax.experimental`. When a release breaks something here, mend this file.
"""

import inspect
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Literal, Primitive
from jax.interpreters import ad, batching, mlir


def is_traced(value: object) -> bool:
    """Whether JAX is tracing the function that computes a value, so that the value is not known yet.

    JAX has no public way to ask; it only raises errors when the value is read.
    """
    return isinstance(value, jax.core.Tracer)


def manual_axes(value: jax.Array) -> frozenset[Any]:
    """The mesh axes over which a value varies inside `jax.shard_map`.

    `jax.typeof` is public, but the attribute of its result is not documented, and was renamed once.
    """
    return jax.typeof(value).manual_axis_type.varying


def varying_like(shape: tuple[int, ...], dtype: Any, array: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a result that inside `jax.shard_map` varies over the same mesh axes as an array.

    It is the attribute that `manual_axes` reads.
    """
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(array).manual_axis_type)


def described_devices(platform: str, topology_name: str, **settings: str) -> list[jax.Device]:
    """Devices to compile for, such as those of the TPU "v5e:2x2", which need not be there. Needs their compiler.

    Only `jax.experimental` describes absent devices.
    """
    from jax.experimental import topologies

    return topologies.get_topology_desc(topology_name, platform, **settings).devices


# Whether `jaxrnn.plain_jaxprs` is on. JAX's caches of traced and compiled programs have it in their keys. The function
# that makes it is in no API reference yet.
is_plain = jax.make_user_context(default_value=False)


def time_major(array: jax.Array) -> jax.Array:
    """The same array, (time, ...), which on a TPU is laid out in memory with the time outermost.

    `jax.experimental.layout` constrains layouts, but `jax.export` refuses programs that do: in them, nothing is done.
    """
    return array if is_plain.value else _time_major.bind(array)


_time_major = Primitive("time_major")
_time_major.def_impl(lambda array: array)
_time_major.def_abstract_eval(lambda array: array)
ad.deflinear2(_time_major, lambda cotangent, _: [_time_major.bind(cotangent)])
mlir.register_lowering(_time_major, lambda context, array: [array])


def _mapped(arrays: Any, axes: Any) -> tuple[jax.Array, int]:
    return _time_major.bind(jnp.moveaxis(arrays[0], axes[0], 1)), 1


def _laid_out(context: Any, array: Any) -> Any:
    if context.module_context.lowering_parameters.for_export:
        return [array]

    return mlir.lower_fun(_row_major, multiple_results=False)(context, array)


batching.primitive_batchers[_time_major] = _mapped
mlir.register_lowering(_time_major, _laid_out, platform="tpu")


def influences(function: Callable[..., Any], count: int, *arguments: Any) -> list[frozenset[int | str]]:
    """For each array of a function's result, which of the first `count` arrays of its arguments it depends on.

    The name of an operation among them says that the result may not be linear in these arrays, or not element by
    element in the same order; or that the operation has effects, or is a callback, and must run as often as is written.
    The derivative does not tell: that of `jnp.sign` is zero, and custom ones are what their authors like.

    Only a traced program tells, and JAX does not promise the form of programs, nor the names of operations.
    """
    program = jax.make_jaxpr(function)(*arguments).jaxpr
    kept = frozenset(_kept(program))
    found = _influences(program, [frozenset(range(k, min(k + 1, count))) for k in range(len(program.invars))])
    return [each | kept for each in found]


def _kept(program: Any) -> Iterator[str]:
    """The names of operations that have effects or are callbacks, also within other operations."""
    for each in program.eqns:
        if each.effects or each.primitive.name.endswith("callback"):
            yield each.primitive.name
        for value in jax.tree.leaves(list(each.params.values()), is_leaf=lambda a: hasattr(a, "eqns")):
            if hasattr(value, "eqns"):
                yield from _kept(value)


_CALLS = ("jit", "pjit", "closed_call", "checkpoint", "remat2")


def _influences(program: Any, given: Sequence[frozenset[int | str]]) -> list[frozenset[int | str]]:
    none: frozenset[int | str] = frozenset()
    known = dict(zip(program.invars, given, strict=True))

    def of(value: Any) -> frozenset[int | str]:
        return none if isinstance(value, Literal) else known.get(value, none)

    for each in program.eqns:
        name, inputs = each.primitive.name, [of(value) for value in each.invars]
        together = none.union(*inputs)
        if not together or not each.outvars:
            continue
        if name in _CALLS:
            called = each.params["jaxpr" if "jaxpr" in each.params else "call_jaxpr"]
            found = _influences(getattr(called, "jaxpr", called), inputs)
        else:
            linear = _is_linear(each, [bool(of_it) for of_it in inputs])
            found = [together if linear else together | {name}] * len(each.outvars)
        known.update(zip(each.outvars, found, strict=True))
    return [of(value) for value in program.outvars]


# Whether an operation is linear in the operands that are marked, element by element, if their sizes are the result's.
_LINEAR: dict[str, Callable[[Any, list[bool]], bool]] = {
    **dict.fromkeys(("add", "add_any", "sub", "neg", "copy", "pvary"), lambda each, marked: True),
    **dict.fromkeys(("broadcast_in_dim", "squeeze", "expand_dims"), lambda each, marked: True),
    "mul": lambda each, marked: sum(marked) == 1,
    "div": lambda each, marked: not marked[1],
    "select_n": lambda each, marked: not marked[0],
    "reshape": lambda each, marked: each.params["dimensions"] is None,
    "convert_element_type": lambda each, marked: _is_exact(each.invars[0].aval.dtype, each.params["new_dtype"]),
}


def _is_linear(each: Any, marked: list[bool]) -> bool:
    def size(value: Any) -> list[Any]:
        return [n for n in value.aval.shape if not (isinstance(n, int) and n == 1)]

    if any(size(value) != size(each.outvars[0]) for value, mark in zip(each.invars, marked, strict=True) if mark):
        return False
    return each.primitive.name in _LINEAR and _LINEAR[each.primitive.name](each, marked)


def _is_exact(old: Any, new: Any) -> bool:
    """Whether a floating dtype holds all numbers of another one, up to its range."""
    floating = jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.floating)
    return floating and jnp.finfo(new).nmant >= jnp.finfo(old).nmant


def pallas() -> tuple[Any, Any]:
    """JAX's language for kernels, and its part for TPUs: `pl` and `pltpu`. They are imported when they are used.

    All of it is in `jax.experimental`.
    """
    from jax.experimental import pallas
    from jax.experimental.pallas import tpu

    return pallas, tpu


def cudnn_lstm(
    x: jax.Array, h_0: jax.Array, c_0: jax.Array, weights: jax.Array, lengths: jax.Array, full_float32: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One LSTM layer by cuDNN, on a GPU: its outputs, h_n and c_n. Only `jax.experimental.rnn` calls cuDNN's RNNs.

    It does not tell XLA that cuDNN reads and writes row by row (JAX's issue 19177). Where an array beside the call is
    transposed, XLA would rather lay it out in another order than copy it, and results would be wrong without an error.
    So the layouts are fixed here, and JAX fixes the cotangents' layouts with them.

    Args:
        x: (batch, time, features), float32 like all others.
        h_0, c_0: (directions, batch, hidden_size).
        weights: flat: weight_ih and weight_hh of each direction, then bias_ih and bias_hh of each, as torch has them.
        lengths: of the rows, from 1, int32.
        full_float32: whether products must not be in TF32.
    """
    from jax.experimental import rnn

    directions, _, hidden_size = h_0.shape
    sizes = x.shape[-1], hidden_size, 1  # one layer
    # It takes no DEFAULT. HIGH allows TF32, as DEFAULT does for JAX's own products.
    precision = jax.lax.Precision.HIGHEST if full_float32 else jax.lax.Precision.HIGH
    arguments = weights, lengths, *sizes, 0.0, directions == 2, precision
    y, h_n, c_n = rnn.lstm(_row_major(x), _row_major(h_0), _row_major(c_0), *arguments)
    return _row_major(y), _row_major(h_n), _row_major(c_n)


def _row_major(array: jax.Array) -> jax.Array:
    return with_layout_constraint(array, Layout(major_to_minor=tuple(range(array.ndim))))


def sharded_at_creation() -> bool:
    """Whether `nnx.Param` shards a new parameter by itself, which users can turn off.

    `nnx.use_eager_sharding` and the function that reads it are in no API reference yet.
    """
    return nnx.using_eager_sharding()


def annotated_param(value: jax.Array, axes: tuple[Any, ...]) -> nnx.Param:
    """A parameter with the names of its axes as metadata. It is not sharded here.

    Flax would shard it, and raise an error if no mesh is set, where the names are meant for later. The argument that
    prevents this is in no API reference yet.
    """
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def is_rebuilt(node: nnx.Pytree) -> bool:
    """Whether Flax has made a node anew from its parts, as `nnx.merge`, `nnx.jit` and copies do.

    `vars` has a new node's attributes in the order of definition, which is torch's, after Flax's own. When Flax
    rebuilds the node, it sorts them all. That is not documented, and the node does not say whether it happened.
    """
    first = list(vars(nnx.Module()))
    return list(vars(node))[: len(first)] != first


def called_module(context: Any) -> linen.Module:
    """The module whose method is called, from the context that `linen.intercept_methods` passes to an interceptor.

    The context's class is not public, and Linen documents only its `orig_method`.
    """
    return context.module


def called_by_sequential(module: nnx.Module | linen.Module) -> bool:
    """Whether Flax's Sequential calls a module with the results of the module before, a tuple that it unpacks.

    Only the frames of the call tell: Sequential calls a module as a user does.
    """
    frame, called = inspect.currentframe(), module
    while frame is not None:
        caller: Any = frame.f_locals.get("self")
        if frame.f_code in _SEQUENTIAL:
            if (before := _layer_before(caller.layers, frame.f_locals)) is not None:
                return _module_in(before)
            called = caller  # the first layer gets what its Sequential got
        elif isinstance(caller, nnx.Module | linen.Module):
            if not _same(caller, called):
                return False
        elif not _passes_on(frame):
            return False
        frame = frame.f_back
    return False


def _passes_on(frame: types.FrameType) -> bool:
    """Whether a frame is of a library on the way to a module, or of a user's interceptor of Linen's calls."""
    if frame.f_globals.get("__name__", "").partition(".")[0] in ("jaxrnn", "flax", "jax", "contextlib"):
        return True
    return any(isinstance(value, linen.module.InterceptorContext) for value in frame.f_locals.values())


_SEQUENTIAL = (nnx.Sequential.__call__.__code__, inspect.unwrap(linen.Sequential.__call__).__code__)


def _layer_before(layers: Sequence[Any], names: Mapping[str, Any]) -> Any:
    """The layer before the one that a Sequential calls, by the variables of its frame; None if it is the first."""
    index = names.get("i", 0)  # of NNX's
    if "outputs" in names:  # of Linen's, which it has after the first
        index = next((i for i, layer in enumerate(layers) if i and layer is names.get("layer")), 0)
    return layers[index - 1] if index else None


def _module_in(layer: Any) -> bool:
    """Whether a layer of a Sequential is a module, or a module in `functools.partial` or `jit`; not a function."""
    for _ in range(9):
        if isinstance(layer, nnx.Module | linen.Module):
            return True
        layer = getattr(layer, "func", None) or getattr(layer, "__wrapped__", None)
    return False


def _same(one: Any, module: Any) -> bool:
    """Whether both are one module, or one is Linen's copy of it inside a transform."""
    linens = isinstance(one, linen.Module) and isinstance(module, linen.Module)
    return one is module or (linens and one.name is not None and one.name == module.name)


def is_orbax_tree(path: str) -> bool:
    """Whether a directory is an orbax checkpoint of one tree.

    For anything else orbax raises an error of any kind, so this looks for the file that describes the tree.
    """
    return os.path.isfile(os.path.join(path, "_METADATA"))
