"""Find the dict of tensors in what a file of torch.save holds, and walk through all of it."""

import contextlib
import shlex
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from jaxrnn.checkpoint.errors import CheckpointError, listed
from jaxrnn.checkpoint.formats.pickles import STATE_DICT
from jaxrnn.checkpoint.formats.reading import Reading
from jaxrnn.checkpoint.named import Described, modules_of
from jaxrnn.checkpoint.tables import Table, neutral, warned

_NESTING = (dict, OrderedDict, list, tuple)
# What torch's state dicts say of a module beside its tensors.
METADATA = Table(
    "_metadata of torch's state dicts",
    {
        # 2 of BatchNorm: it counts its batches, which changes no result here. Of others, quantized layers have 2 to 4.
        "version": warned(None, 1, 2, 3, 4, remedy="it may store something else: compare the outputs"),
        "spectral_norm": neutral("of the first version, which has no weight_v, fold says that parts are missing"),
    },
)
DEEPEST = 100  # nested dicts and lists; a state dict has a handful
LONGEST = 2_000  # characters in the keys down to a value: each value may get a name of them all
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
        if len(same := [each for each, _ in _items(tree) if str(each) == name]) > 1:
            cause = f"{_at(path)} may be the key {same[0]!r} or the key {same[1]!r}"
            raise CheckpointError(f"{cause}\nread all of it with jaxrnn.checkpoint.load_tree(path)")
        tree, key = named[name], key[len(name) + 1 :]
    return tree, path


def _items(tree: Any) -> list[tuple[Any, Any]]:
    """What a dict or a list holds, with its keys or numbers."""
    return list(enumerate(tree) if isinstance(tree, list | tuple) else tree.items() if isinstance(tree, dict) else ())


def _named(tree: Any) -> dict[str, Any]:
    """What a dict or a list holds, by its keys or numbers as text."""
    return {str(name): value for name, value in _items(tree)}


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


def choose(
    checkpoint: Any, what: Reading, is_tensor: Callable[[Any], bool], warn: Callable[[str, str], None]
) -> dict[str, Any]:
    """The tensors of the dict under a key; without one, of the dict under the only usual key, or at the top."""
    key, whole, path = what.key, checkpoint, list[str]()
    if key is not None:
        checkpoint, path = under_key(checkpoint, key)
    if not isinstance(checkpoint, dict):
        got = "one tensor" if is_tensor(checkpoint) else f"of type {type(checkpoint).__name__}"
        remedy = _key_to(whole, checkpoint, path, is_tensor)
        raise CheckpointError(f"no recurrent weights: {_at(path)} is {got}, not a dict of tensors\n{remedy}")
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
        cause = f"{_at(path)} has {'tensors, and' if tensors else 'no tensors, but'} dicts under {listed(nested)}"
        raise CheckpointError(f"{cause}\n{_key_to(whole, checkpoint, path, is_tensor)}")
    named = {name: value for name, value in tensors.items() if isinstance(name, str)}
    if len(named) < len(tensors) or (checkpoint and not tensors):
        wrong = [name for name in tensors or checkpoint if name not in named]
        others = [f"{n} ({'Tensor' if n in tensors else type(checkpoint[n]).__name__})" for n in wrong]
        raise CheckpointError(f"some entries of {_at(path)} are not named tensors: {listed(others)}\n{STATE_DICT}")
    _note(whole, path, named, what.note)
    metadata = getattr(checkpoint, "_metadata", None)
    for text, remedy in _unknown(metadata if isinstance(metadata, dict) else {}):
        warn(text, remedy)
    return Described(named, modules=modules_of(checkpoint))


