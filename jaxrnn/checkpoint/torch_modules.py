"""Closed tables of torch's live recurrent modules: what of a class, its instances and hooks `from_torch` reads."""

import functools
import inspect
import operator
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrnn.checkpoint.arrays import dtype_of, is_lazy, is_torch_tensor, to_numpy
from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.names import fold, misfits
from jaxrnn.checkpoint.tables import USED, Finding, Row, Table, neutral, refused, warned
from jaxrnn.spec import level_outside

CLASSES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
_SPECTRAL = "torch.nn.utils.spectral_norm"
_PARAMETRIZATIONS = "torch.nn.utils.parametrizations"
_WEIGHTS = "to take the weights alone: {weights}"
_CLEAR = "change the gradients in optax instead, and remove the hooks: {place}{name}.clear()"

_IN_PLACE = refused(remedy="if torch's own is meant: del torch_module.__dict__[{name!r}]")


def _rows(names: str, row: Row) -> dict[str, Row]:
    return dict.fromkeys(names.split(), row)


_GRADIENTS = warned({}, remedy=_CLEAR)
_HOOKS = {
    "_forward_hooks": refused({}, remedy=_WEIGHTS),
    "_forward_pre_hooks": refused({}, remedy=_WEIGHTS),
    "_forward_hooks_with_kwargs": neutral("which of _forward_hooks get keywords"),
    "_forward_hooks_always_called": neutral("which of _forward_hooks run after an error, too"),
    "_forward_pre_hooks_with_kwargs": neutral("which of _forward_pre_hooks get keywords"),
    "_backward_hooks": _GRADIENTS,
    "_backward_pre_hooks": _GRADIENTS,
    "_is_full_backward_hook": neutral("of which kind _backward_hooks are"),
    "_state_dict_hooks": neutral("parameters are read one by one, without state_dict()"),
    "_state_dict_pre_hooks": neutral("parameters are read one by one, without state_dict()"),
    "_load_state_dict_pre_hooks": neutral("torch loads nothing"),
    "_load_state_dict_post_hooks": neutral("torch loads nothing"),
}
# What the instances have: vars(torch.nn.LSTM(2, 3)).
ATTRIBUTES = Table(
    "instances of torch.nn.RNN, LSTM, GRU and their cells",
    {
        **_rows(
            """input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size mode nonlinearity
            training _parameters _buffers _modules _flat_weights _flat_weights_names _flat_weight_refs""",
            USED,
        ),
        "_all_weights": neutral("the names of _flat_weights by layer, for all_weights"),
        "_compiled_call_impl": neutral("of torch_module.compile(): the same computation"),
        "_non_persistent_buffers_set": neutral("which buffers state_dict() leaves out: all are read"),
        **_HOOKS,
    },
)
# Hooks of all modules: the attributes of torch.nn.modules.module.
GLOBALS = Table(
    "torch.nn.modules.module",
    {
        "_global_forward_hooks": refused({}, remedy=_WEIGHTS),
        "_global_forward_pre_hooks": refused({}, remedy=_WEIGHTS),
        "_global_forward_hooks_always_called": neutral("which of them run after an error, too"),
        "_global_forward_hooks_with_kwargs": neutral("which of them get keywords"),
        "_global_backward_hooks": _GRADIENTS,
        "_global_backward_pre_hooks": _GRADIENTS,
        "_global_is_full_backward_hook": neutral("of which kind _global_backward_hooks are"),
        "_global_buffer_registration_hooks": neutral("what is registered is read"),
        "_global_module_registration_hooks": neutral("what is registered is read"),
        "_global_parameter_registration_hooks": neutral("what is registered is read"),
    },
)
# What a parameter has beside its numbers.
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
PARAMETERS = Table(
    "torch.nn.Parameter",
    {
        **dict.fromkeys(_PARAMETER_HOOKS, warned(None, {}, remedy=_CLEAR)),
        # By module: the names of those without, beside others that have it.
        "requires_grad": warned(
            (),
            remedy="freeze them, too, within this module: "
            "wrt=nnx.All(nnx.Param, lambda path, value: path[-1] not in {value})",
        ),
    },
)
# What the classes define, and a subclass may override.
METHODS = Table(
    "torch.nn.Module, its recurrent classes, and object",
    {
        **_rows(
            """__call__ _wrapped_call_impl _call_impl _slow_forward forward check_forward_args check_hidden_size
            check_input permute_hidden get_expected_cell_size get_expected_hidden_size _init_flat_weights
            _update_flat_weights _weights_have_changed _compiled_call_impl __getattr__ __getattribute__ __class__
            __dict__""",
            refused(remedy=_WEIGHTS),
        ),
        **_rows(
            "_get_backward_hooks _get_backward_pre_hooks _maybe_warn_non_full_backward_hook",
            neutral("they run where there are hooks, which are warned of"),
        ),
        "flatten_parameters": neutral("it moves the weights in memory"),
        **_rows(
            """__init__ __new__ __init_subclass__ __setattr__ __delattr__ __setstate__ _apply apply bfloat16 cpu cuda
            double float half ipu mtia to to_empty type xpu train eval requires_grad_ share_memory zero_grad
            reset_parameters compile call_super_init add_module register_buffer register_module register_parameter
            set_submodule load_state_dict _load_from_state_dict set_extra_state register_backward_hook
            register_forward_hook register_forward_pre_hook register_full_backward_hook
            register_full_backward_pre_hook _register_state_dict_hook _register_load_state_dict_pre_hook
            register_load_state_dict_pre_hook register_load_state_dict_post_hook register_state_dict_post_hook
            register_state_dict_pre_hook""",
            neutral("it ran before: what it has set is read"),
        ),
        **_rows(
            """state_dict _save_to_state_dict get_extra_state parameters named_parameters buffers named_buffers children
            named_children modules named_modules _named_members get_buffer get_parameter get_submodule all_weights
            _get_name extra_repr __repr__ __str__ __format__ __dir__ __doc__ __annotations__ __constants__ __eq__ __ge__
            __gt__ __hash__ __le__ __lt__ __ne__ __sizeof__ __weakref__ __getstate__ __reduce__ __reduce_ex__
            __subclasshook__ __module__ __jit_unused_properties__ _replicate_for_data_parallel T_destination _version
            dump_patches""",
            neutral("no call of the module uses it, nor does from_torch"),
        ),
    },
)
_COMPUTING = {name for name, row in METHODS.items() if row.use == "refused"}


