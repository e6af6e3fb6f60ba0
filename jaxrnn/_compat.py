"""All uses of what JAX, Flax and orbax do not promise: one function each, with the reason.

These libraries promise what their API references document. JAX promises nothing in `jax.core`, `jax.extend`,
`jax.interpreters` and `jax.experimental`. When a release breaks something here, mend this file.
"""

import functools
import inspect
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
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


def time_major(array: jax.Array) -> jax.Array:
    """The same array, (time, ...), which on a TPU is laid out in memory with the time outermost.

    `jax.experimental.layout` constrains layouts, but `jax.export` refuses programs that do: in them, nothing is done.
    """
    return _time_major.bind(array)


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


class Where(NamedTuple):
    """How a program will run, as far as that is known when a function of it is traced; see `by_platform`.

    Attributes:
        mapped: whether `jax.vmap` maps it.
        times: how often it is mapped with the same weights.
        shared: whether several devices share its arrays, and XLA says how: not inside `jax.shard_map`.
    """

    mapped: bool = False
    times: int = 1
    shared: bool = False


class Kernel(NamedTuple):
    """What is computed on a platform in place of a function; see `by_platform`.

    Attributes:
        function: computes the same as the function; None for the function itself.
        transposed: `transposed(where, constants, cotangents)` computes the cotangents of `linear`, a pytree like it,
            from those of the result, a pytree like it with None where they are zero. None for what JAX makes of
            `function`.
        of_jax: whether JAX can map and transpose `function`. If not, its place is taken by the function itself.
    """

    function: Callable[[Where, Any, Any], Any] | None = None
    transposed: Callable[[Where, Any, Any], Any] | None = None
    of_jax: bool = False


def by_platform(
    function: Callable[[Where, Any, Any], Any],
    kernels: Mapping[str | None, Kernel],
    constants: Any,
    linear: Any = (),
    weights: int = 0,
) -> Any:
    """Compute `function(where, constants, linear)`, or a kernel where the program is lowered for its platform.

    `jax.lax.platform_dependent` traces and differentiates every platform's function on all of them. JAX's custom
    derivatives are for forward mode, or for reverse mode alone, and what can be transposed by hand,
    `jax.custom_derivatives.linear_call`, can be neither mapped nor differentiated again. Here, a kernel is traced where
    it is lowered, and whatever it cannot do is what JAX makes of `function`.

    Functions are told how they will run. So `function` is traced again where that turns out to be another way: when it
    is mapped, and when it is lowered for several devices.

    Args:
        function: a function of two pytrees of arrays, linear in the second.
        kernels: by platform, as JAX calls it; None for all that are not named.
        constants, linear: the arguments.
        weights: how many arrays of `constants`, from the first, are weights. Where `jax.vmap` maps one of them, rows
            do not share weights.
    """
    tree: Any
    shape: Any
    arguments, tree = jax.tree.flatten((constants, linear))
    found: list[Any] = []

    def plain(where: Where, *flat: Any) -> list[Any]:
        results, structure = jax.tree.flatten(function(where, *tree.unflatten(flat)))
        found[:] = [structure]
        return results

    def flat(function: Callable[[Where, Any, Any], Any]) -> FlatFunction:
        return lambda where, *arguments: jax.tree.leaves(function(where, *tree.unflatten(arguments)))

    def flat_transposed(function: Callable[[Where, Any, Any], Any]) -> FlatFunction:
        def transposed(where: Where, *arguments: Any) -> list[Any]:
            (shape,) = found
            constants, _ = tree.unflatten([*arguments[: -shape.num_leaves], *[None] * count])
            return jax.tree.leaves(function(where, constants, shape.unflatten(arguments[-shape.num_leaves :])))

        return transposed

    count = len(jax.tree.leaves(linear))
    flattened = {
        platform: Kernel(
            each.function and flat(each.function), each.transposed and flat_transposed(each.transposed), each.of_jax
        )
        for platform, each in kernels.items()
    }
    results = _bound(plain, flattened, arguments, count=count, weights=weights, where=Where())
    (shape,) = found
    return shape.unflatten(results)