def _unknown(metadata: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the metadata of a state dict has that is not known, each once, with the modules; and the remedy."""
    places: dict[tuple[str, str], list[str]] = {}
    for place, settings in metadata.items():
        for finding in METADATA.findings(settings if isinstance(settings, dict) else {}):
            places.setdefault((str(finding), finding.row.words), []).append(place or "the whole model")
    for (text, remedy), modules in places.items():
        yield f"the state dict of {listed(modules)} has {text}", remedy


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
        if type(value) in _NESTING and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value
    return False


def at_key(tree: Any, key: str | None) -> Any:
    """What is under a key of nested dicts and lists, or all of it."""
    return tree if key is None else under_key(tree, key)[0]


def deeper(path: tuple[str, ...], name: Any) -> tuple[str, ...]:
    """The keys down to what a dict or a list holds, after checks that they are not too many, and not too long."""
    path = (*path, str(name))
    if len(path) > DEEPEST or sum(map(len, path)) > LONGEST:
        cause = f"nested more than {DEEPEST} deep, or their keys have over {LONGEST} characters"
        raise CheckpointError(f"its dicts and lists are {cause}\nsave the tensors alone, by shorter names")
    return path


def mapped(value: Any, function: Callable[[str, Any], Any]) -> Any:
    """Copy nested dicts, lists and tuples, with `function(name, leaf)` for each leaf; names are keys joined by dots.

    Shared objects are copied once, and are shared in the copy.
    """
    copies: dict[int, Any] = {}

    def copy(value: Any, path: tuple[str, ...]) -> Any:
        if id(value) in copies:
            return copies[id(value)]
        if isinstance(value, dict):
            copies[id(value)] = {}
            copies[id(value)].update((key, copy(item, deeper(path, key))) for key, item in value.items())
        elif type(value) is list:
            copies[id(value)] = []
            copies[id(value)].extend(copy(item, deeper(path, index)) for index, item in enumerate(value))
        elif type(value) is tuple:
            copies[id(value)] = tuple(copy(item, deeper(path, index)) for index, item in enumerate(value))
        else:
            copies[id(value)] = function(".".join(path), value)
        return copies[id(value)]

    return copy(value, ())


def _key_to(whole: Any, tree: Any, path: list[str], is_tensor: Callable[[Any], bool]) -> str:
    """What to do instead: give the key of the first dict that can be read, in a tree that cannot.

    Args:
        whole: all that the file holds, where the key has to lead to that dict and no other.
        tree: what is under `path` in it.
        path: keys.
        is_tensor: whether something is a tensor.
    """
    for below, value in _dicts(tree, path, is_tensor):
        key = ".".join(below)
        named = all(isinstance(name, str) for name, item in value.items() if is_tensor(item))
        with contextlib.suppress(CheckpointError):
            if named and "param_groups" not in value and under_key(whole, key)[0] is value:
                return f"say which dict to read: key={key!r}, on the command line --key {shlex.quote(key)}"
    return f"{STATE_DICT}, or read all of it with jaxrnn.checkpoint.load_tree(path)"


def _dicts(tree: Any, path: list[str], is_tensor: Callable[[Any], bool]) -> Iterator[tuple[list[str], dict]]:
    """The dicts below that hold tensors and nothing that holds tensors in turn, each once, with their keys."""
    seen: set[int] = set()
    left = [(path, tree)]
    while left:
        path, value = left.pop()
        if type(value) not in _NESTING or id(value) in seen or len(path) > DEEPEST:
            continue
        seen.add(id(value))
        if isinstance(value, dict) and any(map(is_tensor, value.values())) and not _nested(value, is_tensor):
            yield path, value
        if not (isinstance(value, dict) and "param_groups" in value):  # moments have no names
            left += [([*path, str(name)], item) for name, item in reversed(_items(value))]


def _at(path: list[str]) -> str:
    return f"its {'.'.join(path)!r}" if path else "it"


def check_expanded(name: str, shape: tuple[int, ...], size: int, stored: int) -> None:
    if size > stored:
        cause = f"{name} of shape {shape} was saved expanded: the file has fewer numbers"
        raise CheckpointError(f"{cause}\nsave a copy of it: tensor.clone()")
