"""Names of weights in checkpoints: fold weights that torch's utilities store in parts, and strip wrappers' prefixes."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxrnn.checkpoint.arrays import NO_NUMBERS, dtype_of, to_numpy
from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.named import Names, described_as, modules_of

_LEAVE_OUT = "leave one of them out"
# What torch.compile, FSDP and activation checkpointing put into names.
_WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = re.compile(r"(?<![^.])module\.")
_PARAMETRIZED = re.compile(r"(?P<path>|.*\.)parametrizations\.(?P<name>[^.]+)\.(?P<part>.+)", re.S)
_PARAMETRIZED_PARTS = {"original0": "g", "original1": "v", "original": "orig", "0._u": "u", "0._v": "v"}
_SUFFIXED = re.compile(r"(?P<target>(?:.*\.)?(?:weight|bias)[^.]*)_(?P<part>g|v|u|orig|mask|raw)", re.S)


def fold(tensors: Mapping[str, Any], raw: bool = False) -> dict[str, Any]:
    """Fold weights that torch's utilities store in parts into the weights that the model uses, with their usual names.

    Folds `weight_norm` (`weight_g` and `weight_v`, or `parametrizations.weight.original0` and `original1`),
    `spectral_norm` in evaluation mode (`weight_orig`, `_u` and `_v`, or their parametrized names) and pruning
    (`weight_orig` and `weight_mask`). Removes `_orig_mod.`,
    `_fsdp_wrapped_module.` and `_checkpoint_wrapped_module.`. Everything else stays, also parts whose
    shapes do not match.

    Args:
        tensors: from name to array of numpy, jax or torch.
        raw: whether to use `weight_hh_l0_raw`, as weight-dropped LSTMs store it, for `weight_hh_l0` or
            `module.weight_hh_l0`. If these are there as well, they hold what the last dropout left.

    Returns:
        A dict in the same order. Folded weights are NumPy arrays in the dtype of their parts, computed in float64.

    Raises:
        CheckpointError: two keys become the same name, or without `raw` there is a dropped weight beside the raw one.

    >>> import numpy as np
    >>> from jaxrnn import checkpoint
    >>> g, v = np.array([[10.0], [1.0]]), np.array([[3.0, 4.0], [0.0, 2.0]])
    >>> checkpoint.fold({"head.weight_g": g, "head.weight_v": v})
    {'head.weight': array([[6., 8.],
           [0., 1.]])}
    """
    renamed = Names[str](_LEAVE_OUT, "the keys ")
    for key in tensors:
        renamed.put(_WRAPPED.sub("", key) if isinstance(key, str) else key, key, key)
    modules = frozenset(_WRAPPED.sub("", f"{path}.")[:-1] for path in modules_of(tensors))
    folded: dict[str, tuple[str, Any]] = {}  # from the name of the first part to the folded weight
    gone: set[str] = set()
    for target, names in _parts(renamed, modules):
        recipe = _RECIPES.get(frozenset(names))
        if recipe is _raw:
            target = _dropped(target, names["raw"], renamed, raw)
            if not raw:
                continue
            gone.add(target)
        elif recipe is None or target in renamed:
            continue
        value = _fold_of(recipe, tensors, {part: renamed[name] for part, name in names.items()})
        if value is None:
            continue
        folded[next(iter(names.values()))] = (target, value)
        gone.update(names.values())
    plain = Names[Any](_LEAVE_OUT)
    for name, key in renamed.items():
        if name in folded:
            target, value = folded[name]
            if target not in plain or identity(plain[target]) != identity(value):
                plain.put(target, value, f"{key} with its other parts")
        elif name not in gone:
            plain.put(name, tensors[key], key)
    return described_as(plain, tensors, lambda prefix: _WRAPPED.sub("", prefix))


def _fold_of(
    recipe: Callable[..., np.ndarray], tensors: Mapping[str, Any], parts: Mapping[str, str]
) -> np.ndarray | None:
    """What a recipe makes of parts, given by their names; None if they do not fit together."""
    arrays = {part: to_numpy(name, tensors[name]) for part, name in parts.items()}
    try:
        value = recipe(**{part: array.astype(np.float64) for part, array in arrays.items()})
    except (ValueError, IndexError):
        return None
    return value.astype(arrays["orig"].dtype if "orig" in arrays else next(iter(arrays.values())).dtype)


def _dropped(target: str, name: str, names: Mapping[str, Any], raw: bool) -> str:
    """The weight for which a raw one stands. Weight drop has it in the same module, or in the one that it wraps."""
    path, _, leaf = target.rpartition(".")
    inside = f"{path}.module.".removeprefix(".")
    for dropped in (target, inside + leaf):
        if dropped in names:
            if not raw:
                cause = f"{name} is the trained weight, and {dropped} is that after the last dropout (weight drop)"
                remedy = (
                    "to use the trained one: jaxrnn.checkpoint.fold(tensors, raw=True), or --raw on the command line"
                )
                raise CheckpointError(f"{cause}\n{remedy}")
            return dropped
    return inside + leaf if any(other.startswith(inside) for other in names if isinstance(other, str)) else target


def misfits(tensors: Mapping[str, Any]) -> dict[str, str]:
    """For each weight that `fold` could not fold, by name: what is wrong with its parts."""
    found = {}
    for target, names in _parts(tensors, modules_of(tensors)):
        recipe = _RECIPES.get(frozenset(names))
        if recipe is None and (odd := [name for name in names.values() if "parametrizations." in name]):
            path, _, leaf = target.rpartition(".")
            call = f"torch.nn.utils.parametrize.remove_parametrizations({path or 'module'}, {leaf!r})"
            cause = f"a parametrization computes {target} from {listed(odd)}, and files do not say how"
            found[target] = f"{cause}: before saving, call {call}"
        elif recipe not in (None, _raw) and target not in tensors:
            shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in names.values())
            found[target] = f"the parts of {target} do not fit together: {shapes}"
            with np.errstate(all="ignore"):
                fits = _fold_of(recipe, tensors, names) is not None
            if fits:
                found[target] = f"two of torch's utilities are stacked on {target}, and a part is itself in parts"
        if "raw" in names and target not in tensors:
            hint = (
                f"{names['raw']} is there: use jaxrnn.checkpoint.fold(tensors, raw=True), or --raw on the command line"
            )
            found |= dict.fromkeys((target, _dropped(target, names["raw"], tensors, raw=False)), hint)
    return found


def _parts(names: Iterable[str], modules: Iterable[str] = ()) -> list[tuple[str, dict[str, str]]]:
    """Each weight that seems to be in parts, and from part to name.

    Args:
        names: of tensors.
        modules: the paths of torch's modules. A parametrization after the first is a part, too, also without tensors.
    """
    parts: dict[tuple[str, bool], dict[str, str]] = {}
    for name in filter(lambda name: isinstance(name, str), names):
        if match := _PARAMETRIZED.fullmatch(name):
            part = _PARAMETRIZED_PARTS.get(match["part"], match["part"])
            parts.setdefault((match["path"] + match["name"], True), {})[part] = name
        elif match := _SUFFIXED.fullmatch(name):
            parts.setdefault((match["target"], False), {})[match["part"]] = name
    for path in modules:
        match = _PARAMETRIZED.fullmatch(path)
        if match and match["part"] != "0" and (match["path"] + match["name"], True) in parts:
            parts[match["path"] + match["name"], True].setdefault(match["part"], path)
    return [(target, names) for (target, _), names in parts.items()]


def _raw(raw: np.ndarray) -> np.ndarray:
    return raw


def _weight_norm(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """torch.nn.utils.weight_norm: g has one norm for each index of one axis of v, or is one number."""
    if g.ndim not in (0, v.ndim) or any(n not in (1, size) for n, size in zip(g.shape, v.shape, strict=False)):
        raise ValueError
    axes = tuple(axis for axis in range(v.ndim) if g.ndim == 0 or g.shape[axis] == 1)
    return v * (g / np.sqrt(np.sum(v**2, axis=axes, keepdims=True)))


def _spectral_norm(orig: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """torch.nn.utils.spectral_norm in evaluation mode, along axis 0, or 1 of a transposed convolution.

    If both axes match u's length, take the one for which u is parallel to W v.
    """
    matrices = [np.moveaxis(orig, axis, 0).reshape(len(u), -1) for axis, n in enumerate(orig.shape[:2]) if n == len(u)]
    if not matrices:
        raise ValueError
    along = [u @ matrix @ v / (np.linalg.norm(matrix @ v) or 1) for matrix in matrices]
    return orig / (u @ matrices[int(np.argmax(along))] @ v)


def _pruned(orig: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if orig.shape != mask.shape:
        raise ValueError
    return orig * mask


_RECIPES: dict[frozenset[str], Callable[..., np.ndarray]] = {
    frozenset({"g", "v"}): _weight_norm,
    frozenset({"orig", "u", "v"}): _spectral_norm,
    frozenset({"orig", "mask"}): _pruned,
    frozenset({"raw"}): _raw,
}


def under(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors whose keys start with a prefix; it is removed, and so is DistributedDataParallel's `module.`.

    Keys with one prefix stay different without it.
    """
    keys = [key for key in tensors if isinstance(key, str)]
    if not any(key.startswith(prefix) for key in keys) and all(key.startswith("module.") for key in keys):
        prefix = f"module.{prefix}"
    found = {key.removeprefix(prefix): tensors[key] for key in keys if key.startswith(prefix)}
    if found and all(name.startswith(".") for name in found):
        raise CheckpointError(f"the prefix {prefix!r} should end in a dot\ngive {prefix + '.'!r}")
    return described_as(found, tensors, lambda path: path.removeprefix(prefix) if path.startswith(prefix) else None)


