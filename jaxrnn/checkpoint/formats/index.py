"""Checkpoints in several files, which an index in JSON lists: `model.safetensors.index.json`, or `.bin`."""

import json
import os
import re

from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, listed
from jaxrnn.checkpoint.formats import safetensors, torch_zip
from jaxrnn.checkpoint.formats.reading import Reading, warn
from jaxrnn.checkpoint.named import Names
from jaxrnn.checkpoint.stored import Value, equal
from jaxrnn.checkpoint.tables import USED, Table, neutral

_INDEX = Table("the index", {"weight_map": USED, "metadata": neutral("sizes, for progress bars")})
_LARGEST = 100 << 20  # bytes of an index
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[a-z]+)")


def index_of(path: str | os.PathLike[str]) -> str | None:
    """The index that lists a file: the file itself, the only one of a folder, or the one beside a shard.

    Raises:
        CheckpointError: a shard has no index, or a folder has several.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    if name.endswith(".index.json"):
        return path
    if os.path.isdir(path):
        found = sorted(entry for entry in os.listdir(path) if entry.endswith(".index.json"))
        if len(found) > 1:
            cause = "a directory with several checkpoints"
            raise CheckpointError(f"{cause}\ngive the path of one of them: {listed(found)}")
        return os.path.join(path, found[0]) if found else None
    shard = _SHARD.fullmatch(name)
    if shard is None or int(shard["count"]) == 1:
        return None
    beside = os.path.join(folder, f"{shard['stem']}{shard['suffix']}.index.json")
    if not os.path.exists(beside):
        cause = f"one of {int(shard['count'])} files of a checkpoint, without the index that lists them"
        raise CheckpointError(f"{cause}\nput {os.path.basename(beside)} beside it, with all the files")
    return beside


def read(path: str | os.PathLike[str], what: Reading) -> dict[str, Value]:
    """The tensors that the index lists.

    Raises:
        CheckpointError: a file is missing or damaged; or two files have a tensor of one name, with other numbers.

    Warns:
        UserWarning: tensors and files that the index does not list, and what jaxrnn does not know in it.
    """
    folder, names = os.path.dirname(path), _names(path)
    files = list(dict.fromkeys(names.values()))
    found = {name: _read_file(folder, name, what) for name in files}
    tensors = Names[Value]("save the whole checkpoint again")
    for tensor, name in names.items():
        if tensor not in found[name]:
            missing = [each for each, where in names.items() if where == name and each not in found[name]]
            raise CheckpointError(f"its file {name} has no {listed(missing)}\n{AGAIN}")
        tensors.put(tensor, found[name][tensor], name)
    for name, each in found.items():
        for tensor in each.keys() & names.keys():
            if names[tensor] != name and not equal(each[tensor], tensors[tensor]):
                tensors.put(tensor, each[tensor], name)
        if others := [tensor for tensor in each if tensor not in names]:
            warn(path, f"left out {listed(others)} of {name}: add them to weight_map to load them")
    if others := _others(folder, files):
        warn(path, f"left out the files {listed(others)}: add their tensors to weight_map to load them")
    return dict(tensors)


def _read_file(folder: str, name: str, what: Reading) -> dict[str, Value]:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise CheckpointError(f"its file {name} is not there\nput all files that the index lists beside it")
    with open(path, "rb") as file:
        head = file.read(1024)
    each = next((each for each in (safetensors, torch_zip) if each.sniff(head)), None)
    if each is None:
        raise CheckpointError(f"its file {name} is neither safetensors nor a file of torch.save\n{AGAIN}")
    try:
        return each.read(path, what)
    except CheckpointError as error:
        raise CheckpointError(f"its file {name}: {error}") from error


def _others(folder: str, files: list[str]) -> list[str]:
    """Files beside those of a checkpoint that have the same name but for the number."""
    series = {(m["stem"], m["count"], m["suffix"]) for name in files if (m := _SHARD.fullmatch(name))}
    beside = [(name, _SHARD.fullmatch(name)) for name in sorted(os.listdir(folder or "."))]
    same = [name for name, m in beside if m and (m["stem"], m["count"], m["suffix"]) in series]
    return [name for name in same if name not in files]


def _names(path: str | os.PathLike[str]) -> dict[str, str]:
    """The file of each tensor."""
    if os.path.getsize(path) > _LARGEST:
        raise CheckpointError(f"an index of more than {_LARGEST} bytes\n{AGAIN}")
    try:
        with open(path, encoding="utf-8") as file:
            whole = json.load(file, object_pairs_hook=_once)
        names = whole["weight_map"]
        if not (isinstance(names, dict) and names and all(type(name) is str for name in names.values())):
            raise ValueError("weight_map should be a dict from tensor names to file names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        cause = f"a damaged index of a checkpoint: {type(error).__name__} {error}".partition("\n")[0][:200]
        raise CheckpointError(f"{cause}\n{AGAIN}") from error
    odd = {name for name in names.values() if name in ("", ".", "..") or "\0" in name or os.path.basename(name) != name}
    if odd:
        raise CheckpointError(
            f"it lists files outside its folder: {listed(odd)}\nget the file from a source that you trust"
        )
    for finding in _INDEX.findings(whole):
        warn(path, f"{_INDEX.title} has {finding}: {finding.row.words}")
    return names


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A dict in which no name is taken twice, as JSON allows it."""
    names: dict[str, object] = {}
    for name, value in pairs:
        if name in names and names[name] != value:
            raise ValueError(f"it has two entries {name}")
        names[name] = value
    return names