FlatFunction = Callable[..., list[Any]]
Kernels = tuple[tuple[str | None, Kernel], ...]
_by_platform = Primitive("by_platform")
_by_platform.multiple_results = True


def _bound(
    function: FlatFunction,
    kernels: dict[str | None, Kernel],
    arguments: Sequence[Any],
    *,
    where: Where,
    **settings: int,
) -> list[Any]:
    def traced(function: FlatFunction) -> ClosedJaxpr:
        return jax.make_jaxpr(functools.partial(function, where))(*arguments)

    program = traced(function)
    if jax.sharding.get_abstract_mesh().manual_axes:  # whose names a collective cannot find when it is lowered
        function = _of(program)
        of_jax: dict[Any, Any] = {name: kernel for name, kernel in kernels.items() if kernel.function and kernel.of_jax}
        kernels = kernels | {name: each._replace(function=_of(traced(each.function))) for name, each in of_jax.items()}
    both = {"function": function, "kernels": tuple(kernels.items())}
    return _by_platform.bind(*arguments, program=program, where=where, **both, **settings)


def _of(program: ClosedJaxpr) -> FlatFunction:
    return lambda _, *arguments: jaxpr_as_fun(program)(*arguments)


def _plain(*arguments: Any, program: ClosedJaxpr, **_: Any) -> list[Any]:
    return jaxpr_as_fun(program)(*arguments)


def _derivative(primals: Any, tangents: Any, *, count: int, **settings: Any) -> tuple[Any, Any]:
    """The function is linear in the last `count` arguments; by the others, its derivative is JAX's."""
    first = len(primals) - count
    active = [k for k in range(first) if not isinstance(tangents[k], ad.Zero)]

    def of_active(*some: Any) -> list[Any]:
        given = dict(zip(active, some, strict=True))
        return _plain(*(given.get(k, primal) for k, primal in enumerate(primals)), **settings)

    if active:
        results, sums = jax.jvp(of_active, [primals[k] for k in active], [tangents[k] for k in active])
    else:
        results, sums = _by_platform.bind(*primals, count=count, **settings), None
    if not all(isinstance(tangent, ad.Zero) for tangent in tangents[first:]):
        pushed = map(ad.instantiate_zeros, tangents[first:])
        terms = _by_platform.bind(*primals[:first], *pushed, count=count, **settings)
        sums = [a + b for a, b in zip(sums, terms, strict=True)] if sums else terms
    return results, sums


def _transposition(
    cotangents: Any, *arguments: Any, function: FlatFunction, kernels: Kernels, count: int, **settings: Any
) -> list[Any]:
    first = len(arguments) - count
    wanted = [k for k in range(first, len(arguments)) if ad.is_undefined_primal(arguments[k])]
    given = [k for k, cotangent in enumerate(cotangents) if not isinstance(cotangent, ad.Zero)]

    def zeros(like: Any) -> jax.Array:
        return ad.instantiate_zeros(ad.Zero(like.aval if ad.is_undefined_primal(like) else jax.typeof(like)))

    def by_jax(function: FlatFunction) -> FlatFunction:
        def transposed(where: Where, *flat: Any) -> list[Any]:
            def forward(*active: Any) -> list[Any]:
                linear = dict(zip(wanted, active, strict=True))
                whole = [linear[k] if k in linear else zeros(arguments[k]) for k in range(first, len(arguments))]
                results = function(where, *flat[:first], *whole)
                return [results[k] for k in given]

            return list(jax.linear_transpose(forward, *(zeros(arguments[k]) for k in wanted))(list(flat[first:])))

        return transposed

    def by_hand(function: FlatFunction) -> FlatFunction:
        def transposed(where: Where, *flat: Any) -> list[Any]:
            active = dict(zip(given, flat[first:], strict=True))
            results = function(where, *flat[:first], *(active.get(k) for k in range(len(cotangents))))
            return [results[k - first] for k in wanted]

        return transposed

    others = {}
    for platform, kernel in kernels:
        if kernel.transposed:
            others[platform] = Kernel(by_hand(kernel.transposed))
        elif kernel.function and kernel.of_jax:
            others[platform] = Kernel(by_jax(kernel.function), of_jax=True)
    flat = [*arguments[:first], *(cotangents[k] for k in given)]
    found = _bound(by_jax(function), others, flat, count=len(given), **_without_program(settings))
    by_place = dict(zip(wanted, found, strict=True))
    return [by_place.get(k) for k in range(len(arguments))]