def as_in_module(named: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Rename what is named as in a checkpoint as a module has it, in the same order, as `load_state_dict` does it.

    Raises:
        CheckpointError: two of them would have one name.
    """
    plain = Names[Any](_LEAVE_OUT)
    for name, value in named.items():
        plain.put(_WRAPPED.sub("", name), value, name)
    return as_named(wanted, under(plain, prefix))


def unwrapped(name: str) -> str:
    """A name without DistributedDataParallel's `module.`."""
    return _PARALLEL.sub("", name)


def identity(value: Any) -> tuple[Any, ...]:
    """A key that is equal for two tensors exactly if they are equal."""
    dtype = dtype_of(value)
    if dtype == NO_NUMBERS:
        return (id(value),)
    return dtype, tuple(value.shape), hashlib.sha256(to_numpy("", value).tobytes()).digest()


def as_named(names: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Rename `values` to the wanted names, if they differ only by a wrapper or a layer's number.

    DistributedDataParallel's `module.` is removed, wherever it is. A cell takes the weights of one layer, and one layer
    those of a cell.

    Raises:
        CheckpointError: two keys with different numbers would have the same name.
    """
    bare = Names[str](_LEAVE_OUT)
    for key in values:
        name = unwrapped(key)
        if key in names or name not in names or name in values:
            continue
        if name not in bare or identity(values[bare[name]]) != identity(values[key]):
            bare.put(name, key, key)
    others = {key: name for name, key in bare.items()}
    values = {others.get(key, key): value for key, value in values.items()}
    others = {}
    for name in names:
        other = name.removesuffix("_l0") if name.endswith("_l0") else f"{name}_l0"
        if name not in values and other in values and other not in names:
            others[other] = name
    return {others.get(key, key): value for key, value in values.items()}