def tensors_of(torch_module: Any) -> dict[str, Any]:
    """The parameters and buffers of a live module, by name, as they are: without hooks and methods."""
    own = vars(torch_module)
    found = {name: value for kind in ("_parameters", "_buffers") for name, value in own[kind].items()}
    for name, child in own["_modules"].items():
        found |= {f"{name}.{key}": value for key, value in (tensors_of(child) if child is not None else {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def check(torch_module: Any, cls: type, shapes: Mapping[str, tuple[int, ...]], call: str) -> None:
    """Refuse or warn of what makes a live module compute something else than its class in torch.nn.

    Args:
        torch_module: an instance of a class of torch.nn.
        cls: that class.
        shapes: its parameters' names, in torch's order, and shapes.
        call: the call that makes jaxrnn's module, for messages.

    Raises:
        CheckpointError: it computes something else, or this cannot be known.

    Warns:
        UserWarning: its gradients are not those of torch's class, or it has something that jaxrnn does not know.
    """
    owner = type(torch_module).__name__
    weights = f"ours = {call}; jaxrnn.load_state_dict(ours, torch_module.state_dict(){{}})"
    weights += "" if torch_module.training else "; ours.eval()"
    every, weights = weights.format(", strict=False"), weights.format("")
    for place, finding in _findings(torch_module, cls, shapes):
        remedy = finding.row.words.format(name=finding.name, place=place, value=finding.value, weights=weights)
        text = f"{owner}: {place}{finding}, which is not as in torch.nn.{cls.__name__}\n{remedy}"
        if finding.refused:
            raise CheckpointError(text)
        warnings.warn(text, stacklevel=level_outside())
    _check_parts(torch_module, owner)
    _check_names(torch_module, owner, shapes, every)
    _check_folded(torch_module, owner, shapes, weights)
    _warn_of_ties(torch_module, owner, shapes)
    if "_flat_weights" in vars(torch_module):  # not in a cell
        _check_flat(torch_module, owner, list(shapes))


def _findings(torch_module: Any, cls: type, shapes: Mapping[str, Any]) -> Iterator[tuple[str, Finding]]:
    """What is to be said of a class, an instance, its submodules and parameters, each with the place."""
    for finding in METHODS.findings(_patched(cls) | _overridden(type(torch_module), cls)):
        yield "torch_module.", finding
    own, fresh = vars(torch_module), vars(cls(1, 1, device="meta"))
    for name, value in _in_place(torch_module, shapes).items():
        yield "torch_module.", Finding(name, value, _IN_PLACE)
    # Attributes that torch does not have change nothing, because no method of torch's reads them.
    settings = {name: own[name] for name in own if name in ATTRIBUTES or (name in fresh and own[name] != fresh[name])}
    hooks = {key: hook for key, hook in own["_forward_pre_hooks"].items() if not _folds(hook)}
    for finding in ATTRIBUTES.findings(settings | {"_forward_pre_hooks": hooks}):
        yield "torch_module.", finding
    for path, child in _submodules(torch_module):
        for finding in ATTRIBUTES.findings({name: vars(child)[name] for name in _HOOKS if name in vars(child)}):
            yield f"torch_module.get_submodule({path!r}).", finding
    module = vars(sys.modules["torch.nn.modules.module"])
    for finding in GLOBALS.findings({name: module[name] for name in module if name.startswith("_global_")}):
        yield "torch.nn.modules.module.", finding
    parameters = {name: value for name, value in own["_parameters"].items() if value is not None}
    for name, parameter in parameters.items():
        for finding in PARAMETERS.findings({key: getattr(parameter, key) for key in _PARAMETER_HOOKS}):
            yield f"torch_module.{name}.", finding
    trained = tuple(name for name, parameter in parameters.items() if parameter.requires_grad)
    if trained:  # a module of which nothing is trained is there to be called
        frozen = tuple(name for name in parameters if name not in trained)
        for finding in PARAMETERS.findings({"requires_grad": frozen}):
            yield "parameters without ", finding


def _overridden(kind: type, cls: type) -> dict[str, Any]:
    """What a subclass has in place of what torch's class has."""
    found = {name for each in kind.__mro__ if each not in cls.__mro__ for name in vars(each) if hasattr(cls, name)}
    pairs = {name: [inspect.getattr_static(each, name) for each in (cls, kind)] for name in found}
    return {name: value for name, (theirs, value) in pairs.items() if value is not theirs}


def _patched(cls: type) -> dict[str, Any]:
    """What torch's classes have in place of their own functions that compute, which are of the class's file."""
    found = {}
    for each in cls.__mro__[:-1]:
        own = vars(sys.modules[each.__module__])
        for name, value in vars(each).items():
            if callable(value) and getattr(value, "__globals__", None) is not own and name in _COMPUTING:
                found[name] = value
    return found


def _in_place(torch_module: Any, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """What an instance has in place of methods that compute, and of parameters."""
    own = vars(torch_module)
    names = _COMPUTING - ATTRIBUTES.keys() | (shapes.keys() & own["_parameters"].keys())
    return {name: own[name] for name in own if name in names}


def _folds(hook: Any) -> bool:
    """Whether a hook is one that torch's utilities make for weights in parts, which `fold` puts together."""
    prune = sys.modules.get("torch.nn.utils.prune")
    if prune is not None and isinstance(hook, prune.BasePruningMethod):
        own = prune.BasePruningMethod
        return type(hook).__call__ is own.__call__ and type(hook).apply_mask is own.apply_mask
    return type(hook).__module__ in ("torch.nn.utils.weight_norm", _SPECTRAL)


def _submodules(torch_module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in vars(torch_module)["_modules"].items():
        if child is not None:
            yield prefix + name, child
            yield from _submodules(child, f"{prefix}{name}.")


def _check_parts(torch_module: Any, owner: str) -> None:
    """Refuse weights that are computed from parts otherwise than `fold` does it."""
    own = vars(torch_module)
    spectral = [
        (hook.name, torch_module) for hook in own["_forward_pre_hooks"].values() if type(hook).__module__ == _SPECTRAL
    ]
    for name, steps in dict(own["_modules"].get("parametrizations") or {}).items():
        kinds = [f"{type(step).__module__}.{type(step).__name__}" for step in steps]
        if kinds not in ([f"{_PARAMETRIZATIONS}._WeightNorm"], [f"{_PARAMETRIZATIONS}._SpectralNorm"]):
            remedy = f"torch.nn.utils.parametrize.remove_parametrizations(torch_module, {name!r})"
            cause = f"{owner}: {name} is computed by {' and '.join(kinds)}"
            raise CheckpointError(f"{cause}\nto keep what they compute now: {remedy}")
        if kinds == [f"{_PARAMETRIZATIONS}._SpectralNorm"]:
            spectral.append((name, steps[0]))
    if training := [name for name, module in spectral if module.training]:
        cause = f"spectral_norm changes {listed(training)} at every call in training mode"
        raise CheckpointError(f"{owner}: {cause}\ntake the weight of evaluation mode: torch_module.eval()")


def _check_names(torch_module: Any, owner: str, shapes: Mapping[str, Any], every: str) -> None:
    """Refuse what is beside a module's parameters, and parameters that are not there or have no numbers."""
    tensors = tensors_of(torch_module)
    for name, tensor in tensors.items():
        if tensor.is_meta or is_lazy(tensor):
            remedy = "load its weights first: torch_module.load_state_dict(tensors, assign=True)"
            raise CheckpointError(f"{owner}: {name} has no numbers yet\n{remedy}")
    folded = fold(tensors)
    for name in shapes:
        if name not in folded and is_torch_tensor(vars(torch_module).get(name)):
            cause = misfits(folded).get(name, f"{name} is no parameter: something outside the module computes it")
            remedy = f"give it the trained weight: torch_module.{name} = torch.nn.Parameter(weight)"
            raise CheckpointError(f"{owner}: {cause}\n{remedy}")
        if name not in folded:
            remedy = f"zeros, if it is none: torch_module.{name} = torch.nn.Parameter(torch.zeros{tuple(shapes[name])})"
            raise CheckpointError(f"{owner}: it has no {name}\n{remedy}")
    for name, shape in shapes.items():
        if tuple(folded[name].shape) != tuple(shape):
            sizes = [
                folded[next(key for key in shapes if role in key)].shape[-1] for role in ("weight_ih", "weight_hh")
            ]
            remedy = f"give its weights' sizes: torch_module.input_size, torch_module.hidden_size = {sizes}"
            cause = f"{name} is {tuple(folded[name].shape)}, should be {tuple(shape)} by its settings"
            raise CheckpointError(f"{owner}: {cause}\n{remedy}")
    if beside := [name for name in folded if name not in shapes]:
        remedy = f"to leave them out: {every}"
        raise CheckpointError(f"{owner}: it has {listed(beside)} beside the weights of its class\n{remedy}")


def _check_folded(torch_module: Any, owner: str, shapes: Mapping[str, Any], weights: str) -> None:
    """Refuse weights that torch computes from their parts to other numbers than `fold` does."""
    tensors = tensors_of(torch_module)
    folded = fold(tensors)
    for name, helper, compute in _computed(torch_module):
        if name in shapes and not (_fits(helper, name, tensors) and _same(compute(), folded[name])):
            cause = f"{name} is not what torch's utility makes of its parts: a method or setting of it was changed"
            raise CheckpointError(f"{owner}: {cause}\n{_WEIGHTS.format(weights=weights)}")


def _computed(torch_module: Any) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    """The weights in parts: each one's name, torch's helper, and a function that computes it as at a call."""
    own = vars(torch_module)
    for hook in filter(_folds, own["_forward_pre_hooks"].values()):
        if hasattr(hook, "apply_mask"):
            yield vars(hook)["_tensor_name"], hook, functools.partial(hook.apply_mask, torch_module)
        else:  # in evaluation mode, in which spectral_norm changes nothing
            more = {"do_power_iteration": False} if type(hook).__module__ == _SPECTRAL else {}
            yield hook.name, hook, functools.partial(hook.compute_weight, torch_module, **more)
    for name, steps in dict(own["_modules"].get("parametrizations") or {}).items():
        yield name, steps[0], functools.partial(getattr, torch_module, name)


def _fits(helper: Any, name: str, tensors: Mapping[str, Any]) -> bool:
    """Whether a weight_norm's axis is that of its norms. If not, torch reads and writes beyond their memory."""
    if type(helper).__name__ not in ("WeightNorm", "_WeightNorm"):
        return True
    old, new = (f"{name}_g", f"{name}_v"), [f"parametrizations.{name}.original{part}" for part in (0, 1)]
    g, v = (tensors[part] for part in (old if old[0] in tensors else new))
    one_number = helper.dim in (None, -1)
    norms = () if one_number else tuple(n if axis == helper.dim else 1 for axis, n in enumerate(v.shape))
    return tuple(g.shape) == norms


def _same(tensor: Any, folded: Any) -> bool:
    """Whether two weights are equal but for rounding, in the weight's dtype and in float64."""
    theirs, ours = to_numpy("a weight", tensor).astype(np.float64), np.asarray(folded, np.float64)
    close = float(jnp.finfo(dtype_of(tensor)).eps) ** 0.5 * np.max(np.abs(ours), initial=0)
    return theirs.shape == ours.shape and np.allclose(theirs, ours, rtol=0, atol=close, equal_nan=True)


def _warn_of_ties(torch_module: Any, owner: str, shapes: Mapping[str, Any]) -> None:
    """Warn of parameters that are one in torch."""
    names: dict[Any, list[str]] = {}
    for name, tensor in tensors_of(torch_module).items():
        if tensor.numel():
            names.setdefault((tensor.data_ptr(), tuple(tensor.shape)), []).append(name)
    for first, *others in names.values():
        if others:
            remedy = "to tie them, " + "; ".join(f"ours.{name} = ours.{first}" for name in others)
            if not {first, *others} <= shapes.keys():
                remedy = "it has whole weights in place of parts, so compare the training with torch's"
            cause = f"{owner}: {listed([first, *others])} are one parameter"
            warnings.warn(f"{cause}\nours train apart: {remedy}", stacklevel=level_outside())


def _check_flat(torch_module: Any, owner: str, names: list[str]) -> None:
    """Refuse layers whose list of weights, with which torch computes, is not that of their parameters."""
    own = vars(torch_module)
    listed_names, weights, seen = (own[name] for name in ("_flat_weights_names", "_flat_weights", "_flat_weight_refs"))
    current = [getattr(torch_module, name, None) for name in listed_names]
    # torch makes the list anew when a weight is not the one that it has seen.
    stale = any(ref is not None and ref() is not now for ref, now in zip(seen, current, strict=False))
    if listed_names != names or not (stale or all(map(operator.is_, weights, current))):
        remedy = f"torch_module._flat_weights_names = {names}; torch_module._init_flat_weights()"
        cause = "its _flat_weights, with which torch computes, are not its parameters"
        raise CheckpointError(f"{owner}: {cause}\nto use the parameters in torch, too: {remedy}")
