"""Find the dict of tensors in what a file of torch.save holds, and walk through all of it."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.formats.pickles import STATE_DICT
from jaxrnn.checkpoint.formats.reading import Reading

_DEEPEST = 100  # nested dicts and lists; a state dict has a handful
# The usual keys of a model's state dict beside an optimizer's.
_USUAL_KEYS = ("state_dict", "model_state_dict", "model_state", "model")


def under_key(tree: Any, key: str) -> tuple[Any, list[str]]:
    """What is under a key of nested dicts and lists, dotted if it is deeper, and the keys on the way."""
    path: list[str] = []
    while key:
        named = _named(tree)
        fits = [name for name in named if key == name or key.startswith(f"{name}.")]
        if not fits:
            raise CheckpointError(f"{_at(path)} has no key {key!r}\nits keys: {listed(named)}")
        name = max(fits, key=len)  # which may have dots in it
        path.append(name)
        tree, key = named[name], key[len(name) + 1 :]
    return tree, path


def _named(tree: Any) -> dict[str, Any]:
    """What a dict or a list holds, by its keys or numbers as text."""
    items = enumerate(tree) if isinstance(tree, list | tuple) else tree.items() if isinstance(tree, dict) else ()
    return {str(name): value for name, value in items}


def _note(whole: Any, path: list[str], tensors: dict[str, Any], note: Callable[[str], None]) -> None:
    """Say which dict was taken, and what is beside it and beside its tensors."""
    left_out: list[str] = []
    for depth, name in enumerate(path):
        named = _named(whole)
        left_out += [".".join([*path[:depth], other]) for other in named if other != name]
        whole = named[name]
    left_out += [".".join([*path, str(name)]) for name in whole if name not in tensors]
    if path or left_out:
        taken = f"took the tensors under {'.'.join(path)!r}" if path else "took the tensors"
        note(f"{taken}, and left out {listed(left_out)}" if left_out else taken)


def choose(checkpoint: Any, what: Reading, is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """The tensors of the dict under a key; without one, of the dict under the only usual key, or at the top."""
    key, whole, path = what.key, checkpoint, list[str]()
    if key is not None:
        checkpoint, path = under_key(checkpoint, key)
    _check_dict(checkpoint, path, is_tensor)
    while key is None and len(path) < len(_USUAL_KEYS):  # a dict may contain itself
        usual = [name for name in _USUAL_KEYS if isinstance(checkpoint.get(name), dict)]
        usual = [name for name in usual if _holds(checkpoint[name], is_tensor)]
        if len(usual) != 1:
            break
        path.append(usual[0])
        checkpoint = checkpoint[usual[0]]
    tensors = {name: value for name, value in checkpoint.items() if is_tensor(value)}
    nested = _nested(checkpoint, is_tensor)
    if "param_groups" in checkpoint and not tensors:
        remedy = "read it with jaxrnn.checkpoint.load_tree, and give it to jaxrnn.checkpoint.optimizer_from_torch"
        raise CheckpointError(f"no recurrent weights: {_at(path)} is the state of an optimizer\n{remedy}")
    if nested:
        first, value = [*path, str(nested[0])], checkpoint[nested[0]]
        while len(first) < 8 and isinstance(value, dict) and not any(map(is_tensor, value.values())):
            if not (below := _nested(value, is_tensor)):
                break
            first.append(str(below[0]))
            value = value[below[0]]
        remedy = f"say which dict to read: key={'.'.join(first)!r}, on the command line --key {'.'.join(first)}"
        cause = f"{_at(path)} has {'tensors, and' if tensors else 'no tensors, but'} dicts under {listed(nested)}"
        raise CheckpointError(f"{cause}\n{remedy}")
    named = {name: value for name, value in tensors.items() if isinstance(name, str)}
    if len(named) < len(tensors) or (checkpoint and not tensors):
        wrong = [name for name in tensors or checkpoint if name not in named]
        others = [f"{n} ({'Tensor' if n in tensors else type(checkpoint[n]).__name__})" for n in wrong]
        raise CheckpointError(f"some entries of {_at(path)} are not named tensors: {listed(others)}\n{STATE_DICT}")
    _note(whole, path, named, what.note)
    return named


def _nested(checkpoint: dict, is_tensor: Callable[[Any], bool]) -> list[Any]:
    """The names of what holds tensors in turn; if there is no tensor at all, of all dicts."""
    holding = [name for name, value in checkpoint.items() if not is_tensor(value) and _holds(value, is_tensor)]
    if holding or any(map(is_tensor, checkpoint.values())):
        return holding
    return [name for name, value in checkpoint.items() if isinstance(value, dict)]


def _holds(value: Any, is_tensor: Callable[[Any], bool]) -> bool:
    """Whether there is a tensor anywhere in nested dicts, lists and tuples. Each is looked at once."""
    seen: set[int] = set()
    left = [value]
    while left:
        value = left.pop()
        if is_tensor(value):
            return True
        if type(value) in (dict, OrderedDict, list, tuple) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value
    return False


def mapped(value: Any, function: Callable[[str, Any], Any]) -> Any:
    """Copy nested dicts, lists and tuples, with `function(name, leaf)` for each leaf; names are keys joined by dots.

    Shared objects are copied once, and are shared in the copy.
    """
    copies: dict[int, Any] = {}

    def copy(value: Any, path: tuple[str, ...]) -> Any:
        if len(path) > _DEEPEST:
            raise CheckpointError(f"its dicts and lists are nested more than {_DEEPEST} deep\n{STATE_DICT}")
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


def _check_dict(value: Any, path: list[str], is_tensor: Callable[[Any], bool]) -> None:
    if not isinstance(value, dict):
        what = "one tensor" if is_tensor(value) else f"of type {type(value).__name__}"
        raise CheckpointError(f"no recurrent weights: {_at(path)} is {what}, not a dict of tensors\n{STATE_DICT}")


def _at(path: list[str]) -> str:
    return f"its {'.'.join(path)!r}" if path else "it"


def check_expanded(name: str, shape: tuple[int, ...], size: int, stored: int) -> None:
    if size > stored:
        cause = f"{name} of shape {shape} was saved expanded: the file has fewer numbers"
        raise CheckpointError(f"{cause}\nsave a copy of it: tensor.clone()")