def _without_program(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "program"}


def _mapped_function(
    axis: Any,
    arguments: Any,
    axes: Any,
    *,
    function: FlatFunction,
    kernels: Kernels,
    where: Where,
    weights: int,
    **settings: Any,
) -> tuple[list[Any], list[Any]]:
    if all(each is None for each in axes):
        rest = {"function": function, "kernels": kernels, "where": where, "weights": weights}
        results = _by_platform.bind(*arguments, **rest, **settings)
        return results, [None] * len(results)

    def mapped(function: FlatFunction) -> FlatFunction:
        names = {"axis_name": axis.name, "axis_size": axis.size, "spmd_axis_name": axis.spmd_name}

        def run(where: Where, *arguments: Any) -> list[Any]:
            return jax.vmap(functools.partial(function, where), in_axes=tuple(axes), **names)(*arguments)

        return run

    others = {
        platform: Kernel(mapped(kernel.function), of_jax=True)
        for platform, kernel in kernels
        if kernel.function and kernel.of_jax
    }
    same = all(each is None for each in axes[:weights]) and isinstance(axis.size, int)
    where = where._replace(mapped=True, times=where.times * axis.size if same else where.times)
    settings = _without_program(settings)
    results = _bound(mapped(function), others, arguments, where=where, weights=weights, **settings)
    return results, [0] * len(results)


def _lowered(platform: str | None, context: Any, *arguments: Any, where: Where, **settings: Any) -> Any:
    if _is_shared(context.module_context.axis_context):
        where = where._replace(shared=True)
    kernels = dict(settings["kernels"])
    function = kernels.get(platform, kernels.get(None, Kernel())).function
    if function is None:
        function = settings["function"] if where.shared else _of(settings["program"])
    return mlir.lower_fun(functools.partial(function, where), multiple_results=True)(context, *arguments)


def _is_shared(context: Any) -> bool:
    """Whether several devices share the arrays of a program, by its context: one of two kinds."""
    if hasattr(context, "num_devices"):
        return context.num_devices > 1
    manual = getattr(context, "manual_axes", ())
    return any(size > 1 for name, size in context.mesh.shape.items() if name not in manual)


_by_platform.def_impl(_plain)
_by_platform.def_abstract_eval(lambda *_, program, **settings: program.out_avals)
ad.primitive_jvps[_by_platform] = _derivative
ad.primitive_transposes[_by_platform] = _transposition
batching.fancy_primitive_batchers[_by_platform] = _mapped_function
mlir.register_lowering(_by_platform, functools.partial(_lowered, None))
for _name in ("cpu", "tpu", "cuda", "rocm"):
    mlir.register_lowering(_by_platform, functools.partial(_lowered, _name), platform=_name)


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
    So the layouts are fixed here; JAX fixes those of the cotangents with them.

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


def may_be_sorted(names: list[str]) -> bool:
    """Whether Flax may have sorted a node's attributes, so that their order of definition is lost.

    `vars` has them in the order of definition, which is torch's. When Flax rebuilds the node, as `nnx.merge` and
    `nnx.jit` do, it sorts them. That is not documented, and the node does not say whether it happened.
    """
    return names == sorted(names)


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
