"""Checkpoints in several files, which an index in JSON lists: `model.safetensors.index.json`, or `.bin`."""

import json
import os
import re

from jaxrnn.checkpoint.errors import AGAIN, CheckpointError, listed
from jaxrnn.checkpoint.formats import safetensors, torch_zip
from jaxrnn.checkpoint.formats.reading import Reading
from jaxrnn.checkpoint.stored import Value

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
    folder, names = os.path.dirname(path), _names(path)
    tensors: dict[str, Value] = {}
    for name in dict.fromkeys(names.values()):
        shard = os.path.join(folder, name)
        if not os.path.isfile(shard):
            raise CheckpointError(f"its file {name} is not there\nput all files that the index lists beside it")
        with open(shard, "rb") as file:
            head = file.read(1024)
        each = next((each for each in (safetensors, torch_zip) if each.sniff(head)), None)
        if each is None:
            raise CheckpointError(f"its file {name} is neither safetensors nor a file of torch.save\n{AGAIN}")
        try:
            found = each.read(shard, what)
        except CheckpointError as error:
            raise CheckpointError(f"its file {name}: {error}") from error
        if missing := [tensor for tensor, where in names.items() if where == name and tensor not in found]:
            raise CheckpointError(f"its file {name} has no {listed(missing)}\n{AGAIN}")
        tensors |= {tensor: value for tensor, value in found.items() if names.get(tensor) == name}
    return {tensor: tensors[tensor] for tensor in names}


def _names(path: str | os.PathLike[str]) -> dict[str, str]:
    """The file of each tensor."""
    if os.path.getsize(path) > _LARGEST:
        raise CheckpointError(f"an index of more than {_LARGEST} bytes\n{AGAIN}")
    try:
        with open(path, encoding="utf-8") as file:
            names = json.load(file)["weight_map"]
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
    return names
