"""Find the dict of tensors in what a file of torch.save holds, and walk through all of it."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.formats.pickles import STATE_DICT

_DEEPEST = 100  # nested dicts and lists; a state dict has a handful
# The usual keys of a model's state dict beside an optimizer's.
_USUAL_KEYS = ("state_dict", "model_state_dict", "model_state", "model")


def choose(checkpoint: Any, key: str | None, is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """The dict of tensors under a key; without one, at the top or under the only usual key."""
    path = [] if key is None else key.split(".")
    for index, part in enumerate(path):
        _check_dict(checkpoint, path[:index], is_tensor)
        if part not in checkpoint:
            raise CheckpointError(f"{_at(path[:index])} has no {part!r}\nits keys: {listed(checkpoint)}")
        checkpoint = checkpoint[part]
    _check_dict(checkpoint, path, is_tensor)
    while key is None and not any(is_tensor(value) for value in checkpoint.values()):
        usual = [name for name in _USUAL_KEYS if isinstance(checkpoint.get(name), dict)]
        if len(usual) != 1 or len(path) == len(_USUAL_KEYS):  # a dict may contain itself
            break
        path.append(usual[0])
        checkpoint = checkpoint[usual[0]]
    nested = _dicts(checkpoint)
    if nested:
        first, value = [*path, str(nested[0])], checkpoint[nested[0]]
        while not any(is_tensor(item) for item in value.values()) and _dicts(value) and len(first) < 8:
            first.append(str(_dicts(value)[0]))
            value = value[_dicts(value)[0]]
        remedy = f"say which: key={'.'.join(first)!r}, on the command line --key"
        cause = f"no recurrent weights, or not alone: {_at(path)} has dicts nested under {listed(nested)}"
        raise CheckpointError(f"{cause}\n{remedy}")
    others = [
        f"{name} ({'Tensor' if is_tensor(value) else type(value).__name__})"
        for name, value in checkpoint.items()
        if not (isinstance(name, str) and is_tensor(value))
    ]
    if others:
        raise CheckpointError(f"some entries of {_at(path)} are not named tensors: {listed(others)}\n{STATE_DICT}")
    return checkpoint


def mapped(value: Any, function: Callable[[str, Any], Any]) -> Any:
    """Copy nested dicts, lists and tuples, with `function(name, leaf)` for each leaf; names are keys joined by dots.

    Shared objects are copied once, and are shared in the copy.
    """
    copies: dict[int, Any] = {}

    def copy(value: Any, path: tuple[str, ...]) -> Any:
        if len(path) > _DEEPEST:
            raise CheckpointError(f"more than {_DEEPEST} dicts and lists, one in the other\n{STATE_DICT}")
        if id(value) in copies:
            return copies[id(value)]
        if type(value) is dict or isinstance(value, OrderedDict):
            copies[id(value)] = {}
            copies[id(value)].update((key, copy(item, (*path, str(key)))) for key, item in value.items())
        elif type(value) is list:
            copies[id(value)] = []
            copies[id(value)].extend(copy(item, (*path, str(index))) for index, item in enumerate(value))
        elif type(value) is tuple:
            copies[id(value)] = tuple(copy(item, (*path, str(index))) for index, item in enumerate(value))
        else:
            copies[id(value)] = function(".".join(path), value)
        return copies[id(value)]

    return copy(value, ())


def _dicts(value: dict) -> list[Any]:
    return [name for name, item in value.items() if isinstance(item, dict)]


def _check_dict(value: Any, path: list[str], is_tensor: Callable[[Any], bool]) -> None:
    if not isinstance(value, dict):
        what = "one tensor" if is_tensor(value) else f"of type {type(value).__name__}"
        raise CheckpointError(f"no recurrent weights: {_at(path)} is {what}, not a dict of tensors\n{STATE_DICT}")


def _at(path: list[str]) -> str:
    return f"its {'.'.join(path)!r}" if path else "it"


def check_expanded(name: str, shape: tuple[int, ...], size: int, stored: int) -> None:
    if size > stored:
        cause = f"{name} of shape {shape} is larger than what is stored of it"
        raise CheckpointError(f"{cause}\nsave a copy that is not expanded: tensor.clone()")
