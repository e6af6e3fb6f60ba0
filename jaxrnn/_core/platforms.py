"""Functions that have a kernel for some platforms, and that are told how they will run.

`by_platform` is a primitive of JAX with its rules. So this file, like `jaxrnn._compat`, uses names that JAX does not
promise to keep.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from jaxrnn._compat import is_plain


class Where(NamedTuple):
    """How a program will run, as far as tracing can tell; see `by_platform`.

    Attributes:
        mapped: whether `jax.vmap` maps it.
        times: how often it is mapped with the same weights.
        shared: whether XLA shards its arrays over several devices; False inside `jax.shard_map`.
    """

    mapped: bool = False
    times: int = 1
    shared: bool = False


class Kernel(NamedTuple):
    """Computed on a platform in place of a function; see `by_platform`.

    Attributes:
        function: computes the same as the function; None for the function itself.
        transposed: `transposed(where, constants, cotangents)` returns the cotangents of `linear`, a pytree like it. Its
            argument `cotangents` is a pytree like the result, with None for zeros. None for JAX's transpose of
            `function`.
        of_jax: whether JAX can map and transpose `function`. If not, JAX maps and transposes the function that it
            replaces.
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
    """Compute `function(where, constants, linear)`, or on a platform that has a kernel, the kernel.

    `jax.lax.platform_dependent` would trace and differentiate the functions of all platforms on each of them. A custom
    derivative of JAX is for forward mode, or for reverse mode alone; and a transpose by hand, as in
    `jax.custom_derivatives.linear_call`, can be neither mapped nor differentiated again. Here, a kernel is traced only
    when it is lowered, and JAX maps and differentiates `function` wherever a kernel cannot.

    `where` tells functions how they will run, so `function` is traced again when it is mapped, and when it is lowered
    for several devices.

    Args:
        function: a function of two pytrees of arrays, linear in the second.
        kernels: by JAX's name of the platform; None stands for the platforms without a name here.
        constants, linear: the arguments.
        weights: how many arrays of `constants`, from the first, are weights. Where `jax.vmap` maps one of them, rows
            do not share weights.
    """
    if is_plain.value:
        return function(Where(), constants, linear)
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
