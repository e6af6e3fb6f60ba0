"""Checkpoints in several files: no tensor, file or entry of the index is passed over."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrnn.checkpoint import CheckpointError, load, save
from jaxrnn.checkpoint.tables import UNKNOWN

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def _write(folder: Path, one: dict[str, Any], two: dict[str, Any], listed: dict[str, str], **more: Any) -> Path:
    save(folder / ONE, one)
    save(folder / TWO, two)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed, **more}))
    return folder / INDEX


def _loaded(path: Path) -> tuple[dict[str, Any], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tensors = load(path)
    return tensors, [str(each.message).removeprefix(f"{path}: ") for each in caught]


def test_two_files_with_the_same_tensor(tmp_path: Path) -> None:
    a, b = np.ones(2), np.array([0.0, np.nan])
    listed = {"a": ONE, "b": TWO}
    tensors, words = _loaded(_write(tmp_path, {"a": a}, {"a": a, "b": b}, listed))
    assert (sorted(tensors), words) == (["a", "b"], [])
    path = _write(tmp_path, {"a": a}, {"a": 2 * a, "b": b}, listed)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: {ONE} and {TWO} are both read as a\nsave the whole checkpoint again"


def test_what_the_index_does_not_list_is_named(tmp_path: Path) -> None:
    a, b = np.ones(2), np.zeros(3)
    path = _write(tmp_path, {"a": a}, {"b": b, "c": b}, {"a": ONE, "b": TWO})
    tensors, words = _loaded(path)
    assert (sorted(tensors), words) == (["a", "b"], [f"left out c of {TWO}: add them to weight_map to load them"])
    tensors, words = _loaded(_write(tmp_path, {"a": a}, {"b": b, "c": b}, {"a": ONE, "b": TWO, "c": TWO}))
    assert (sorted(tensors), words) == (["a", "b", "c"], [])
    tensors, words = _loaded(_write(tmp_path, {"a": a}, {"b": b}, {"a": ONE}))
    assert (sorted(tensors), words) == (
        ["a"],
        [f"left out the files {TWO}: add their tensors to weight_map to load them"],
    )
    tensors, words = _loaded(_write(tmp_path, {"a": a}, {"b": b}, {"a": ONE, "b": TWO}, quantized=True))
    assert words == [f"the index has quantized=True: {UNKNOWN}"]


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    path = _write(tmp_path, {"a": np.ones(2)}, {"b": np.ones(2)}, {"a": ONE, "b": TWO})
    path.write_text(path.read_text().replace('"b"', '"a"'))
    with pytest.raises(CheckpointError, match="a damaged index of a checkpoint: ValueError it has two entries a\n"):
        load(path)
    path.write_text(f'{{"weight_map": {{"a": "{ONE}"}}, "weight_map": {{"b": "{TWO}"}}}}')
    with pytest.raises(CheckpointError, match="it has two entries weight_map\n"):
        load(path)
